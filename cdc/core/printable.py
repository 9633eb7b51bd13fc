"""Text of others, made fit to be shown: on a terminal, in a line of the log, in JSON. Pure.

Names of tables, types, keys, roles, slots and programs, and the words of errors, are other people's. A terminal obeys
what is in them: escape sequences (also by the C1 controls), carriage returns, and marks that turn the direction of
writing. So whatever cannot be printed is shown as its escape, ``\\x1b`` or ``\\u202e``, and a line stays one line.
"""

from __future__ import annotations


def printable(text: str) -> str:
    """``text`` on one line, each character that is not printable as Python writes it."""
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def printable_lines(text: str, indent: str = "") -> str:
    """The same of each line, for what has lines by right, such as a traceback. ``indent`` goes before all of them."""
    return "\n".join(indent + printable(line) for line in text.split("\n"))


def printable_json(text: str) -> str:
    """A JSON text with the characters that are not printable as its own escapes; it means the same.

    They are in strings only, but for the line breaks between values.
    """
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() or character == "\n" else _json_escape(character) for character in text
    )


def _json_escape(character: str) -> str:
    code = ord(character)
    if code < 0x10000:
        return f"\\u{code:04x}"
    code -= 0x10000
    return f"\\u{0xD800 + (code >> 10):04x}\\u{0xDC00 + (code & 0x3FF):04x}"


def cut(text: str, bytes_max: int) -> str:
    """``text`` if it has at most so many bytes in UTF-8, else its beginning and how many bytes are left out."""
    if 4 * len(text) <= bytes_max:
        return text
    # A character has a byte at least, so that what is encoded is bounded too.
    encoded = text[: bytes_max + 1].encode("utf-8", "surrogatepass")
    if len(text) <= bytes_max and len(encoded) <= bytes_max:
        return text
    kept = encoded[:bytes_max].decode("utf-8", "ignore")
    return f"{kept}... ({len(text) - len(kept):,} more characters)"
