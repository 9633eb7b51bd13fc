"""The statements for the changes of a key that one call stands for (``core.latest``). Takes the connection."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import psycopg

from cdc.core.latest import Latest, latest
from cdc.core.model import SEQ_MAX, Change, Coalesced, Key
from cdc.core.read_reconciler import Settlement
from cdc.postgres.pages import change_row
from cdc.postgres.watched import rows_of

DISTANCE = 64_000
"""A call stands for changes whose numbers are no further from the first one's: a thousand rows of each shard where all
are written evenly, which the server goes through in a millisecond. Those of one key, if it is written alone."""
COUNT = 10_000
"""And for no more than these and the first: some 100 KB of numbers, and as many rows of one mark."""


class Ask(NamedTuple):
    """``change``: the first of its key, started. ``operations``: those that its handler gets. Durations in seconds."""

    change: Change
    operations: Sequence[str]
    quiet_s: float
    at_most_s: float


class CoalescedChanges:
    """By these ``statements``. ``always``: the parameters of each read. ``marks``: called before each mark."""

    def __init__(
        self, statements: Mapping[str, bytes], always: Mapping[str, Any], marks: Callable[[], None] = lambda: None
    ) -> None:
        self._statements = statements
        self._always = always
        self._marks = marks

    async def ask(self, reader: psycopg.AsyncConnection, asks: Sequence[Ask]) -> dict[Ask, Latest | None]:
        """What each call would stand for. None: the change is not as it was read. Those left out did not fit."""
        changes = [ask.change for ask in asks]
        parameters = {
            **self._always,
            "ids": [change.id for change in changes],
            "shards": [change.shard for change in changes],
            "types": [change.entity_type for change in changes],
            "entity_ids": [change.entity_id for change in changes],
            "seqs": [change.seq for change in changes],
            "requeued": [change.requeued for change in changes],
            "failures": [change.attempt - 1 - change.crashed for change in changes],
            "operations": [",".join(ask.operations) for ask in asks],
            "quiet": [ask.quiet_s for ask in asks],
            "at_most": [ask.at_most_s for ask in asks],
            "replays": [change.replay_of is not None for change in changes],
            "distance": DISTANCE,
            "count": COUNT,
            "seq_max": SEQ_MAX,
        }
        found: dict[Ask, Latest | None] = dict.fromkeys(asks)
        for place, before, later, wait_s, *record in await rows_of(reader, self._statements["ask"], parameters):
            ask = asks[place - 1]
            if before is not None:
                found[ask] = Latest(ask.change, before=before)
            elif wait_s or later is None:
                found[ask] = Latest(ask.change, wait_s=wait_s)
            elif record[2] is None:  # its row is none that fits, or was settled meanwhile: asked again
                del found[ask]
            else:
                found[ask] = latest(ask.change, change_row(record).change, later)
        return found

    async def settle(self, session: psycopg.AsyncConnection, groups: Sequence[Settlement]) -> None:
        """Record all but the last of each group, in the transaction that records the last one's outcome."""
        await rows_of(session, self._statements["settle"], self._parameters(groups))

    async def locked(self, session: psycopg.AsyncConnection, groups: Sequence[Settlement]) -> set[Key]:
        """The keys of the groups of which another session has locked a row; the other rows are locked now."""
        rows = await rows_of(session, self._statements["locked"], self._parameters(groups))
        keys = {change.id: change.key for change, _ in groups}
        return {keys[first] for (first,) in rows}

    @property
    def indexed(self) -> bytes:
        """The statement before ``mark``; the transaction does nothing else afterwards."""
        return self._statements["indexed"]

    def mark(self, first: Change, of: Latest, xid: str) -> tuple[bytes, dict[str, Any]]:
        """The statement that marks all of the group on a transactional handler's connection.

        It returns how many it has marked, and as ``outbox.Store.mark`` when, and whether the transaction was captured.
        No row: the handler has ended the transaction it was given.
        """
        self._marks()
        return self._statements["mark"], {
            **self._always, "first": first.id, "seq": first.seq, "requeued": first.requeued, "shard": first.shard,
            "later": of.later, "last": of.change.seq, "xid": xid,
        }  # fmt: skip

    def _parameters(self, settlements: Iterable[Settlement]) -> dict[str, Any]:
        groups = [(change, outcome) for change, outcome in settlements if isinstance(outcome, Coalesced)]
        return {
            **self._always,
            "firsts": [first.id for first, _ in groups],
            "seqs": [first.seq for first, _ in groups],
            "requeued": [first.requeued for first, _ in groups],
            "shards": [first.shard for first, _ in groups],
            "later": [group.later for _, group in groups],
            "lasts": [group.change.seq for _, group in groups],
        }
