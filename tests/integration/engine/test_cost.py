"""What a change costs on the wire and in the table, counted, not timed.

What was counted stands beside each bound. The bounds leave room for slow machines, where batches are smaller.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import psycopg
import pytest

import cdc
from cdc.app.application import App
from cdc.core.model import SHARDS
from cdc.core.router import Router
from cdc.engine import settler
from cdc.observability.snapshots import Role
from cdc.postgres.lent import Lent, begin, commit, roll_back
from cdc.postgres.script import run
from tests.bench import calls
from tests.bench.database import ROWS, preload
from tests.eventually import eventually, eventually_async
from tests.fix_consumer import consuming, metric
from tests.fix_tally import Passed, Tally

_CHANGES = 4_000
_TIMERS: dict[str, Any] = {"sweep_interval": 600.0, "poll_interval": 60.0}
"""They do not come round meanwhile, however slow the machine is."""
_TABLE = "CREATE TABLE note (id int PRIMARY KEY, body text)"
_TRACK = "CREATE TRIGGER t AFTER INSERT ON note FOR EACH ROW EXECUTE FUNCTION capture_entity_change()"
_READ = """
SELECT t.seq_tup_read, sum(i.idx_tup_read)::bigint
FROM pg_stat_user_tables AS t JOIN pg_stat_user_indexes AS i USING (relid)
WHERE relid = 'entity_changes'::regclass AND t.n_tup_upd >= %s
GROUP BY 1
"""


@pytest.fixture
def noop() -> Router:
    router = Router()

    @router.on("*")
    async def do_nothing(change: cdc.Change) -> None:
        pass

    return router


@pytest.fixture
async def working(tally: Tally, outbox_db: psycopg.Connection, noop: Router) -> AsyncIterator[App]:
    """A consumer behind the tally that streams and has handled a change, so that what a start costs is over."""
    outbox_db.execute(_TABLE)
    outbox_db.execute(_TRACK)
    async with consuming(tally.dsn, noop, **_TIMERS) as app:

        async def live() -> bool:
            return app.status.role is Role.STREAMING and app.status.consumer.live_shards == SHARDS

        await eventually_async(live, what="the shards to be read by number")
        outbox_db.execute("INSERT INTO note VALUES (0, 'a row')")
        await until_processed(app, 1)
        yield app


async def until_processed(app: App, changes: int) -> None:
    """Asks the consumer, not the table: what is read there is counted."""

    async def done() -> bool:
        return metric(app.metrics.registry, "cdc_settle_changes_sum") >= changes

    await eventually_async(done, within_s=60, what=f"{changes} changes processed")


def a_change(passed: Passed, changes: int) -> tuple[float, float]:
    """Statements and bytes both ways."""
    return passed.statements / changes, (passed.sent + passed.received) / changes


async def test_a_change_among_many_costs_a_hundredth_of_a_statement(
    working: App, tally: Tally, outbox_db: psycopg.Connection
) -> None:
    def received() -> int:
        assert working.status.stream is not None
        return working.status.stream.messages

    before, messages = tally.passed, received()
    outbox_db.execute("INSERT INTO note SELECT n, 'a row' FROM generate_series(1, %s) AS n", [_CHANGES])
    # A busy server sends them a few at a time, and a change then comes nearly alone: the consumer's event loop stands
    # still until all are there.
    eventually(lambda: received() >= messages + _CHANGES, within_s=60, what="all wake-ups")
    await until_processed(working, _CHANGES + 1)
    statements, bytes_ = a_change(tally.passed.since(before), _CHANGES)
    assert statements < 0.02  # 0.005
    assert bytes_ < 600  # 427: the row itself is some 300, the wake-up 75


async def test_a_change_that_comes_alone_costs_a_fetch_and_a_mark(
    working: App, tally: Tally, outbox_db: psycopg.Connection
) -> None:
    before = tally.passed
    for number in range(1, 101):
        outbox_db.execute("INSERT INTO note VALUES (%s, 'a row')", [number])
        await until_processed(working, number + 1)
    statements, bytes_ = a_change(tally.passed.since(before), 100)
    assert statements < 3  # 2.01: a look at the timers now and then
    assert bytes_ < 2_000  # 1,370: half of it describes the columns


@pytest.mark.parametrize("end", [commit, roll_back])
def test_to_begin_a_transaction_to_end_it_and_to_reset_its_session_costs_two_messages(tally: Tally, end: Any) -> None:
    with Lent.connect(tally.dsn, autocommit=True) as connection:
        before = tally.passed
        run(begin(connection))
        run(end(connection))
        assert connection.is_reset
        assert tally.passed.since(before).statements == 2


# Of a statement some six are ours, which were seventy of psycopg's (postgres/watched).
# Counted on Python 3.11, where a comprehension is a call, too: 192, 215, 326. The least of some, as timers come round,
# and an answer that takes long is waited for in steps.
@pytest.mark.parametrize(("handler", "bound"), [("async", 194), ("thread", 222), ("transactional", 336)])
async def test_a_change_that_comes_alone_makes_so_many_calls(
    outbox_db: psycopg.Connection, handler: str, bound: int
) -> None:
    outbox_db.execute(ROWS)
    outbox_db.execute(
        "CREATE TRIGGER t AFTER INSERT ON bench_rows FOR EACH ROW EXECUTE FUNCTION capture_entity_change()"
    )
    counted = await calls.count(outbox_db, handler)
    assert min(map(Counter.total, counted)) <= bound


async def test_changes_that_end_shortly_after_one_another_share_a_mark(
    working: App, outbox_db: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settler, "_PAUSE_S", 0.5)  # shortly, for a machine of any speed
    registry = working.metrics.registry
    before = metric(registry, "cdc_settle_changes_count")
    for number in range(1, 101):
        outbox_db.execute("INSERT INTO note VALUES (%s, 'a row')", [number])

        async def handled(so_many: int = number + 1) -> bool:
            return metric(registry, "cdc_changes_handled_total") == so_many

        await eventually_async(handled, what="it is handled, whether marked or not")
    await until_processed(working, 101)
    assert metric(registry, "cdc_settle_changes_count") - before < 50  # 7


async def test_a_backlog_is_read_through_indexes_once(outbox: str, outbox_db: psycopg.Connection, noop: Router) -> None:
    preload(outbox_db, changes=_CHANGES, keys=100)
    async with consuming(outbox, noop, **_TIMERS) as app:
        await until_processed(app, _CHANGES)
    # What a session has read is known when it has ended.
    [(whole, by_index)] = eventually(lambda: outbox_db.execute(_READ, [_CHANGES]).fetchall(), what="statistics")
    assert whole == 0
    # 5.0: a mark finds it, passes at the start see it, the collector counts it. A busy machine makes more passes, up to
    # 8 were seen; to walk what is processed would take hundreds.
    assert by_index / _CHANGES < 12
