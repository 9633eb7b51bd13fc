"""What must hold, checked at the moment where it could break. Raises AssertionError."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from cdc.core.model import Change, Coalesced, Outcome, Processed
from cdc.core.read_reconciler import Settlement
from tests.simulation.server import Record, Server, seqs_of

if TYPE_CHECKING:
    from tests.simulation.consumer import Call


class Promises:
    """Order holds for consumers that hold their session, and within a process always; effects whoever causes them."""

    def __init__(self, server: Server, happened: Counter[str]) -> None:
        self._server = server
        self.calls: list[Call] = []
        """What runs now, in all processes."""
        self.returned: Counter[int] = Counter()
        """seq -> handlers that have returned, for changes without a transaction."""
        self.effects: Counter[int] = Counter()
        """seq -> committed transactions of handlers."""
        self.given_up: set[int] = set()
        """seqs that shared the last attempt of a dead letter."""
        self.delivered: Counter[str] = Counter()
        """Key -> the highest seq whose row a handler with ``latest`` has had."""
        self.happened = happened
        """How often what makes a schedule worth playing has come about."""

    # --- a change starts -------------------------------------------------------------------------------------------

    def starts(self, call: Call, changes: Sequence[Change], unsettled: dict[int, Outcome]) -> None:
        """``unsettled``: outcomes that this consumer, in this session, has and that are not in the table yet."""
        for change in changes:
            self._runs_alone(call, change)
            if call.session.alive:
                assert change.shard in call.session.shards, f"{change!r} is somebody else's"
                assert change.seq not in unsettled, f"{change!r} has finished and starts again"
                self._is_as_read(call, change)
                self._is_next(call, change, unsettled)
                self._keeps_to_truncates(change)
            self.happened["a change started" if call.session.alive else "a change started without a session"] += 1
        for key in {change.key for change in call.changes}:
            seqs = [change.seq for change in call.changes if change.key == key and not self._requeued_late(change)]
            assert seqs == sorted(seqs), f"a batch out of order: {call.changes}"
            self.happened["a batch held several changes of a key"] += len(seqs) > 1

    def coalesces(self, call: Call, later: Sequence[int]) -> None:
        """Its call is to stand for these, too, as the table has shown it: all of its key, none passed over."""
        [change] = call.changes
        key, last = change.entity_id, max(later, default=change.seq)
        self.happened["a call stood for several changes"] += bool(later)
        if call.session.alive and not self._requeued_late(change):
            rows = self._server.rows
            before_last = [row for row in self._server.unsettled[key].values() if row.seq < last]
            missing = [row for row in before_last if row.seq not in call.seqs and not row.requeued_late]
            missing = [row for row in missing if self._server.precedes(row, rows[last])]
            assert not missing, f"{change!r} passes over {missing}"
            for seq in later:
                self._keeps_to_truncates(rows[seq].change())
            before = self.delivered[key]
            # A TRUNCATE that has become visible after a replay with a higher number comes in between, too.
            since = (row for row in rows.values() if last <= row.seq < before and _concerns(row, rows[change.seq]))
            older = last < before and all(self._server.precedes(row, rows[before]) for row in since)
            assert not older, f"{change!r} has an older row than {before}, and nothing has come in between"
            self.delivered[key] = max(last, before)

    def _runs_alone(self, call: Call, change: Change) -> None:
        for other in self.calls:
            same_process = other.process is call.process
            if other is not call and (same_process or (other.session.alive and call.session.alive)):
                assert all(running.key != change.key for running in other.changes), f"{change.key} runs twice"

    def _is_as_read(self, call: Call, change: Change) -> None:
        record = self._server.rows[change.seq]
        if not call.kind.transactional:  # else the row may have been taken by one that lost its session
            assert record.state in ("fresh", "waiting"), f"{change!r} was settled and starts again"
            assert self._requeued_late(change) or change.attempt == record.failures + 1, f"{change!r}: {record}"

    def _requeued_late(self, change: Change) -> bool:
        return self._server.rows[change.seq].requeued_late

    def _is_next(self, call: Call, change: Change, unsettled: dict[int, Outcome]) -> None:
        record = self._server.rows[change.seq]
        self.happened["a replay started"] += record.replays is not None
        of_key = self._server.unsettled[change.entity_id].values()
        self.happened["a replay overtook what was not there"] += any(
            row.seq < change.seq and not self._server.precedes(row, record) for row in of_key
        )
        beside = {other.seq for other in call.changes}
        for earlier in self._earlier(change):
            if earlier.seq not in beside:
                outcome = unsettled.get(earlier.seq)
                assert outcome is not None, f"{change!r} overtakes {earlier}"
                assert not outcome.blocks_key, f"{change!r} overtakes {earlier}, which failed"
                assert not call.kind.transactional, f"{change!r} would be marked before {earlier}"

    def _keeps_to_truncates(self, change: Change) -> None:
        record = self._server.rows[change.seq]
        for earlier in self._server.visible():
            if earlier.type != record.type or earlier.seq >= record.seq or earlier.requeued:
                continue
            if self._server.precedes(earlier, record):
                assert not earlier.truncates, f"{change!r} overtakes {earlier}"
                assert not record.truncates or earlier.state == "paused", f"{change!r} does not wait for {earlier}"

    def _earlier(self, change: Change) -> list[Record]:
        """What of the key should have been settled before."""
        record, rows = self._server.rows[change.seq], self._server.unsettled[change.entity_id].values()
        before = (row for row in rows if row.seq < change.seq and not row.requeued_late)
        return [row for row in before if self._server.precedes(row, record)]

    # --- a change is marked ----------------------------------------------------------------------------------------

    def settles(self, batch: Iterable[Settlement]) -> None:
        """What is about to be written, on a session that lives. What failed together may end in any order."""
        written: set[int] = set()
        for finished in batch:
            change, outcome = finished
            for earlier in self._earlier(change):
                marked = isinstance(outcome, Processed | Coalesced)
                assert not marked or earlier.seq in written, f"{change!r} is settled before {earlier}"
            written.update(seqs_of(finished))

    def missed(self, finished: Settlement, *, transactional: bool) -> None:
        """A settle did not find its row as it should be: an orphan's transaction may have marked it, nobody else."""
        state = self._server.rows[finished.change.seq].state
        assert transactional, f"{finished} found its row {state}"
        assert state == "processed", f"{finished} found its row {state}"

    def committed(self, seqs: Iterable[int]) -> None:
        for seq in seqs:
            self.effects[seq] += 1
            assert self.effects[seq] == 1, f"the effects of {seq} happened twice"

    # --- the end ---------------------------------------------------------------------------------------------------

    def all_kept(self, transactional: Callable[[Record], bool]) -> None:
        for record in self._server.rows.values():
            assert record.settled, f"lost: {record}"
            if record.state == "processed":
                done = self.effects if transactional(record) else self.returned
                assert record.seq in self.given_up or done[record.seq] >= 1, (
                    f"marked, and no handler has done it: {record}"
                )


def _concerns(row: Record, other: Record) -> bool:
    """Whether the one is of the key of the other, or of its whole type."""
    return row.key == other.key or (row.truncates and row.type == other.type)
