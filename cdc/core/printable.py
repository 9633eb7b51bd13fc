"""Foreign text, made fit to be shown: on a terminal, in a line of the log, in JSON. Pure.

Names of tables, types, keys, roles, slots and programs, and the texts of errors, come from outside. A terminal obeys
what is in them: escape sequences (also by the C1 controls), carriage returns, and marks that turn the direction of
writing. So each character that cannot be printed is shown as its escape, ``\\x1b`` or ``\\u202e``, and a line stays
one line.
"""

from __future__ import annotations


def printable(text: str) -> str:
    """``text`` on one line, with each character that is not printable as Python escapes it."""
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def printable_lines(text: str, indent: str = "") -> str:
    """The same for each line of a text that has lines, such as a traceback. ``indent`` goes before all of them."""
    return "\n".join(indent + printable(line) for line in text.split("\n"))


def printable_json(text: str) -> str:
    """A JSON text with the characters that are not printable as JSON escapes; it means the same.

    Such characters are in strings only, except for the line breaks between values.
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
    """``text`` if it has at most ``bytes_max`` bytes in UTF-8, else its beginning and how many bytes are left out."""
    if 4 * len(text) <= bytes_max:
        return text
    # Each character has at least one byte, so what is encoded is bounded too.
    encoded = text[: bytes_max + 1].encode("utf-8", "surrogatepass")
    if len(text) <= bytes_max and len(encoded) <= bytes_max:
        return text
    kept = encoded[:bytes_max].decode("utf-8", "ignore")
    return f"{kept}... ({len(text) - len(kept):,} more characters)"
