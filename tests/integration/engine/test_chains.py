"""Changes that handlers cause: who caused whom is recorded, and a loop ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg.rows import dict_row

import cdc
from cdc import testing
from cdc.core.admission import Row
from cdc.core.deferred_keys import KeyRead
from cdc.core.model import WakeUp
from cdc.core.read_planner import Sweep
from cdc.core.router import Router
from cdc.core.shard_cursor import Position
from cdc.postgres.outbox import Store
from tests.eventually import eventually_async
from tests.fix_consumer import consuming, metric, settled, states

_ROUND = "UPDATE counter SET n = n + 1 WHERE id = %s"
_STEP = "SELECT publish_change(%s, %s)"
_DEPTH = 3


@pytest.fixture
def counter(outbox_db: psycopg.Connection) -> psycopg.Connection:
    """A database with a tracked table in it."""
    outbox_db.execute("CREATE TABLE counter (id int PRIMARY KEY, n int)")
    outbox_db.execute(
        "CREATE TRIGGER capture AFTER INSERT OR UPDATE ON counter FOR EACH ROW EXECUTE FUNCTION capture_entity_change()"
    )
    return outbox_db


def _rows(db: psycopg.Connection) -> list[dict[str, Any]]:
    with db.cursor(row_factory=dict_row) as cursor:
        return cursor.execute("SELECT * FROM entity_changes ORDER BY seq").fetchall()


def _all_settled(db: psycopg.Connection) -> Any:
    async def check() -> bool:
        return settled(db)

    return eventually_async(check, what="every change processed or dead")


def _publish(db: psycopg.Connection, entity_type: str, entity_id: str, *, depth: int = 0) -> UUID:
    """A change with so many causes, of which none is in the table; its id."""
    with db.transaction():
        if depth:
            db.execute("SELECT set_config('cdc.cause', %s, true)", [f"{uuid4()},{depth - 1}"])
        [(seq,)] = db.execute(_STEP, [entity_type, entity_id]).fetchall()
        [(id_,)] = db.execute("SELECT id FROM entity_changes WHERE seq = %s", [seq]).fetchall()
    assert isinstance(id_, UUID)
    return id_


# --- a loop --------------------------------------------------------------------------------------------------------


async def _round(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
    await connection.execute(_ROUND, [change.entity_id])


def _round_in_thread(change: cdc.Change, connection: psycopg.Connection) -> None:
    connection.execute(_ROUND, [change.entity_id])


async def _rounds(changes: list[cdc.Change], connection: psycopg.AsyncConnection) -> None:
    for change in changes:
        await connection.execute(_ROUND, [change.entity_id])


def _rounds_in_thread(changes: list[cdc.Change], connection: psycopg.Connection) -> None:
    for change in changes:
        connection.execute(_ROUND, [change.entity_id])


@pytest.mark.parametrize("handler", [_round, _round_in_thread, _rounds, _rounds_in_thread])
async def test_a_handler_that_writes_what_it_listens_to_ends_as_a_dead_letter_that_says_why(
    handler: Callable[..., Any], outbox: str, counter: psycopg.Connection
) -> None:
    router = Router()
    router.on("counter", name="loop")(handler)
    router.on("other")(lambda change: None)
    counter.execute("INSERT INTO counter VALUES (7, 0)")
    for n in range(20):
        _publish(counter, "other", str(n))
    async with consuming(outbox, router, max_chain_depth=_DEPTH) as app:
        await _all_settled(counter)
        errors = metric(app.metrics.registry, "cdc_handler_errors_total", handler="loop", kind="depth")
    *ran, dead = [row for row in _rows(counter) if row["entity_type"] == "counter"]
    assert [row["depth"] for row in (*ran, dead)] == [0, 1, 2, 3, 4]
    assert [row["caused_by"] for row in (*ran, dead)] == [None, *(row["id"] for row in ran)]
    assert counter.execute("SELECT n FROM counter").fetchone() == (_DEPTH + 1,)
    assert states(counter) == {"processed": 20 + _DEPTH + 1, "dead": 1}
    assert (dead["dead_at"] is not None, dead["error_count"], errors) == (True, 1, 1)
    assert "a chain of 5 changes, deeper than max_chain_depth allows" in dead["last_error"]
    chain = " <- ".join([*["counter 7 UPDATE"] * 4, "counter 7 INSERT"])
    assert dead["last_error"].endswith(chain), dead["last_error"]


async def test_a_loop_that_goes_through_a_transaction_of_the_handlers_own_ends_too(
    outbox: str, counter: psycopg.Connection
) -> None:
    router = Router()

    @router.on("counter")
    async def handle(change: cdc.Change) -> None:
        async with await psycopg.AsyncConnection.connect(outbox) as connection:
            await connection.execute("SELECT set_config('cdc.cause', %s, true)", [change.cause])
            await connection.execute(_ROUND, [change.entity_id])

    counter.execute("INSERT INTO counter VALUES (7, 0)")
    await testing.drain(outbox, router, max_chain_depth=_DEPTH, allow_dead=True)
    assert states(counter) == {"processed": _DEPTH + 1, "dead": 1}


async def test_a_loop_of_two_types_names_both(outbox: str, outbox_db: psycopg.Connection) -> None:
    router = Router()

    @router.on("ping")
    @router.on("pong")
    async def answer(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
        other = "pong" if change.entity_type == "ping" else "ping"
        await connection.execute("SELECT publish_change(%s, %s, 'UPDATE')", [other, change.entity_id])

    _publish(outbox_db, "ping", "1")
    await testing.drain(outbox, router, max_chain_depth=2, allow_dead=True)
    told = _rows(outbox_db)[-1]["last_error"]
    assert told.endswith("pong 1 UPDATE <- ping 1 UPDATE <- pong 1 UPDATE <- ping 1 INSERT")


async def test_in_a_batch_only_the_changes_that_are_too_deep_are_refused(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    router, handled = Router(), list[Any]()

    @router.on("x", batch=50)
    async def handle(changes: list[cdc.Change]) -> None:
        handled.extend(change.entity_id for change in changes)

    for n in range(20):
        _publish(outbox_db, "x", str(n), depth=17 if n == 4 else n % 17)
    await testing.drain(outbox, router, allow_dead=True)
    assert sorted(handled, key=int) == [str(n) for n in range(20) if n != 4]
    assert states(outbox_db) == {"processed": 19, "dead": 1}


async def test_a_deep_change_that_nobody_handles_is_skipped_like_any_other(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    _publish(outbox_db, "x", "1", depth=99)
    await testing.drain(outbox, Router(), unhandled="discard")
    assert states(outbox_db) == {"processed": 1}


async def test_a_dead_letter_of_a_chain_runs_once_the_limit_is_raised_and_it_is_retried(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    router, attempts, told = Router(), [], []

    @router.on("x", dead="pause")
    async def handle(change: cdc.Change) -> None:
        attempts.append((change.depth, change.chain))

    @router.on_error
    def report(change: cdc.Change, error: BaseException) -> None:
        told.append(type(error).__name__)

    _publish(outbox_db, "x", "1", depth=17)
    for limit in (16, 16, 17):
        await testing.drain(outbox, router, max_chain_depth=limit, allow_dead=True)
        outbox_db.execute("SELECT reprocess_failed_actions(p_max_errors => 1)")
    assert attempts == [(17, None)]
    assert told == ["TooDeepError"] * 2
    assert states(outbox_db) == {"processed": 1}


# --- who caused whom -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_thread", [False, True])
async def test_what_a_transactional_handler_writes_and_publishes_is_caused_by_its_change(
    in_thread: bool, outbox: str, counter: psycopg.Connection
) -> None:
    router, seen = Router(), []
    insert = "INSERT INTO counter VALUES (%s, 0)"

    async def on_loop(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
        await connection.execute(insert, [change.entity_id])
        await connection.execute(_STEP, ["event", change.entity_id])

    def in_a_thread(change: cdc.Change, connection: psycopg.Connection) -> None:
        connection.execute(insert, [change.entity_id])
        connection.execute(_STEP, ["event", change.entity_id])

    router.on("x")(in_a_thread if in_thread else on_loop)

    @router.on("event")
    @router.on("counter")
    async def look(change: cdc.Change) -> None:
        seen.append((change.entity_type, change.entity_id, change.depth, change.caused_by))

    roots = {str(n): _publish(counter, "x", str(n)) for n in range(300)}
    await testing.drain(outbox, router, transactions=2, concurrency=4)
    [(transactions,)] = counter.execute("SELECT count(DISTINCT xmin::text) FROM counter").fetchall()
    assert transactions < len(roots), "some share a transaction, and each is the cause of its own writes"
    assert sorted(seen) == sorted((kind, key, 1, id_) for kind in ("counter", "event") for key, id_ in roots.items())


async def test_a_failed_attempt_leaves_no_change_and_the_next_one_has_the_same_cause(
    outbox: str, counter: psycopg.Connection
) -> None:
    router = Router()

    @router.on("x")
    async def handle(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
        await connection.execute(_STEP, ["event", change.entity_id])
        if change.attempt == 1:
            raise ValueError("no")

    root = _publish(counter, "x", "1")
    await testing.drain(outbox, router)
    assert [(row["caused_by"], row["depth"]) for row in _rows(counter)] == [(None, 0), (root, 1)]


async def test_of_a_transactional_batch_the_deepest_change_is_the_cause(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    """Else a loop could hide among the others of its batch, for ever one deep."""
    router, sizes = Router(), []

    @router.on("x", batch=10)
    async def handle(changes: list[cdc.Change], connection: psycopg.AsyncConnection) -> None:
        sizes.append(len(changes))
        await connection.execute(_STEP, ["event", "1"])

    ids = [_publish(outbox_db, "x", str(depth), depth=depth) for depth in (0, 5, 2)]
    await testing.drain(outbox, router)
    assert sizes == [3]
    assert [(row["caused_by"], row["depth"]) for row in _rows(outbox_db)[3:]] == [(ids[1], 6)]


@pytest.mark.parametrize("fails", [False, True])
async def test_the_next_transaction_of_the_same_connection_has_no_cause(
    fails: bool, outbox: str, outbox_db: psycopg.Connection
) -> None:
    router, lent = Router(), list[psycopg.AsyncConnection]()

    @router.on("x", max_attempts=1)
    async def handle(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
        lent.append(connection)
        await connection.execute(_STEP, ["event", "1"])
        if fails:
            raise ValueError("no")

    _publish(outbox_db, "x", "1")
    async with consuming(outbox, router, transactions=1, unhandled="discard"):
        await _all_settled(outbox_db)
        [connection] = lent
        async with connection.transaction():
            cursor = await connection.execute("SELECT current_setting('cdc.cause', true)")
            assert await cursor.fetchone() == ("",), "this very connection has had one"
            await connection.execute(_STEP, ["event", "2"])
    assert [row["depth"] for row in _rows(outbox_db) if row["entity_id"] == "2"] == [0]


# --- what is read --------------------------------------------------------------------------------------------------


async def _every_read(store: Store, reader: psycopg.AsyncConnection, row: dict[str, Any]) -> Sequence[Row]:
    """The change as each of the statements reads it."""
    wakeup = WakeUp(row["seq"], row["shard"])
    fetched = await store.fetch(reader, [wakeup])
    swept = await store.sweep(reader, Sweep({wakeup.shard: Position(floor=0, cursor=0, since=0)}, 10, 1))
    resume = KeyRead((row["entity_type"], row["entity_id"]), wakeup.shard, wakeup.seq)
    resumed = await store.read_keys(reader, [resume], 10)
    await reader.execute("UPDATE entity_changes SET next_attempt_at = now() WHERE seq = %s", [wakeup.seq])
    due = (await store.due(reader, [wakeup.shard], 10)).rows
    return [*fetched.rows, *swept.rows, *resumed[resume].rows, *due]


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (99, None),
        (4, None),
        (3, "x e UPDATE <- x d INSERT <- x c INSERT <- x b INSERT <- x a INSERT"),
        (2, "x e UPDATE <- x d INSERT <- x c INSERT <- x b INSERT <- ..."),
        (1, "x e UPDATE <- x d INSERT <- ..."),
    ],
)
async def test_every_read_returns_the_chain_of_what_is_too_deep_and_of_nothing_else(
    limit: int, expected: str | None, outbox: str, outbox_db: psycopg.Connection
) -> None:
    cause = ""
    for key in "abcde":
        with outbox_db.transaction():
            outbox_db.execute("SELECT set_config('cdc.cause', %s, true)", [cause])
            outbox_db.execute("SELECT publish_change('x', %s, %s)", [key, "UPDATE" if key == "e" else "INSERT"])
        last = _rows(outbox_db)[-1]
        cause = f"{last['id']},{last['depth']}"
    async with await psycopg.AsyncConnection.connect(outbox, autocommit=True) as reader:
        rows = await _every_read(Store("public", limit), reader, last)
    changes = [row.change for row in rows if row.change.entity_id == "e"]
    assert [(change.depth, change.chain) for change in changes] == [(4, expected)] * 4


async def test_a_chain_whose_causes_were_removed_says_that_there_was_more(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    _publish(outbox_db, "x", "k" * 1000, depth=17)
    [row] = _rows(outbox_db)
    async with await psycopg.AsyncConnection.connect(outbox, autocommit=True) as reader:
        page = await Store("public").fetch(reader, [WakeUp(row["seq"], row["shard"])])
    assert [read.change.chain for read in page.rows] == [f"x {'k' * 63} INSERT <- ..."]
