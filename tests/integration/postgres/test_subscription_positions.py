"""Positions and rows of two subscriptions against a model, on a real server: what is fresh, waits, is dead or done.

Writers stay open, commit late or roll back; outcomes come in any order, from the session that owns the shards and from
transactional handlers; starts are recorded as after a crash. Whatever happens, each subscription reads exactly what the
model says, and no position reaches the number of an open transaction.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from cdc.core.admission import Row
from cdc.core.model import SHARDS, Change, Dead, Outcome, Processed, Waiting, WakeUp
from cdc.core.read_planner import Sweep
from cdc.core.read_reconciler import Settlement
from cdc.core.shard_cursor import Position
from cdc.core.type_filter import EVERYTHING
from cdc.postgres import subscription
from cdc.postgres.connect import connect_async
from cdc.postgres.loaders import read_changes
from cdc.postgres.subscription import SubscriptionStore
from cdc.postgres.subscriptions import Subscriptions
from tests.subscription_reader import EVERY_SHARD, left_behind, reading
from tests.subscriptions import states_of

pytestmark = pytest.mark.server

_SHARD = 5
_KEYS = 3
"""All in that shard: a transaction that is open has lower numbers there than others have committed."""
_WRITERS = 3
_MANY = settings(
    max_examples=20, stateful_step_count=50, deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)  # fmt: skip


@dataclass
class Reads:
    """A subscription, and what the model knows about it. ``state``: of each committed change, by seq."""

    store: SubscriptionStore
    number: int
    state: dict[int, str] = field(default_factory=dict)
    failures: dict[int, int] = field(default_factory=dict)

    def holds(self, seq: int) -> bool:
        return self.state.get(seq) in ("waiting", "paused")


class Machine(RuleBasedStateMachine):
    dsn = ""
    names: Sequence[str] = ()

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.writers = [psycopg.connect(self.dsn) for _ in range(_WRITERS)]
        self.handlers = psycopg.connect(self.dsn)
        self.db = psycopg.connect(self.dsn, autocommit=True)
        self.pending: dict[int, list[tuple[int, str]]] = {}
        self.keys: dict[int, str] = {}
        self.reads: list[Reads] = []

    @initialize()
    def begin(self) -> None:
        """Two of them; of the changes of the sequences before they take none. The first moves as it settles."""
        for _ in range(2):
            made, _ = Subscriptions("public").create(self.db, f"s_{uuid.uuid4().hex[:12]}", start="now")
            self.reads.append(Reads(SubscriptionStore("public", made, 16, EVERYTHING), made.number))
        owner = self.reads[0]
        self.db.execute(
            "UPDATE cdc_positions SET owner = %s WHERE subscription = %s", [owner.store.process, owner.number]
        )
        self.session = self.run(self._connect())

    async def _connect(self) -> psycopg.AsyncConnection:
        session = await connect_async(self.dsn, application_name="cdc: test", session=SubscriptionStore.session)
        read_changes(session)
        return session

    def run(self, coroutine: Any) -> Any:
        return self.loop.run_until_complete(coroutine)

    def teardown(self) -> None:
        if hasattr(self, "session"):
            self.run(self.session.close())
        for connection in (*self.writers, self.handlers, self.db):
            connection.close()
        self.loop.close()

    # --- writers ---------------------------------------------------------------------------------------------------

    @rule(writer=st.integers(0, _WRITERS - 1), which=st.integers(0, _KEYS - 1))
    def write(self, writer: int, which: int) -> None:
        """Of an open transaction; its key is locked until it ends."""
        key = self.names[which]
        if any(key == other for number, rows in self.pending.items() if number != writer for _, other in rows):
            return
        [(seq,)] = self.writers[writer].execute("SELECT publish_change('x', %s)", [key]).fetchall()
        self.pending.setdefault(writer, []).append((seq, key))

    @rule(which=st.lists(st.integers(0, _KEYS - 1), min_size=1, max_size=4))
    def write_and_commit(self, which: list[int]) -> None:
        locked = {key for rows in self.pending.values() for _, key in rows}
        for key in (self.names[each] for each in which):
            if key not in locked:
                [(seq,)] = self.db.execute("SELECT publish_change('x', %s)", [key]).fetchall()
                self._committed([(seq, key)])

    @rule(data=st.data(), rolls_back=st.sampled_from([False, False, True]))
    @precondition(lambda self: self.pending)
    def end(self, data: st.DataObject, rolls_back: bool) -> None:
        writer = data.draw(st.sampled_from(sorted(self.pending)))
        rows = self.pending.pop(writer)
        if rolls_back:
            self.writers[writer].rollback()
        else:
            self.writers[writer].commit()
            self._committed(rows)

    def _committed(self, rows: Sequence[tuple[int, str]]) -> None:
        for seq, key in rows:
            self.keys[seq] = key
            for reads in self.reads:
                reads.state[seq] = "fresh"

    # --- a subscription --------------------------------------------------------------------------------------------

    def _fresh(self, reads: Reads) -> list[Row]:
        page = self.run(reads.store.sweep(self.session, EVERY_SHARD))
        return list(page.rows)

    def _due(self, reads: Reads) -> list[Row]:
        return list(self.run(reads.store.due(self.session, range(SHARDS), 100)).rows)

    @precondition(lambda self: self.keys)
    @rule(which=st.integers(0, 1))
    def advance(self, which: int) -> None:
        self._advance(self.reads[which])

    def _advance(self, reads: Reads) -> None:
        self.run(reads.store.advance(self.session, range(SHARDS)))

    @precondition(lambda self: self.keys)
    @rule(which=st.integers(0, 1), times=st.integers(1, 2))
    def settle_all_and_advance(self, which: int, times: int) -> None:
        reads = self.reads[which]
        if batch := [Settlement(row.change, Processed()) for row in self._fresh(reads)]:
            assert self.run(reads.store.settle(self.session, batch)).missed == 0
            reads.state.update((change.seq, "done") for change, _ in batch)
        for _ in range(times):
            self._advance(reads)
        if batch:
            assert self.run(reads.store.settle(self.session, batch)).missed == len(batch), "who comes second has lost"

    @rule(which=st.integers(0, 1), data=st.data(), by_number=st.booleans())
    @precondition(lambda self: self.keys)
    def settle(self, which: int, data: st.DataObject, by_number: bool) -> None:
        reads = self.reads[which]
        rows = self._fresh(reads) + self._due(reads)
        if not rows:
            return
        chosen = data.draw(
            st.lists(st.sampled_from(rows), min_size=1, max_size=5, unique_by=lambda row: row.change.seq)
        )
        outcomes = [data.draw(st.sampled_from(_OUTCOMES)) for _ in chosen]
        batch = [Settlement(row.change, outcome) for row, outcome in zip(chosen, outcomes, strict=True)]
        settled = self.run(reads.store.settle(self.session, batch, around_locks=by_number))
        assert settled.missed == 0
        for change, outcome in batch:
            self._settled(reads, change, outcome)
        again = self.run(reads.store.settle(self.session, [batch[0]]))
        if reads.state[batch[0].change.seq] == "done":
            assert again.missed == 1, "who comes second has lost"
        elif again.missed == 0:
            self._settled(reads, *batch[0])

    def _settled(self, reads: Reads, change: Change, outcome: Outcome) -> None:
        seq = change.seq
        match outcome:
            case Waiting():
                reads.state[seq] = "waiting"
                reads.failures[seq] = reads.failures.get(seq, 0) + 1
            case Dead(pauses=pauses):
                reads.state[seq] = "paused" if pauses else "dead"
            case _:
                reads.state[seq] = "done"

    @rule(which=st.integers(0, 1), data=st.data(), rolls_back=st.booleans())
    @precondition(lambda self: self.keys)
    def handle_in_a_transaction(self, which: int, data: st.DataObject, rolls_back: bool) -> None:
        reads = self.reads[which]
        rows = self._fresh(reads) + self._due(reads)
        if not rows:
            return
        change = data.draw(st.sampled_from(rows)).change
        [(xid,)] = self.handlers.execute(*reads.store.take([change], change)).fetchall()
        marked = self.handlers.execute(*reads.store.mark([change], xid)).fetchall()
        assert [at is not None for at, _ in marked] == [True]
        if rolls_back:
            self.handlers.rollback()
            return
        self.handlers.commit()
        reads.state[change.seq] = "done"
        assert self.handlers.execute(*reads.store.take([change], change)).fetchall() == [], "it is done"
        self.handlers.rollback()

    @precondition(lambda self: self.keys)
    @rule(which=st.integers(0, 1), data=st.data(), ends=st.sampled_from(["stops", "is processed", "dies"]))
    def start_after_a_crash(self, which: int, data: st.DataObject, ends: str) -> None:
        reads = self.reads[which]
        rows = self._fresh(reads)
        if not rows:
            return
        change = data.draw(st.sampled_from(rows)).change
        assert self.run(reads.store.start(self.session, [change], ["work"])) == {change.id}
        if ends == "stops":
            self.run(reads.store.unstart(self.session, [change]))
            reads.state[change.seq] = "waiting"
        elif ends == "is processed":
            assert self.run(reads.store.settle(self.session, [Settlement(change, Processed())])).missed == 0
            reads.state[change.seq] = "done"
        else:
            reads.state[change.seq] = "waiting"

    @precondition(lambda self: any({"dead", "paused"} & {*reads.state.values()} for reads in self.reads))
    @rule(which=st.integers(0, 1), data=st.data())
    def retry_what_is_dead(self, which: int, data: st.DataObject) -> None:
        reads = self.reads[which]
        dead = [seq for seq, state in reads.state.items() if state in ("dead", "paused")]
        if not dead:
            return
        seq = data.draw(st.sampled_from(dead))
        self.db.execute(
            "UPDATE cdc_subscription_changes SET dead_at = NULL, next_attempt_at = now()"
            " WHERE subscription = %s AND seq = %s",
            [reads.number, seq],
        )
        reads.state[seq] = "waiting"

    @rule()
    @precondition(lambda self: self.keys)
    def the_default_one_settles_some(self) -> None:
        self.db.execute(
            "UPDATE entity_changes SET processed = true, processed_at = now() WHERE seq = ANY (%s) AND seq %% 3 <> 0",
            [list(self.keys)],
        )

    # --- what holds ------------------------------------------------------------------------------------------------

    @invariant()
    def each_reads_what_the_model_says(self) -> None:
        for reads in self.reads:
            found = {seq: state for seq, state in states_of(self.db, reads.number).items() if seq in self.keys}
            assert found == {seq: "dead" if state == "paused" else state for seq, state in reads.state.items()}
            rows = self._fresh(reads)
            fresh = sorted(seq for seq, state in reads.state.items() if state == "fresh")
            assert sorted(row.change.seq for row in rows) == fresh
            for row in rows:
                before = [seq for seq in reads.state if seq < row.change.seq and self.keys[seq] == row.change.entity_id]
                assert row.blocked == any(map(reads.holds, before))
            due = {row.change.seq: row.change for row in self._due(reads)}
            assert due.keys() == {seq for seq, state in reads.state.items() if state == "waiting"}
            assert all(change.requeued for change in due.values())

    @invariant()
    def what_a_position_has_passed_leaves_nothing_behind(self) -> None:
        assert left_behind(self.db) == []

    @invariant()
    def no_position_reaches_an_open_transaction(self) -> None:
        open_ = [seq for rows in self.pending.values() for seq, _ in rows]
        for reads in self.reads if open_ else ():
            passed = self.db.execute(
                "SELECT n FROM unnest(%s::bigint[]) AS open(n) JOIN cdc_positions AS p"
                " ON p.subscription = %s AND p.shard = %s AND p.seq >= n",
                [open_, reads.number, _SHARD],
            ).fetchall()
            assert passed == []


_OUTCOMES: Sequence[Outcome] = (
    Processed(),
    Processed(),
    Waiting(0.0, "RuntimeError: 1", summary="RuntimeError"),
    Dead("no"),
    Dead("no", pauses=True),
)


@pytest.fixture
def first(outbox: str) -> str:
    """An outbox whose indexes are there, so that the subscriptions of each sequence are made at once."""
    with psycopg.connect(outbox, autocommit=True) as db:
        Subscriptions("public").create(db, "first", start="now")
    return outbox


def test_positions_and_rows_say_what_the_model_says(first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subscription, "MOVING_MIN", 1)
    with psycopg.connect(first) as db:
        names = db.execute(
            "SELECT n::text FROM generate_series(1, 1000) AS n WHERE hashtext(n::text) & 63 = %s LIMIT %s",
            [_SHARD, _KEYS],
        ).fetchall()
    machine = type("MachineOfThisTest", (Machine,), {"dsn": first, "names": [name for (name,) in names]})
    run_state_machine_as_test(machine, settings=_MANY)


async def test_what_another_one_has_started_and_gives_back_is_never_behind_who_has_read_on(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    """Its session was lost, and it clears its records on a new one; meanwhile its shards have another owner."""
    made, _ = Subscriptions("public").create(outbox_db, "search", start="beginning")
    first, second = (
        SubscriptionStore("public", made, 16, EVERYTHING) for _ in range(2)
    )  # each has a process of its own
    for number in range(2):
        outbox_db.execute("SELECT publish_change('x', 'k', 'INSERT', jsonb_build_object('n', %s::int))", [number])
    session = await connect_async(outbox, application_name="cdc: test", session=SubscriptionStore.session)
    read_changes(session)
    try:
        earlier, later = (row.change for row in (await first.sweep(session, EVERY_SHARD)).rows)
        assert await first.start(session, [earlier], ["work"]) == {earlier.id}
        [row] = (await second.sweep(session, EVERY_SHARD)).rows
        assert (row.change.seq, row.blocked) == (later.seq, True)
        await first.unstart(session, [earlier])
        behind = Sweep(
            {**EVERY_SHARD.positions, later.shard: Position(later.seq, later.seq, await _next_xid(session))}, 1_000, 2
        )
        assert (await second.sweep(session, behind)).rows == [], "it has read on"
        [row] = (await second.fetch(session, [WakeUp(later.seq, later.shard)])).rows
        assert row.blocked
        due = (await second.due(session, range(SHARDS), 10)).rows
        assert [(row.change.seq, row.change.attempt, row.blocked) for row in due] == [(earlier.seq, 1, False)]
        assert await second.start(session, [due[0].change], ["work"]) == {earlier.id}
    finally:
        await session.close()


async def test_no_start_is_recorded_behind_a_change_of_its_key_that_another_session_has_taken(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    """It would wait and be due, where the one before it is fresh: nothing would hold it back."""
    made, _ = Subscriptions("public").create(outbox_db, "search", start="beginning")
    for key in ("k", "k", "other"):
        outbox_db.execute("SELECT publish_change('x', %s)", [key])
    async with reading(outbox, outbox_db, made) as reader:
        taken, behind, other = await reader.fresh()
        start = partial(reader.store.start, reader.session)
        with psycopg.connect(outbox) as handler:
            handler.execute(*reader.store.take([taken], taken))
            assert await start([taken, behind, other], ["work"] * 3) == {other.id}
        assert [change.seq for change in await reader.due()] == [other.seq]
        assert await start([taken, behind], ["work"] * 2) == {taken.id, behind.id}
        due = (await reader.store.due(reader.session, range(SHARDS), 10)).rows
        assert {row.change.seq: row.blocked for row in due} == {taken.seq: False, behind.seq: True, other.seq: False}


async def _next_xid(session: psycopg.AsyncConnection) -> int:
    [(next_xid,)] = await (await session.execute("SELECT txid_current() + 1")).fetchall()
    return int(next_xid)
