"""A change that cannot be read is a dead letter by its number; all else is handled, each once."""

from __future__ import annotations

import json
import uuid
from collections import Counter
from collections.abc import Iterator

import psycopg
import pytest
from click.testing import CliRunner
from psycopg import sql
from psycopg.conninfo import make_conninfo

import cdc
from cdc import testing
from cdc.cli import cdc as root_command
from cdc.core.router import Router
from cdc.engine import shadow
from cdc.postgres import migrations
from cdc.postgres.outbox import READ_LIMITS
from tests.commands import done
from tests.eventually import eventually_async
from tests.fix_consumer import consuming, metric, settled, states
from tests.fix_db import drop_database

_BAD_BYTE = "convert_from('\\xff'::bytea, 'SQL_ASCII')"
_UNREADABLE = {
    "payload": f"SELECT publish_change('x', 'bad', new_data => jsonb_build_object('a', 'b' || {_BAD_BYTE}))",
    "key": f"SELECT publish_change('x', 'b' || {_BAD_BYTE})",
    "type": f"SELECT publish_change('b' || {_BAD_BYTE}, 'bad')",
    "operation": "INSERT INTO entity_changes (table_name, entity_type, entity_id, operation)"
    " VALUES ('x', 'x', 'bad', repeat('MERGE', 1000)) RETURNING seq",
}
_WORDS = dict.fromkeys(_UNREADABLE, "[22021]") | {
    "operation": "this version cannot read it: its operation is none that this version knows [DataError]"
}


@pytest.fixture
def ascii_dsn(admin_dsn: str) -> Iterator[str]:
    """The DSN of an outbox in a database without an encoding."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    create = "CREATE DATABASE {} ENCODING 'SQL_ASCII' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0"
    with psycopg.connect(admin_dsn, autocommit=True) as admin:
        admin.execute(sql.SQL(create).format(sql.Identifier(name)))
        dsn = make_conninfo(admin_dsn, dbname=name, client_encoding="utf8")
        with psycopg.connect(dsn, autocommit=True) as connection:
            migrations.install(connection, "public")
        yield dsn
        drop_database(admin, name)


class Calls:
    """Handlers of every type, and how often they were called for what."""

    def __init__(self) -> None:
        self.router = Router()
        self.counts = Counter[int]()

        @self.router.on("*")
        async def any_type(change: cdc.Change) -> None:
            self.counts[change.seq] += 1


def _write(db: psycopg.Connection, statement: str) -> int:
    [(seq,)] = db.execute(statement.encode()).fetchall()
    return int(seq)


def _innocents(db: psycopg.Connection, count: int, key: str = "") -> list[int]:
    return [_write(db, f"SELECT publish_change('x', '{key or n}')") for n in range(count)]


async def _until_settled(db: psycopg.Connection, within_s: float = 60.0) -> None:
    async def done() -> bool:
        return settled(db)

    await eventually_async(done, within_s=within_s, what="every change processed or dead")


def _last_error(db: psycopg.Connection, seq: int) -> str:
    [(words, failures)] = db.execute(
        "SELECT last_error, error_count FROM entity_changes WHERE seq = %s AND dead_at IS NOT NULL AND NOT processed"
        " AND next_attempt_at IS NULL", [seq]
    ).fetchall()  # fmt: skip
    assert failures == 1
    return str(words)


@pytest.mark.parametrize("place", _UNREADABLE)
@pytest.mark.parametrize("backlog", [True, False], ids=["swept", "by wake-ups"])
async def test_a_byte_that_is_no_utf8_is_its_own_changes_business(
    ascii_dsn: str, place: str, backlog: bool, caplog: pytest.LogCaptureFixture
) -> None:
    calls = Calls()
    with psycopg.connect(ascii_dsn, autocommit=True) as db:

        def write() -> tuple[list[int], list[int]]:
            before = _innocents(db, 20)
            bad = [_write(db, _UNREADABLE[place]) for _ in range(2)]
            return bad, [*before, *_innocents(db, 20), *_innocents(db, 3, "bad")]

        bad, good = write() if backlog else ([], [])
        async with consuming(ascii_dsn, calls.router) as app:
            if not backlog:
                await _until_settled(db)
                bad, good = write()
            await _until_settled(db)
            assert metric(app.metrics.registry, "cdc_interruptions_total") == 0
            assert metric(app.metrics.registry, "cdc_rows_refused_total", step="read") == 2
        assert calls.counts == dict.fromkeys(good, 1)
        assert states(db) == {"processed": len(good), "dead": 2}
        for seq in bad:
            assert _WORDS[place] in _last_error(db, seq)
            assert caplog.text.count(f"change {seq} (") == 1


async def test_waiting_changes_and_keys_that_are_read_on_are_found_though_other_rows_are_refused(
    ascii_dsn: str,
) -> None:
    router, calls = Router(), Counter[int]()

    @router.on("*")
    async def any_type(change: cdc.Change) -> None:
        calls[change.seq] += 1
        if change.entity_id == "again" and change.attempt == 1:
            raise cdc.Retry(after=0.05)

    with psycopg.connect(ascii_dsn, autocommit=True) as db:
        one_key = _innocents(db, 100, "long")  # more than a lane holds beside others in a small window
        bad = _write(db, f"SELECT publish_change('x', 'long', new_data => jsonb_build_object('a', {_BAD_BYTE}))")
        one_key += _innocents(db, 100, "long")
        [again] = _innocents(db, 1, "again")
        waits = _write(db, _UNREADABLE["type"])
        db.execute("UPDATE entity_changes SET next_attempt_at = now() WHERE seq = %s", [waits])
        async with consuming(ascii_dsn, router, window=20, concurrency=10, backoff_base=0.01) as app:
            await _until_settled(db)
            assert metric(app.metrics.registry, "cdc_interruptions_total") == 0
        assert calls == dict.fromkeys(one_key, 1) | {again: 2}
        for seq in (bad, waits):
            assert "[22021]" in _last_error(db, seq)


async def test_what_is_locked_and_cannot_be_read_is_a_dead_letter_as_soon_as_it_is_free(ascii_dsn: str) -> None:
    calls = Calls()
    with psycopg.connect(ascii_dsn, autocommit=True) as db, psycopg.connect(ascii_dsn) as other:
        bad = _write(db, _UNREADABLE["payload"])
        good = _innocents(db, 5)
        other.execute("SELECT FROM entity_changes WHERE seq = %s FOR UPDATE", [bad])
        async with consuming(ascii_dsn, calls.router) as app:

            async def tried() -> bool:
                return app.consumer.lifecycle.answered_at is not None and bool(
                    db.execute("SELECT FROM pg_stat_activity WHERE application_name = 'cdc: reader'").fetchall()
                )

            await eventually_async(tried)
            other.rollback()
            await _until_settled(db)
            assert metric(app.metrics.registry, "cdc_interruptions_total") == 0
        assert calls.counts == dict.fromkeys(good, 1)
        assert "[22021]" in _last_error(db, bad)


async def test_a_document_whose_text_is_too_long_for_the_server_is_a_dead_letter_and_twenty_others_are_read(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    calls = Calls()
    good = _innocents(outbox_db, 10)
    numbers = "(SELECT jsonb_agg('1e131071'::numeric) FROM generate_series(1, 8300))"  # 60 kB in the table
    bad = _write(outbox_db, f"SELECT publish_change('x', 'bad', new_data => {numbers})")
    good += _innocents(outbox_db, 10)
    async with consuming(outbox, calls.router) as app:
        await _until_settled(outbox_db, within_s=180.0)  # each time that the server tries takes it some seconds
        assert metric(app.metrics.registry, "cdc_interruptions_total") == 0
    assert calls.counts == dict.fromkeys(good, 1)
    assert "[54000]" in _last_error(outbox_db, bad) or "[XX000]" in _last_error(outbox_db, bad)
    shown = json.loads(done(outbox, "outbox", "show", str(bad), "--json"))["change"]
    assert shown["state"] == "dead"
    refused = CliRunner().invoke(root_command, ["outbox", "show", str(bad), "--show-payload", "--dsn", outbox])
    assert refused.exit_code != 0
    assert "refuses to hand over the payload" in refused.output
    done(outbox, "outbox", "discard", str(bad))
    assert states(outbox_db) == {"processed": 21}


async def test_what_takes_longer_to_read_than_the_session_allows_is_a_dead_letter_and_twenty_others_are_read(
    outbox: str, outbox_db: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(READ_LIMITS, "statement_timeout", "700ms")
    calls = Calls()
    good = _innocents(outbox_db, 10)
    # Half a gigabyte as a text, which takes some seconds to write; 30 kB in the table.
    numbers = "(SELECT jsonb_agg('1e131071'::numeric) FROM generate_series(1, 4000))"
    bad = _write(outbox_db, f"SELECT publish_change('x', 'bad', new_data => {numbers})")
    good += _innocents(outbox_db, 10)
    async with consuming(outbox, calls.router) as app:
        await _until_settled(outbox_db)
        assert metric(app.metrics.registry, "cdc_interruptions_total") == 0
    assert calls.counts == dict.fromkeys(good, 1)
    assert "[57014]" in _last_error(outbox_db, bad)


async def test_a_read_that_somebody_cancels_costs_no_change_anything(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    calls = Calls()
    good = _innocents(outbox_db, 20)
    with psycopg.connect(outbox) as other:
        async with consuming(outbox, calls.router) as app:
            await _until_settled(outbox_db)
            other.execute("LOCK TABLE entity_changes")
            waiting = (
                "SELECT pid FROM pg_stat_activity WHERE application_name = 'cdc: reader' AND wait_event_type = 'Lock'"
            )

            async def stuck() -> bool:
                return bool(other.execute(waiting.encode()).fetchall())

            await eventually_async(stuck, within_s=30, what="the reader waits for the table")
            good += [_write(other, f"SELECT publish_change('x', '{n}')") for n in range(20)]
            other.execute(f"SELECT pg_cancel_backend(pid) FROM ({waiting}) AS reader".encode())
            other.commit()
            await _until_settled(outbox_db)
            assert metric(app.metrics.registry, "cdc_rows_refused_total") == 0
            assert metric(app.metrics.registry, "cdc_interruptions_total") == 0
    assert calls.counts == dict.fromkeys(good, 1)


@pytest.mark.parametrize("place", ["payload", "type", "operation"])
async def test_a_dead_letter_that_could_not_be_read_pauses_its_key_as_well(ascii_dsn: str, place: str) -> None:
    router, handled = Router(), list[str]()

    @router.on("*", dead="pause")
    async def any_type(change: cdc.Change) -> None:
        handled.append(change.entity_id)

    with psycopg.connect(ascii_dsn, autocommit=True) as db:
        bad = _write(db, _UNREADABLE[place])
        later = _UNREADABLE["payload"].replace(_BAD_BYTE, "''") if place != "type" else ""
        if later:
            _write(db, later)
        _innocents(db, 1)
        async with consuming(ascii_dsn, router):

            async def held() -> bool:
                return handled == ["0"] and states(db).get("dead") == 1

            await eventually_async(held, within_s=30, what="the other key is handled")
            stats = json.loads(done(ascii_dsn, "outbox", "show", str(bad), "--json"))["change"]
            assert stats["pauses_key"]
            done(ascii_dsn, "outbox", "discard", str(bad))
            await _until_settled(db)
        assert handled == ["0", "bad"] if later else ["0"]


async def test_who_observes_leaves_out_what_cannot_be_read_and_counts_the_rest(
    ascii_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shadow, "_MARKS_EVERY_S", 0.05)
    calls = Calls()
    with psycopg.connect(ascii_dsn, autocommit=True) as db:
        _innocents(db, 5)
        for statement in _UNREADABLE.values():
            _write(db, statement)
        async with consuming(ascii_dsn, calls.router, observe=True, poll_interval=0.05) as app:
            registry = app.metrics.registry

            async def seen(name: str, count: int) -> bool:
                return metric(registry, name) == count

            await eventually_async(lambda: seen("cdc_observed_changes_total", 5), within_s=30)
            for statement in _UNREADABLE.values():
                _write(db, statement)
            _innocents(db, 5)
            await eventually_async(lambda: seen("cdc_observed_changes_total", 10), within_s=30)
            assert metric(registry, "cdc_rows_refused_total", step="read") == 2 * len(_UNREADABLE)
            db.execute("UPDATE entity_changes SET processed = true, processed_at = clock_timestamp()")
            await eventually_async(lambda: seen("cdc_observed_latency_seconds_count", 10), within_s=30)
            assert metric(registry, "cdc_interruptions_total") == 0
        assert calls.counts == {}


@pytest.mark.parametrize("place", _UNREADABLE)
async def test_a_drain_goes_on_though_a_change_cannot_be_read_and_names_it(ascii_dsn: str, place: str) -> None:
    calls = Calls()
    with psycopg.connect(ascii_dsn, autocommit=True) as db:
        bad, good = _write(db, _UNREADABLE[place]), _innocents(db, 3)
        with pytest.raises(testing.DeadLetterError, match=f"1 changes became dead letters: {bad} "):
            await testing.drain(ascii_dsn, calls.router)
        assert calls.counts == dict.fromkeys(good, 1)


@pytest.mark.parametrize("place", _UNREADABLE)
async def test_every_outbox_command_works_on_it_and_on_other_changes(ascii_dsn: str, place: str) -> None:
    calls = Calls()
    with psycopg.connect(ascii_dsn, autocommit=True) as db:
        bad, other, good = _write(db, _UNREADABLE[place]), _write(db, _UNREADABLE[place]), _innocents(db, 1)
        assert done(ascii_dsn, "outbox", "list", "--state", "fresh", "--json").count('"seq"') == 3
        async with consuming(ascii_dsn, calls.router):
            await _until_settled(db)
    stats = json.loads(done(ascii_dsn, "outbox", "stats", "--json"))
    entity_type = "b\\xff" if place == "type" else "x"
    assert [(each["entity_type"], each["dead"]) for each in stats["types"]] == [(entity_type, 2)]
    for arguments in (["list"], ["list", "--state", "processed"], ["stats"]):
        done(ascii_dsn, "outbox", *arguments)
    listed = json.loads(done(ascii_dsn, "outbox", "list", "--json"))["changes"]
    assert {change["seq"] for change in listed} == {bad, other}
    shown = json.loads(done(ascii_dsn, "outbox", "show", str(bad), "--show-payload", "--json"))["change"]
    assert {
        "payload": shown["new"] == {"a": "b\\xff"},
        "key": shown["entity_id"] == "b\\xff",
        "type": shown["entity_type"] == "b\\xff",
        "operation": shown["operation"] == ("MERGE" * 40),
    }[place]
    done(ascii_dsn, "outbox", "retry", str(bad))
    assert done(ascii_dsn, "outbox", "list", "--state", "waiting", "--json").count('"seq"') == 1
    done(ascii_dsn, "outbox", "retry", "--all", "--yes")
    with psycopg.connect(ascii_dsn, autocommit=True) as db:
        async with consuming(ascii_dsn, calls.router) as app:
            await _until_settled(db)
            assert metric(app.metrics.registry, "cdc_interruptions_total") == 0
        assert states(db) == {"processed": 1, "dead": 2}
        done(ascii_dsn, "outbox", "discard", str(bad), str(other))
        assert states(db) == {"processed": 3}
        db.execute("UPDATE entity_changes SET processed_at = now() - interval '1 day'")
        done(ascii_dsn, "outbox", "prune", "--older-than", "1h")
        assert states(db) == {}
    assert calls.counts == dict.fromkeys(good, 1)


@pytest.mark.parametrize(
    "document", ["jsonb_build_object('a', ('1' || repeat('0', 5000))::numeric)",
                 "(repeat('[', 5000) || repeat(']', 5000))::jsonb"], ids=["digits", "nesting"],
)  # fmt: skip
async def test_a_document_that_python_cannot_read_is_a_dead_letter_at_the_first_attempt(
    outbox: str, outbox_db: psycopg.Connection, document: str
) -> None:
    router, calls = Router(), Counter[int]()

    @router.on("*")
    async def any_type(change: cdc.Change) -> None:
        calls[change.seq] += 1
        assert change.new is None

    good = _innocents(outbox_db, 1)
    bad = _write(outbox_db, f"SELECT publish_change('x', 'bad', new_data => {document})")
    async with consuming(outbox, router):
        await _until_settled(outbox_db)
    assert calls == dict.fromkeys([*good, bad], 1)
    assert _last_error(outbox_db, bad).startswith("'new' cannot be read by Python")
    shown = json.loads(done(outbox, "outbox", "show", str(bad), "--show-payload", "--json"))["change"]
    assert isinstance(shown["new"], str)
