"""Text that fits a server's encoding. Pure."""

from __future__ import annotations

import codecs


def fitting(text: str, encoding: str) -> str:
    """Escape what the server's encoding cannot hold. For an encoding that Python does not know, all but ASCII."""
    if encoding == "UTF8":
        return text
    try:
        codec = codecs.lookup(encoding).name
    except LookupError:
        codec = "ascii"
    return text.encode(codec, "backslashreplace").decode(codec)
