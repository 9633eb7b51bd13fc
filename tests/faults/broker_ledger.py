"""The judge of deliveries to a broker: from what was captured and what a reader of the broker got, was anything lost,
doubled or out of order?

Pure. What is allowed, and nothing else: a message may be there again, with the id that it has had, since an
acknowledgement may be lost. Its first copy comes after the first copies of all earlier changes of its key, so that a
reader that remembers the last number of each key has each change once and in order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Captured(NamedTuple):
    """A row of entity_changes at the end."""

    seq: int
    key: str
    id: str
    state: str


class Read(NamedTuple):
    """A message, in the order in which a reader got it."""

    seq: int
    key: str
    id: str


def judge(captured: Sequence[Captured], read: Sequence[Read], *, copies_max: int | None = None) -> list[str]:
    """What is wrong. ``copies_max``: of one change, in the broker; None: any number of them."""
    rows = {row.id: row for row in captured}
    return [*_losses(captured, read), *_strangers(rows, read), *_disorder(read), *_doubles(read, copies_max)]


def _losses(captured: Sequence[Captured], read: Sequence[Read]) -> Iterator[str]:
    there = {message.id for message in read}
    for row in captured:
        if row.state == "processed" and row.id not in there:
            yield f"lost: {row}"
        elif row.state not in ("processed", "dead"):
            yield f"not settled: {row}"
        elif row.state == "dead" and row.id in there:
            yield f"a dead letter, and there: {row}"


def _strangers(rows: dict[str, Captured], read: Sequence[Read]) -> Iterator[str]:
    for message in read:
        row = rows.get(message.id)
        if row is None or (row.seq, row.key) != (message.seq, message.key):
            yield f"not what was captured: {message}, {row}"


def _disorder(read: Sequence[Read]) -> Iterator[str]:
    last: dict[str, int] = {}
    seen = set[str]()
    for message in read:
        if message.id not in seen and message.seq < last.get(message.key, 0):
            yield f"out of order: {message} comes first behind {last[message.key]}"
        seen.add(message.id)
        last[message.key] = max(message.seq, last.get(message.key, 0))


def _doubles(read: Sequence[Read], copies_max: int | None) -> Iterator[str]:
    for change, copies in Counter(message.id for message in read).items():
        if copies_max is not None and copies > copies_max:
            yield f"{copies} copies: {change}"
