"""``--observe``: sees and measures everything, runs nothing, marks nothing, takes nothing from those who work."""

from __future__ import annotations

import json
import logging
import re
import urllib.request
from pathlib import Path

import psycopg
import pydantic
import pytest
from click.testing import CliRunner
from psycopg import sql
from psycopg.conninfo import make_conninfo

import cdc
from cdc.app.application import App
from cdc.cli import cdc as root_command
from cdc.contrib.demo.temp_server import free_port
from tests.eventually import eventually, eventually_async
from tests.fix_consumer import Process, consuming, metric, slot_name, states

_PUBLISH = "SELECT publish_change(%s, %s, new_data => '{\"n\": 1}')"


def _router(ran: list[cdc.Change]) -> cdc.Router:
    router = cdc.Router()
    router.on("order", "INSERT", name="welcome")(ran.append)
    router.on("bad", name="strict", model=_Strict)(ran.append)
    return router


class _Strict(pydantic.BaseModel):
    missing: int


@pytest.mark.parametrize("stream", [True, False])
async def test_every_change_is_counted_by_who_would_have_got_it_and_nothing_runs_or_changes(
    stream: bool, outbox: str, outbox_db: psycopg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    ran: list[cdc.Change] = []
    outbox_db.execute(_PUBLISH, ["order", "before"])
    before = outbox_db.execute("SELECT xmin, * FROM entity_changes").fetchall()
    with caplog.at_level(logging.INFO, "cdc"):
        async with consuming(outbox, _router(ran), observe=True, stream=stream, poll_interval=0.05) as app:
            registry = app.metrics.registry

            async def sees(name: str, count: int, **labels: str) -> bool:
                return metric(registry, name, **labels) == count

            if stream:
                await eventually_async(lambda: sees("cdc_stream_connected", 1))
            for key in range(20):
                outbox_db.execute(_PUBLISH, ["order", str(key)])
            outbox_db.execute(_PUBLISH, ["bad", "1"])
            outbox_db.execute(_PUBLISH, ["nobody", "1"])
            await eventually_async(lambda: sees("cdc_observed_changes_total", 21, handler="welcome"))
            await eventually_async(lambda: sees("cdc_observed_changes_total", 1, entity_type="other", handler="none"))
            await eventually_async(lambda: sees("cdc_observed_invalid_total", 1, handler="strict"))
            assert await sees("cdc_role", 1, role="observing")
            assert await sees("cdc_shards_owned", 0)
            assert metric(registry, "cdc_wakeups_total", source="wal") == (22 if stream else 0)
            assert metric(registry, "cdc_wakeup_latency_seconds_count") > 0 or not stream
            slots = outbox_db.execute("SELECT temporary FROM pg_replication_slots WHERE active").fetchall()
            assert slots == ([(True,)] if stream else [])
    assert ran == []
    assert outbox_db.execute("SELECT xmin, * FROM entity_changes WHERE entity_id = 'before'").fetchall() == before
    assert states(outbox_db) == {"fresh": 23}
    assert outbox_db.execute("SELECT count(*) FROM cdc_shards").fetchone() == (0,)
    assert "only observing every entity type: no handler runs, nothing is marked" in caplog.text
    [misfit] = [record.getMessage() for record in caplog.records if "does not fit" in record.getMessage()]
    assert misfit.endswith("of bad does not fit the model of handler strict: missing")


async def test_what_a_handlers_filter_would_leave_out_counts_as_without_a_handler(
    outbox: str, outbox_db: psycopg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    router, ran = cdc.Router(), list[cdc.Change]()
    router.on("order", name="some", when=lambda change: change.new["n"] > int(change.entity_id))(ran.append)
    for key in ("0", "1", "2", "not a number"):
        outbox_db.execute(_PUBLISH, ["order", key])
    async with consuming(outbox, router, observe=True, stream=False, poll_interval=0.05) as app:
        registry = app.metrics.registry

        async def sees() -> bool:
            return metric(registry, "cdc_observed_changes_total", entity_type="order") == 4

        await eventually_async(sees)
        assert metric(registry, "cdc_observed_changes_total", handler="some") == 2
        assert metric(registry, "cdc_observed_changes_total", handler="none") == 2
        assert metric(registry, "cdc_observed_invalid_total", handler="some") == 1
    assert ran == []
    [failed] = [record.getMessage() for record in caplog.records if "does not fit" in record.getMessage()]
    assert "does not fit the model or filter of handler some: ValueError at" in failed
    assert "not a number" not in failed


async def test_beside_a_working_consumer_it_takes_neither_shards_nor_the_slot_and_measures_its_pace(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    ran: list[cdc.Change] = []
    name = slot_name()
    async with consuming(outbox, _router([]), observe=True, slot_name=name, poll_interval=0.05) as shadow:

        async def streams(app: App) -> bool:
            return metric(app.metrics.registry, "cdc_stream_connected") == 1

        await eventually_async(lambda: streams(shadow))
        async with consuming(outbox, _router(ran), slot_name=name) as worker:
            await eventually_async(lambda: streams(worker))
            assert metric(worker.metrics.registry, "cdc_role", role="streaming") == 1
            for key in range(20):
                outbox_db.execute(_PUBLISH, ["order", str(key)])

            async def both() -> bool:
                registry = shadow.metrics.registry
                return (
                    states(outbox_db) == {"processed": 20}
                    and metric(registry, "cdc_observed_changes_total", handler="welcome") == 20
                    and metric(registry, "cdc_observed_latency_seconds_count", entity_type="order") == 20
                )

            await eventually_async(both)
            assert metric(worker.metrics.registry, "cdc_members") == 1
    assert len(ran) == 20
    outbox_db.execute("SELECT pg_drop_replication_slot(%s)", [name])


async def test_a_role_that_may_only_read_is_enough(outbox: str, outbox_db: psycopg.Connection) -> None:
    role = f"reader_{slot_name()}"
    reader = sql.Identifier(role)
    outbox_db.execute(sql.SQL("CREATE ROLE {} LOGIN").format(reader))
    outbox_db.execute(sql.SQL("GRANT SELECT ON entity_changes TO {}").format(reader))
    try:
        dsn = make_conninfo(outbox, user=role)
        async with consuming(dsn, _router([]), observe=True, stream=False, poll_interval=0.05) as app:
            outbox_db.execute(_PUBLISH, ["order", "1"])

            async def seen() -> bool:
                return metric(app.metrics.registry, "cdc_observed_changes_total", handler="welcome") == 1

            await eventually_async(seen)
    finally:
        outbox_db.execute(sql.SQL("DROP OWNED BY {}").format(reader))
        outbox_db.execute(sql.SQL("DROP ROLE {}").format(reader))


async def test_what_interrupts_it_is_logged_as_a_consumer_logs_it_and_it_goes_on(
    outbox: str, outbox_db: psycopg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    async with consuming(outbox, _router([]), observe=True, stream=False, poll_interval=0.05) as app:
        registry = app.metrics.registry

        async def in_service() -> bool:
            return app.status.consumer.in_service

        async def interrupted() -> bool:
            return metric(registry, "cdc_interruptions_total", reason="statement") == 1

        async def seen() -> bool:
            return metric(registry, "cdc_observed_changes_total", handler="welcome") == 1

        await eventually_async(in_service)
        outbox_db.execute("ALTER TABLE entity_changes RENAME TO elsewhere")
        await eventually_async(interrupted)
        assert metric(registry, "cdc_interruptions_total", reason="connection") == 0
        assert re.search(r'interrupted: relation ".*entity_changes" does not exist \[42P01\]', caplog.text)
        outbox_db.execute("ALTER TABLE elsewhere RENAME TO entity_changes")
        outbox_db.execute(_PUBLISH, ["order", "1"])
        await eventually_async(seen)


async def test_a_stop_does_not_wait_for_a_table_that_is_locked_and_a_wait_is_no_answer(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    async with consuming(outbox, _router([]), observe=True, stream=False, poll_interval=0.05) as app:

        async def in_service() -> bool:
            return app.status.consumer.in_service

        async def waits() -> bool:
            found = outbox_db.execute(
                "SELECT FROM pg_stat_activity WHERE application_name = 'cdc: observer' AND wait_event_type = 'Lock'"
                " AND datname = current_database()"
            )
            return found.fetchone() is not None

        await eventually_async(in_service)
        with psycopg.connect(outbox) as locking:
            locking.execute("LOCK TABLE entity_changes")
            await eventually_async(waits)
            answered_at = app.status.consumer.answered_at
            app.consumer.stop()

            async def stopped() -> bool:
                return not app.status.consumer.in_service

            await eventually_async(stopped, within_s=15, what="it has stopped, long before the lock's time limit")
            assert app.status.consumer.answered_at == answered_at


def test_the_probe_the_page_and_cdc_status_say_that_it_only_observes(
    outbox: str, processes: list[Process], tmp_path: Path
) -> None:
    port = free_port()
    shadow = Process(outbox, tmp_path / "log", options=["--observe"], http_port=port, poll_interval=0.05)
    processes.append(shadow)
    shadow.wait_for("only observing")
    base = f"http://127.0.0.1:{port}"

    def ready() -> str:
        try:
            return urllib.request.urlopen(f"{base}/readyz").read().decode()
        except OSError:
            return ""

    assert "ok observing runs and marks nothing" in eventually(ready)
    assert json.load(urllib.request.urlopen(f"{base}/status.json"))["consumer"]["role"] == "observing"

    def status() -> dict[str, list[object]]:
        printed = CliRunner().invoke(root_command, ["status", "--dsn", outbox, "--json"])
        found: dict[str, list[object]] = json.loads(printed.stdout)
        return found

    assert eventually(lambda: status()["observers"])
    assert status()["members"] == []
    told = CliRunner().invoke(root_command, ["status", "--dsn", outbox]).stdout
    assert "observers  1, which run and mark nothing: process" in told
    assert shadow.terminate() == 0
