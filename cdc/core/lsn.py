"""Positions in the write-ahead log.

A type of its own, because PostgreSQL believes any number that a client confirms: a clock value sent as a position
silences the slot from the next reconnect on, without an error.
"""

from __future__ import annotations

_BITS = 64


class Lsn(int):
    """A log sequence number: a byte offset in the WAL, ordered, written ``16/B374D848``."""

    __slots__ = ()

    def __new__(cls, value: int) -> Lsn:
        if not 0 <= value < 1 << _BITS:
            raise ValueError(f"an LSN has 64 bits; {value:#x} does not fit")
        return super().__new__(cls, value)

    @classmethod
    def parse(cls, text: str) -> Lsn:
        """Read the server's spelling, two hexadecimal halves with a slash between them."""
        high, slash, low = text.partition("/")
        if not slash:
            raise ValueError(f"{text!r} is not an LSN; expected two hexadecimal numbers such as 16/B374D848")
        return cls(int(high, 16) << 32 | int(low, 16))

    def __str__(self) -> str:
        return f"{self >> 32:X}/{self & 0xFFFFFFFF:X}"

    def __repr__(self) -> str:
        return f"Lsn({str(self)!r})"


ZERO = Lsn(0)
