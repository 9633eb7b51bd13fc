"""``--only`` and ``--except``: changes of other types are left exactly as they are, and are in nobody's way."""

from __future__ import annotations

from functools import partial
from typing import Any

import psycopg
import pytest

import cdc
from cdc import testing
from cdc.app.application import App
from cdc.core import failpoints
from cdc.core.errors import UsageError
from cdc.core.type_filter import TypeFilter
from cdc.postgres.outbox import Store
from tests.eventually import eventually_async
from tests.fix_consumer import consuming

_PUBLISH = "SELECT publish_change(%s, %s)"
_MANY = """
    INSERT INTO entity_changes (table_name, operation, entity_id, entity_type)
    SELECT 'x', 'INSERT', %s, 'old' FROM generate_series(1, %s)
"""
_DOCUMENTED = '{"table" : "x", "operation" : "INSERT", "entity_type" : "x"}'
_OLD = "SELECT seq, xmin::text, processed, error_count FROM entity_changes WHERE entity_type = 'old' ORDER BY seq"


def _router() -> cdc.Router:
    router = cdc.Router()
    router.on("*", name="any")(lambda change: None)
    return router


def _states(db: psycopg.Connection) -> dict[str, int]:
    """By type how many are not processed."""
    return dict(
        db.execute("SELECT entity_type, count(*) FROM entity_changes WHERE NOT processed GROUP BY 1").fetchall()
    )


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("choice", [{"only": ["new", "newer"]}, {"except_": ["old"]}])
async def test_other_types_are_left_untouched_and_hold_up_nothing(
    stream: bool, choice: dict[str, Any], outbox: str, outbox_db: psycopg.Connection
) -> None:
    outbox_db.execute(_MANY, ["k", 2_000])
    outbox_db.execute("UPDATE entity_changes SET error_count = 2, next_attempt_at = now() WHERE seq <= 5")
    before = outbox_db.execute(_OLD).fetchall()
    async with consuming(outbox, _router(), stream=stream, window=100, poll_interval=0.05, **choice) as app:
        for entity_type in ("new", "newer"):
            for key in range(50):
                outbox_db.execute(_PUBLISH, [entity_type, str(key)])
                outbox_db.execute(_PUBLISH, ["old", str(key)])

        async def done() -> bool:
            return _states(outbox_db) == {"old": 2_100}

        await eventually_async(done)
        assert app.consumer.lifecycle.in_service
    assert outbox_db.execute(_OLD).fetchall()[:2_000] == before


async def test_their_own_retries_are_made_though_others_have_retries(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    router, tries = cdc.Router(), []

    @router.on("new")
    def fail_twice(change: cdc.Change) -> None:
        tries.append(change.attempt)
        if change.attempt < 3:
            raise ValueError

    outbox_db.execute(_MANY, ["k", 100])
    outbox_db.execute("UPDATE entity_changes SET error_count = 1, next_attempt_at = now()")
    outbox_db.execute(_PUBLISH, ["new", "1"])
    async with consuming(outbox, router, only=["new"], stream=False, backoff_base=0.01):

        async def done() -> bool:
            return _states(outbox_db) == {"old": 100}

        await eventually_async(done)
    assert tries == [1, 2, 3]


async def test_types_may_be_taken_over_one_after_the_other_and_nothing_is_lost(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    for entity_type in ("a", "b", "c"):
        outbox_db.execute(_PUBLISH, [entity_type, "1"])

    async def done(left: set[str]) -> bool:
        return set(_states(outbox_db)) == left

    for only, left in ((["a"], {"b", "c"}), (["a", "b"], {"c"}), ([], set())):
        async with consuming(outbox, _router(), only=only, stream=False, poll_interval=0.05):
            await eventually_async(partial(done, left))


async def test_a_type_that_nobody_handles_is_refused_because_it_would_be_marked_processed(outbox: str) -> None:
    router = cdc.Router()
    router.on("reaction")(lambda change: None)
    with pytest.raises(UsageError, match="only 'reacton', but no handler"):
        await testing.drain(outbox, router, only=["reacton"])


def test_the_figures_of_the_outbox_are_those_of_the_types_that_are_ours(outbox_db: psycopg.Connection) -> None:
    outbox_db.execute(_MANY, ["k", 100])
    outbox_db.execute("UPDATE entity_changes SET changed_at = now() - interval '1 day'")
    outbox_db.execute("UPDATE entity_changes SET next_attempt_at = now() WHERE seq BETWEEN 1 AND 10")
    outbox_db.execute("UPDATE entity_changes SET dead_at = now() - interval '1 day' WHERE seq BETWEEN 11 AND 20")
    for key in range(3):
        outbox_db.execute(_PUBLISH, ["new", str(key)])
    outbox_db.execute("UPDATE entity_changes SET dead_at = now() WHERE entity_type = 'new' AND entity_id = '0'")
    for scope in (TypeFilter(("new",), include=True), TypeFilter(("old",))):
        ours = Store("public", scope=scope).figures(outbox_db)
        assert (ours.fresh, ours.waiting, ours.dead, ours.blocked_keys) == (2, 0, 1, 0)
        assert 0 < ours.oldest_ready_age_s < 3600
        assert 0 < ours.dead_age_s < 3600
    all_of_it = Store("public").figures(outbox_db)
    assert (all_of_it.fresh, all_of_it.waiting, all_of_it.dead) == (82, 10, 11)
    assert 86_400 <= all_of_it.dead_age_s < 90_000


async def test_constant_wake_ups_do_not_keep_a_sweep_from_getting_beyond_the_others(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    # In each shard more than a page looks at.
    outbox_db.execute(
        "INSERT INTO entity_changes (table_name, operation, entity_id, entity_type)"
        " SELECT 'x', 'INSERT', n::text, 'old' FROM generate_series(1, 40000) AS n"
    )
    outbox_db.execute(
        "INSERT INTO entity_changes (table_name, operation, entity_id, entity_type) VALUES ('x', 'INSERT', 'k', 'new')"
    )
    async with consuming(outbox, _router(), only=["new"], stream=False) as app:
        # Before each read.
        failpoints.install(lambda point: app.consumer.sweep_now() if point == "fetch.before_rows" else None)
        try:

            async def done() -> bool:
                return _states(outbox_db) == {"old": 40_000}

            await eventually_async(done)
        finally:
            failpoints.install(None)


async def test_what_the_documented_trigger_sends_makes_a_consumer_look_soon(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    async with consuming(outbox, _router(), stream=False, poll_interval=3600) as app:

        async def listens() -> bool:
            return app.status.listening

        await eventually_async(listens)
        await eventually_async(lambda: _idle(app))
        outbox_db.execute(_MANY, ["k", 1])
        outbox_db.execute("SELECT pg_notify('entity_change', %s)", [_DOCUMENTED])

        async def done() -> bool:
            return _states(outbox_db) == {}

        await eventually_async(done)


async def _idle(app: App) -> bool:
    return app.consumer.lifecycle.in_service and not app.status.consumer.catching_up
