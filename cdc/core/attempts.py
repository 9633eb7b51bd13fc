"""A failed attempt, as it is kept beside its change. Pure."""

from __future__ import annotations

from dataclasses import dataclass

KEPT = 20
"""Of one change and subscription: the last ones. With the bounds of text and frames, some 100 kB at most."""

UNMARKABLE, UNREADABLE, CRASHED = "unmarkable", "unreadable", "crash"
"""Kinds of failures that are no error of a handler: the database refuses the mark or the row, the process has ended."""


@dataclass(frozen=True, slots=True)
class FailedAttempt:
    """``kind``: the error's class, or a word of ours. ``text`` may quote the row; ``frames`` quote nothing.

    ``handler``: None where none was to blame. ``took_s``: None where it was not called. ``ended`` by time.monotonic().
    """

    handler: str | None
    kind: str
    error: str
    text: str
    ended: float
    took_s: float | None = None
    frames: tuple[str, ...] = ()
