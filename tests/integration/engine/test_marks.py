"""What the server refuses to mark is that change's business; what cannot be marked now is kept, not handled again."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

import cdc
from cdc.app.application import App
from cdc.core.router import Router
from cdc.postgres import migrations
from tests.eventually import eventually_async
from tests.fix_consumer import consuming, metric, settled, states
from tests.fix_db import drop_database

_QUICK: dict[str, Any] = {"backoff_base": 0.01, "backoff_cap": 0.05, "max_attempts": 2}


class Calls:
    """A router with two types, good and bad, and who was called how often."""

    def __init__(self, text: str = "no") -> None:
        self.router = Router()
        self.counts = Counter[int]()

        @self.router.on("good")
        async def good(change: cdc.Change) -> None:
            self.counts[change.seq] += 1

        @self.router.on("bad")
        async def bad(change: cdc.Change) -> None:
            self.counts[change.seq] += 1
            raise RuntimeError(text)

        @self.router.on("sync")
        def sync(change: cdc.Change) -> None:
            self.counts[change.seq] += 1


def _publish(db: psycopg.Connection, entity_type: str, entity_id: str = "1") -> int:
    [(seq,)] = db.execute("SELECT publish_change(%s, %s)", [entity_type, entity_id]).fetchall()
    return int(seq)


async def _until_settled(db: psycopg.Connection) -> None:
    async def done() -> bool:
        return settled(db)

    await eventually_async(done, what="every change processed or dead")


async def _counted(app: App, name: str) -> None:
    async def counted() -> bool:
        return metric(app.metrics.registry, name) > 0

    await eventually_async(counted, what=name)


_END_SESSION = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE application_name = 'cdc: shards' AND datname = current_database()
"""


def _row(db: psycopg.Connection, seq: int) -> tuple[bool, bool, int, str | None]:
    row = db.execute(
        "SELECT processed, dead_at IS NOT NULL, error_count, last_error FROM entity_changes WHERE seq = %s", [seq]
    ).fetchone()
    assert row is not None
    return row


@pytest.fixture(params=["LATIN1", "SQL_ASCII"])
def encoded(admin_dsn: str, request: pytest.FixtureRequest) -> Iterator[str]:
    """The DSN of an outbox in a database of this encoding."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    create = "CREATE DATABASE {} ENCODING {} LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0"
    with psycopg.connect(admin_dsn, autocommit=True) as admin:
        admin.execute(sql.SQL(create).format(sql.Identifier(name), sql.Literal(request.param)))
        dsn = make_conninfo(admin_dsn, dbname=name, client_encoding="utf8")
        with psycopg.connect(dsn, autocommit=True) as connection:
            migrations.install(connection, "public")
        yield dsn
        drop_database(admin, name)


async def test_an_error_text_that_the_encoding_cannot_hold_is_written_with_escapes(encoded: str) -> None:
    calls = Calls("Zahlung gescheitert \u2717")
    with psycopg.connect(encoded, autocommit=True) as db:
        bad, good = _publish(db, "bad"), _publish(db, "good")
        async with consuming(encoded, calls.router, **_QUICK) as app:
            await _until_settled(db)
            assert metric(app.metrics.registry, "cdc_interruptions_total") == 0
        *state, error = _row(db, bad)
        assert (state, error.split("\n")[0]) == ([False, True, 2], "RuntimeError: Zahlung gescheitert \\u2717")
    assert calls.counts == {bad: 2, good: 1}


async def test_a_mark_that_the_table_refuses_makes_its_change_a_dead_letter_and_no_other(
    outbox: str, outbox_db: psycopg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever refuses: here a constraint of somebody else's."""
    seqs = [_publish(outbox_db, "good", str(n)) for n in range(200)]
    poison = seqs[77]
    outbox_db.execute(
        sql.SQL("ALTER TABLE entity_changes ADD CONSTRAINT theirs CHECK (NOT (processed AND seq = {}))").format(poison)
    )
    calls = Calls()
    async with consuming(outbox, calls.router) as app:
        await _until_settled(outbox_db)
        assert metric(app.metrics.registry, "cdc_rows_refused_total", step="mark") == 1
        assert metric(app.metrics.registry, "cdc_interruptions_total") == 0
    assert calls.counts == dict.fromkeys(seqs, 1)
    assert states(outbox_db) == {"processed": 199, "dead": 1}
    _, _, failures, words = _row(outbox_db, poison)
    assert failures == 1
    assert words is not None
    assert words.startswith("its handler returned, but the database refused the mark: new row for relation")
    assert "refuses the mark of change" in caplog.text


async def test_a_row_that_refuses_every_mark_keeps_its_own_key_and_nothing_else(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    poison, behind = _publish(outbox_db, "good"), _publish(outbox_db, "good")
    outbox_db.execute(
        sql.SQL(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
            " RAISE EXCEPTION 'not {}'; END $$;"
            "CREATE TRIGGER refuse BEFORE UPDATE ON entity_changes FOR EACH ROW WHEN (OLD.seq = {})"
            " EXECUTE FUNCTION refuse()"
        ).format(poison, poison)
    )
    calls = Calls()
    async with consuming(outbox, calls.router) as app:
        innocents = [_publish(outbox_db, "good", str(n)) for n in range(2, 50)]

        async def others_are_marked() -> bool:
            return states(outbox_db).get("processed") == len(innocents)

        await eventually_async(others_are_marked, what="the innocent ones marked")

        async def known() -> bool:
            return app.status.consumer.held_up_s > 0

        await eventually_async(known)
        assert _row(outbox_db, poison)[:2] == _row(outbox_db, behind)[:2] == (False, False)
    assert calls.counts == dict.fromkeys([poison, behind, *innocents], 1)


async def test_a_locked_row_delays_its_own_key_and_no_handler_is_called_again(
    outbox: str, outbox_db: psycopg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    locked, behind = _publish(outbox_db, "good"), _publish(outbox_db, "good")
    innocents = [_publish(outbox_db, "good", str(n)) for n in range(2, 100)]
    calls = Calls()
    with psycopg.connect(outbox, application_name="somebody") as other:
        other.execute("SELECT FROM entity_changes WHERE seq = %s FOR UPDATE", [locked])
        async with consuming(outbox, calls.router) as app:

            async def others_are_marked() -> bool:
                return states(outbox_db).get("processed") == len(innocents)

            await eventually_async(others_are_marked, what="the innocent ones marked")
            later = [_publish(outbox_db, "good", str(n)) for n in range(100, 200)]

            async def later_are_marked() -> bool:
                return states(outbox_db).get("processed") == len(innocents) + len(later)

            await eventually_async(later_are_marked, what="those marked that came later")

            async def told() -> bool:
                return "are delayed" in caplog.text

            await eventually_async(told, what="the log says so")
            assert f"blocked by: pid {other.info.backend_pid} (somebody)" in caplog.text
            assert app.status.consumer.held_up_s > 0
            other.rollback()
            await _until_settled(outbox_db)
            assert metric(app.metrics.registry, "cdc_settle_delayed_total") > 0
            assert metric(app.metrics.registry, "cdc_interruptions_total") == 0

            async def free() -> bool:
                return app.status.consumer.held_up_s == 0

            await eventually_async(free)
    assert calls.counts == dict.fromkeys([locked, behind, *innocents, *later], 1)


async def test_a_locked_table_delays_all_marks_and_no_handler_is_called_again(
    outbox: str, outbox_db: psycopg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    """As CREATE INDEX locks it: reads go on."""
    seqs = [_publish(outbox_db, "good", str(n)) for n in range(500)]
    calls = Calls()
    with psycopg.connect(outbox, application_name="create index") as other:
        other.execute("LOCK TABLE entity_changes IN SHARE MODE")
        async with consuming(outbox, calls.router):

            async def tried_again() -> bool:
                return len(calls.counts) == 500 and "are delayed" in caplog.text

            await eventually_async(tried_again, what="all were handled, and their marks are delayed")
            assert "(create index)" in caplog.text
            other.rollback()
            await _until_settled(outbox_db)
    assert calls.counts == dict.fromkeys(seqs, 1)


@pytest.mark.parametrize("entity_type", ["good", "bad"])
async def test_outcomes_that_are_known_outlive_the_session_and_are_marked_on_the_next_one(
    outbox: str, outbox_db: psycopg.Connection, entity_type: str
) -> None:
    seqs = [_publish(outbox_db, entity_type, str(n)) for n in range(100)]
    calls = Calls()
    with psycopg.connect(outbox) as other:
        other.execute("LOCK TABLE entity_changes IN SHARE MODE")
        async with consuming(outbox, calls.router, max_attempts=1) as app:
            await _counted(app, "cdc_settle_delayed_total")
            outbox_db.execute(_END_SESSION)
            await _counted(app, "cdc_interruptions_total")
            other.rollback()
            await _until_settled(outbox_db)
    assert calls.counts == dict.fromkeys(seqs, 1)
    assert states(outbox_db) == {"processed" if entity_type == "good" else "dead": 100}
    assert {_row(outbox_db, seq)[2] for seq in seqs} == {0 if entity_type == "good" else 1}


async def test_outcomes_of_a_shard_that_somebody_else_has_had_meanwhile_are_dropped(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    seq = _publish(outbox_db, "good")
    calls = Calls()
    with psycopg.connect(outbox) as other:
        other.execute("LOCK TABLE entity_changes IN SHARE MODE")
        async with consuming(outbox, calls.router) as app:
            await _counted(app, "cdc_settle_delayed_total")
            outbox_db.execute("UPDATE cdc_shards SET owner = gen_random_uuid()")
            outbox_db.execute(_END_SESSION)
            await _counted(app, "cdc_interruptions_total")
            other.rollback()
            await _until_settled(outbox_db)
    assert calls.counts[seq] == 2, "handled again, as whoever had it may not have done so"
    assert states(outbox_db) == {"processed": 1}
