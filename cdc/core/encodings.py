"""Text that a server's encoding is sure to hold. Pure."""

from __future__ import annotations

import codecs


def fitting(text: str, encoding: str) -> str:
    """With escapes for what the server's encoding cannot hold. Of an encoding that Python does not know, only ASCII."""
    if encoding == "UTF8":
        return text
    try:
        codec = codecs.lookup(encoding).name
    except LookupError:
        codec = "ascii"
    return text.encode(codec, "backslashreplace").decode(codec)
