"""Transactional changes that share a transaction where many of them wait."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
import pytest

import cdc
from cdc.core.errors import UsageError
from cdc.core.router import Router
from tests.eventually import eventually_async
from tests.fix_consumer import consuming, settled, states

_QUICK: dict[str, Any] = {"backoff_base": 0.01, "backoff_cap": 0.05, "transactions": 2, "concurrency": 4}
_COUNT, _KEYS = 600, 150

_Act = Callable[[cdc.Change], str | None]
"""What a handler does besides leaving its effect: a statement it runs, or an error it raises."""


@pytest.fixture
def effects(outbox_db: psycopg.Connection) -> psycopg.Connection:
    outbox_db.execute("CREATE TABLE effect (number bigint GENERATED ALWAYS AS IDENTITY, seq bigint, key text)")
    outbox_db.execute("SELECT publish_change('x', (n %% %s)::text) FROM generate_series(1, %s) AS n", [_KEYS, _COUNT])
    return outbox_db


def _router(in_thread: bool, act: _Act = lambda _: None, **options: Any) -> Router:
    router = Router()
    effect = "INSERT INTO effect (seq, key) VALUES (%s, %s)"

    async def on_loop(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
        await connection.execute(effect, [change.seq, change.entity_id])
        if statement := act(change):
            await connection.execute(statement)

    def in_a_thread(change: cdc.Change, connection: psycopg.Connection) -> None:
        connection.execute(effect, [change.seq, change.entity_id])
        if statement := act(change):
            connection.execute(statement)

    router.on("x", **options)(in_a_thread if in_thread else on_loop)
    return router


async def _work_off(outbox: str, db: psycopg.Connection, router: Router) -> None:
    async with consuming(outbox, router, unhandled="discard", **_QUICK):

        async def check() -> bool:
            return settled(db)

        await eventually_async(check, what="every change processed or dead")


def _transactions(db: psycopg.Connection) -> int:
    [(count,)] = db.execute("SELECT count(DISTINCT xmin::text) FROM effect").fetchall()
    return int(count)


def _assert_each_once_and_in_order(db: psycopg.Connection, expected: int) -> None:
    rows = db.execute("SELECT seq, key FROM effect ORDER BY number").fetchall()
    assert len({seq for seq, _ in rows}) == len(rows) == expected
    for key in {key for _, key in rows}:
        seqs = [seq for seq, of in rows if of == key]
        assert seqs == sorted(seqs), key


@pytest.mark.parametrize("in_thread", [False, True])
async def test_where_many_wait_several_changes_share_a_transaction(
    in_thread: bool, outbox: str, effects: psycopg.Connection
) -> None:
    await _work_off(outbox, effects, _router(in_thread))
    assert states(effects) == {"processed": _COUNT}
    _assert_each_once_and_in_order(effects, _COUNT)
    assert _transactions(effects) < 0.9 * _COUNT  # of a slow machine, too; 0.03 where nothing else runs
    # Each still commits with its own mark.
    assert effects.execute(
        "SELECT count(*) FROM effect JOIN entity_changes AS c USING (seq) WHERE effect.xmin = c.xmin"
    ).fetchone() == (_COUNT,)


async def test_on_request_each_has_a_transaction_of_its_own(outbox: str, effects: psycopg.Connection) -> None:
    await _work_off(outbox, effects, _router(False, group=1))
    assert _transactions(effects) == _COUNT


@pytest.mark.parametrize("in_thread", [False, True])
async def test_the_failure_of_one_undoes_the_group_and_costs_the_others_no_attempt(
    in_thread: bool, outbox: str, effects: psycopg.Connection
) -> None:
    def act(change: cdc.Change) -> str | None:
        match change.seq % 50:
            case 0:
                raise ValueError("no")
            case 1 if change.attempt == 1:
                return "SELECT 1 / 0"
            case 2 if change.attempt == 1:
                raise cdc.Retry(after=0)
            case 3:
                raise cdc.Discard("not for us")
        return None

    await _work_off(outbox, effects, _router(in_thread, act))
    dead, again, discarded = _COUNT // 50, 2 * _COUNT // 50, _COUNT // 50
    assert states(effects) == {"processed": _COUNT - dead, "dead": dead}
    _assert_each_once_and_in_order(effects, _COUNT - dead - discarded)
    assert effects.execute(
        "SELECT count(*) FILTER (WHERE error_count = 3), count(*) FILTER (WHERE error_count = 1),"
        " count(*) FILTER (WHERE error_count = 0) FROM entity_changes"
    ).fetchone() == (dead, again, _COUNT - dead - again)


@pytest.mark.parametrize("in_thread", [False, True])
async def test_when_one_ends_the_transaction_nothing_of_its_group_is_done_twice(
    in_thread: bool, outbox: str, effects: psycopg.Connection
) -> None:
    """What it committed of the others has no mark, so they must not run again: all of the group are dead letters."""
    ended = _COUNT - 100
    await _work_off(outbox, effects, _router(in_thread, lambda c: "COMMIT" if c.seq == ended else None))
    _assert_each_once_and_in_order(
        effects,
        effects.execute("SELECT count(DISTINCT seq) FROM effect").fetchone()[0],
    )
    told = effects.execute("SELECT seq, last_error FROM entity_changes WHERE dead_at IS NOT NULL").fetchall()
    assert ended in [seq for seq, _ in told]
    assert all("ended the transaction it was given" in error for _, error in told)
    assert states(effects)["dead"] + states(effects)["processed"] == _COUNT


@pytest.mark.parametrize("in_thread", [False, True])
@pytest.mark.parametrize("first", [1, _COUNT // 2])
async def test_what_one_of_a_group_writes_is_caused_by_that_one(
    first: int, in_thread: bool, outbox: str, effects: psycopg.Connection
) -> None:
    """Whether the handler writes to a captured table from the beginning, or when its groups have grown."""
    effects.execute("CREATE TABLE note (id bigint PRIMARY KEY)")
    effects.execute(
        "CREATE TRIGGER capture AFTER INSERT ON note FOR EACH ROW EXECUTE FUNCTION capture_entity_change('note')"
    )

    def act(change: cdc.Change) -> str | None:
        return f"INSERT INTO note VALUES ({change.seq})" if change.seq >= first else None

    await _work_off(outbox, effects, _router(in_thread, act))
    assert effects.execute("SELECT count(*) FROM note").fetchone() == (_COUNT - first + 1,)
    _assert_each_once_and_in_order(effects, _COUNT)
    wrong = effects.execute(
        "SELECT count(*) FROM entity_changes AS n LEFT JOIN entity_changes AS x"
        " ON x.id = n.caused_by AND x.seq::text = n.entity_id WHERE n.entity_type = 'note' AND x.id IS NULL"
    ).fetchone()
    assert wrong == (0,)


def test_only_a_transaction_for_one_change_can_be_shared() -> None:
    router = Router()
    with pytest.raises(UsageError, match="group=5"):
        router.on("x", group=5)(lambda change: None)
    with pytest.raises(UsageError, match="group=5"):
        router.on("x", group=5)(lambda changes, connection: None)
