"""Several consumers in one process, each of a subscription: one stream, one port, and each fails alone."""

from __future__ import annotations

import asyncio
import contextlib
import json
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner

import cdc
from cdc.app import config
from cdc.app.application import App
from cdc.app.consumers import Consumers
from cdc.cli import cdc as root_command
from cdc.contrib.demo.temp_server import free_port
from cdc.core.errors import ConnectError, NotFoundError, UsageError
from cdc.core.router import Router
from cdc.observability.snapshots import Role
from cdc.postgres.subscriptions import Subscriptions
from tests.eventually import eventually, eventually_async
from tests.fix_consumer import Process, metric, settled, slot_name
from tests.subscriptions import is_done, subscribe

_END_READERS = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE datname = current_database() AND application_name = 'cdc: reader'
"""


class Seen:
    """A router for all types, and the numbers of the changes that its handler was called with."""

    def __init__(self) -> None:
        self.router, self.seqs = Router(), list[int]()

        @self.router.on("*")
        async def see(change: cdc.Change) -> None:
            self.seqs.append(change.seq)


@contextlib.asynccontextmanager
async def _consuming(dsn: str, seen: Mapping[str, Seen], **settings: Any) -> AsyncIterator[Consumers]:
    options = {"dsn": dsn, "http_port": 0, "slot_name": slot_name(), "max_attempts": 3, **settings}
    chosen = [(config.from_options({**options, "subscription": name}), each.router) for name, each in seen.items()]
    consumers = await Consumers.make(chosen)
    work = asyncio.create_task(consumers.run())
    try:
        yield consumers
        if work.done():
            work.result()
    finally:
        consumers.stop()
        await work


async def _until(condition: Callable[[], object], what: str) -> None:
    async def check() -> object:
        return condition()

    await eventually_async(check, what=what)


def _publish(db: psycopg.Connection, count: int = 10, *, entity_type: str = "order") -> list[int]:
    rows = db.execute("SELECT seq FROM entity_changes ORDER BY seq DESC LIMIT 1").fetchall()
    db.execute(
        "SELECT publish_change(%s, (n %% 5)::text, 'INSERT', '{}') FROM generate_series(1, %s) AS n",
        [entity_type, count],
    )
    after = rows[0][0] if rows else 0
    return [seq for (seq,) in db.execute("SELECT seq FROM entity_changes WHERE seq > %s ORDER BY seq", [after])]


def _get(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as refused:
        return refused.code, refused.read().decode()


@pytest.fixture
def seen(outbox_db: psycopg.Connection) -> dict[str, Seen]:
    """In an order in which the default one is not the first."""
    for name in ("search", "billing"):
        subscribe(outbox_db, name)
    return {"search": Seen(), "default": Seen(), "billing": Seen()}


async def test_one_stream_wakes_them_all_and_nothing_is_relayed(
    outbox: str, outbox_db: psycopg.Connection, seen: dict[str, Seen]
) -> None:
    async with _consuming(outbox, seen, sweep_interval=60, poll_interval=60) as consumers:
        await _until(
            lambda: all(app.status.role is Role.STREAMING for app in consumers.apps.values()), "the stream has begun"
        )
        await _until(lambda: all(app.status.consumer.owned_shards == 64 for app in consumers.apps.values()), "they own")
        await _until(
            lambda: not any(app.status.consumer.catching_up for app in consumers.apps.values()), "all is swept"
        )
        expected = _publish(outbox_db, 50)
        await _until(lambda: all(sorted(each.seqs) == expected for each in seen.values()), "each has seen all")
        for app in consumers.apps.values():
            assert metric(app.metrics.registry, "cdc_wakeups_total", source="wal") == 50
            assert metric(app.metrics.registry, "cdc_wakeups_total", source="notify") == 0
            assert metric(app.metrics.registry, "cdc_relay_notifies_total") == 0
        [(slots,)] = outbox_db.execute(
            "SELECT count(*) FROM pg_replication_slots WHERE database = current_database()"
        ).fetchall()
        assert slots == 1
        await _until(lambda: settled(outbox_db), "they are marked")


async def test_consumers_of_other_processes_are_woken_too(
    outbox: str, outbox_db: psycopg.Connection, seen: dict[str, Seen]
) -> None:
    subscribe(outbox_db, "audit")
    options = {"sweep_interval": 60, "poll_interval": 60, "slot_name": slot_name()}
    audit = {"audit": Seen(), "mail": Seen()}
    subscribe(outbox_db, "mail")
    async with _consuming(outbox, seen, **options) as here:
        await _until(lambda: here.apps["default"].status.role is Role.STREAMING, "the stream has begun")
        async with _consuming(outbox, audit, **options) as there:
            await _until(lambda: all(a.status.consumer.owned_shards == 64 for a in there.apps.values()), "they own")
            await _until(lambda: all(a.status.listening for a in there.apps.values()), "they listen")
            await _until(
                lambda: here.apps["default"].consumer.notifications.relays_all, "the process that streams knows of them"
            )
            expected = _publish(outbox_db, 50)
            await _until(
                lambda: all(sorted(each.seqs) == expected for each in (*seen.values(), *audit.values())), "all are seen"
            )


async def test_a_fault_of_one_is_not_the_others_and_it_begins_again(
    outbox: str, outbox_db: psycopg.Connection, seen: dict[str, Seen], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with _consuming(outbox, seen) as consumers:
        await _until(lambda: all(check.ok for check in consumers.readiness()), "all are ready")
        before = consumers.apps["search"]
        others = {name: app for name, app in consumers.apps.items() if name != "search"}

        async def broken(*_: object) -> None:
            raise RuntimeError("a bug")

        monkeypatch.setattr(before.consumer, "_read_loop", broken)
        outbox_db.execute(_END_READERS)
        await _until(lambda: consumers.apps["search"] is not before, "it is made anew")
        expected = _publish(outbox_db)
        await _until(lambda: all(set(each.seqs) == set(expected) for each in seen.values()), "each has seen all")
        assert {name: app for name, app in consumers.apps.items() if name != "search"} == others
        await _until(lambda: all(check.ok for check in consumers.readiness()), "all are ready again")
        assert metric(consumers.registry, "cdc_task_ends_total", task="consumer", subscription="search") == 1
        assert metric(consumers.registry, "cdc_task_ends_total", task="consumer") == 1


async def test_the_stream_comes_back_where_the_one_that_leads_has_ended(
    outbox: str, outbox_db: psycopg.Connection, seen: dict[str, Seen], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with _consuming(outbox, seen, sweep_interval=60) as consumers:
        await _until(lambda: consumers.apps["default"].status.role is Role.STREAMING, "the stream has begun")
        before = consumers.apps["default"]

        async def broken(*_: object) -> None:
            raise RuntimeError("a bug")

        monkeypatch.setattr(before.consumer, "_read_loop", broken)
        outbox_db.execute(_END_READERS)
        await _until(lambda: consumers.apps["default"] is not before, "it is made anew")
        await _until(
            lambda: all(app.status.role is Role.STREAMING for app in consumers.apps.values()), "the stream is back"
        )
        expected = _publish(outbox_db)
        await _until(lambda: all(set(each.seqs) == set(expected) for each in seen.values()), "each has seen all")


def _is_ready(consumers: Consumers) -> bool:
    return all(check.ok for check in consumers.readiness())


def _said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the log says of a drop, by the first words of each sentence."""
    said = [record.getMessage() for record in caplog.records if "dropped" in record.getMessage()]
    return [message.partition(",")[0].partition(" (")[0] for message in said]


async def test_one_that_is_dropped_ends_and_the_process_is_ready_without_it(
    outbox: str, outbox_db: psycopg.Connection, seen: dict[str, Seen], caplog: pytest.LogCaptureFixture
) -> None:
    number = outbox_db.execute("SELECT subscription FROM cdc_subscriptions WHERE name = 'billing'").fetchall()[0][0]
    port = free_port()
    async with _consuming(outbox, seen, http_port=port) as consumers:
        await _until(lambda: _is_ready(consumers), "all are ready")
        Subscriptions("public").drop(outbox_db, "search")
        expected = _publish(outbox_db)
        await _until(lambda: sorted(seen["billing"].seqs) == sorted(seen["default"].seqs) == expected, "others go on")
        await _until(lambda: is_done(outbox_db, number), "billing has marked them")
        await _until(lambda: _said(caplog), "it is said")
        assert _said(caplog) == ["the subscription search was dropped"]
        assert "restart this process" in caplog.text
        status, checks = await asyncio.to_thread(_get, port, "/readyz")
        assert (status, "search." in checks) == (200, False), checks
        assert (await asyncio.to_thread(_get, port, "/livez"))[0] == 200
        _, metrics = await asyncio.to_thread(_get, port, "/metrics")
        assert 'cdc_shards_owned{subscription="billing"}' in metrics
        assert 'cdc_shards_owned{subscription="search"}' not in metrics
        figures = json.loads((await asyncio.to_thread(_get, port, "/status.json?subscription=search"))[1])
        assert (figures["consumer"]["subscription"], figures["beside"]) == ("default", ["default", "billing"])
        subscribe(outbox_db, "search")
        more = _publish(outbox_db)
        await _until(lambda: sorted(seen["billing"].seqs) == [*expected, *more], "others go on")
        assert seen["search"].seqs == []
    assert _said(caplog) == ["the subscription search was dropped"]


async def test_the_next_one_leads_where_the_one_that_leads_is_dropped(
    outbox: str, outbox_db: psycopg.Connection, seen: dict[str, Seen], caplog: pytest.LogCaptureFixture
) -> None:
    subscribe(outbox_db, "audit")
    several = {"search": seen["search"], "billing": seen["billing"], "audit": Seen()}
    async with _consuming(outbox, several, sweep_interval=60, poll_interval=60) as consumers:
        await _until(lambda: consumers.apps["search"].status.role is Role.STREAMING, "the stream has begun")
        await _until(lambda: _is_ready(consumers), "all are ready")
        Subscriptions("public").drop(outbox_db, "search")
        await _until(lambda: list(consumers.apps) == ["billing", "audit"], "it has ended")
        await _until(
            lambda: (
                consumers.apps["billing"].components.stream is not None
                and all(app.status.role is Role.STREAMING for app in consumers.apps.values())
            ),
            "the next one has the stream",
        )
        await _until(lambda: _is_ready(consumers), "the others are ready")
        expected = _publish(outbox_db)
        await _until(lambda: all(sorted(several[name].seqs) == expected for name in ("billing", "audit")), "both go on")
        audit = consumers.apps["audit"].metrics.registry
        assert metric(audit, "cdc_wakeups_total", source="wal") == len(expected)
    assert _said(caplog) == ["the subscription search was dropped"]


async def test_the_next_one_that_cannot_connect_at_once_leads_later_and_ends_nobody(
    outbox: str, outbox_db: psycopg.Connection, seen: dict[str, Seen], monkeypatch: pytest.MonkeyPatch
) -> None:
    several = {name: seen[name] for name in ("search", "billing")}
    async with _consuming(outbox, several) as consumers:
        await _until(lambda: _is_ready(consumers), "all are ready")
        run, refused = App.run, list[str]()

        async def refused_once(app: App) -> None:
            if not refused:
                refused.append(app.status.subscription)
                raise ConnectError("refused")
            await run(app)

        monkeypatch.setattr(App, "run", refused_once)
        Subscriptions("public").drop(outbox_db, "search")
        await _until(lambda: refused == ["billing"], "it is begun again")
        await _until(lambda: consumers.apps["billing"].status.role is Role.STREAMING, "it has the stream")
        expected = _publish(outbox_db)
        await _until(lambda: sorted(seen["billing"].seqs) == expected, "it goes on")


async def test_the_last_one_of_a_process_that_is_dropped_says_so_and_is_not_ready(
    outbox: str, outbox_db: psycopg.Connection, seen: dict[str, Seen], caplog: pytest.LogCaptureFixture
) -> None:
    async with _consuming(outbox, {name: seen[name] for name in ("search", "billing")}) as consumers:
        await _until(lambda: _is_ready(consumers), "all are ready")
        for name in ("search", "billing"):
            Subscriptions("public").drop(outbox_db, name)
        await _until(lambda: len(consumers.apps) == 1, "one has ended")
        await _until(lambda: any(each.startswith("waiting: ") for each in _said(caplog)), "the other waits")
        await _until(lambda: not _is_ready(consumers), "it is not ready")
        assert len(consumers.apps) == 1


async def test_one_port_has_the_metrics_the_probes_and_the_pages_of_all(
    outbox: str, outbox_db: psycopg.Connection, seen: dict[str, Seen]
) -> None:
    unused_port = free_port()
    _publish(outbox_db)
    async with _consuming(outbox, seen, http_port=unused_port) as consumers:
        await _until(lambda: all(len(each.seqs) == 10 for each in seen.values()), "each has seen all")
        await _until(lambda: settled(outbox_db), "they are marked")
        for app in consumers.apps.values():
            app.poll_now(everything=True)
        get = asyncio.to_thread
        await _until(lambda: all(check.ok for check in consumers.readiness()), "all are ready")
        status, checks = await get(_get, unused_port, "/readyz")
        assert status == 200
        assert {line.split()[1].partition(".")[0] for line in checks.splitlines()} == {"default", "search", "billing"}
        assert (await get(_get, unused_port, "/livez"))[0] == 200
        _, text = await get(_get, unused_port, "/metrics")
        for name in ("default", "search", "billing"):
            assert f'cdc_shards_owned{{subscription="{name}"}} 64.0' in text
        assert text.count("\ncdc_build_info{") == 1
        assert "subscription" not in next(line for line in text.splitlines() if line.startswith("cdc_build_info"))
        for family in {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}:
            assert text.count(f"# TYPE {family} ") == 1, family
        lines = [line.rpartition(" ")[0] for line in text.splitlines() if not line.startswith("#")]
        assert len(lines) == len(set(lines))
        assert 'cdc_subscription_consumers{subscription="search"} 1.0' in text
        page = (await get(_get, unused_port, "/"))[1]
        assert "beside" in page
        assert (await get(_get, unused_port, "/?subscription=search"))[1] == page
        figures = {}
        for query in ("", "?subscription=search", "?subscription=default", "?subscription=nobody"):
            figures[query] = json.loads((await get(_get, unused_port, f"/status.json{query}"))[1])
        assert {query: each["consumer"]["subscription"] for query, each in figures.items()} == {
            "": "default", "?subscription=search": "search", "?subscription=default": "default",
            "?subscription=nobody": "default",
        }  # fmt: skip
        assert figures[""]["beside"] == ["default", "search", "billing"]


async def test_what_a_process_needs_once_is_there_once(
    outbox: str, outbox_db: psycopg.Connection, seen: dict[str, Seen]
) -> None:
    async with _consuming(outbox, seen, retention="30d") as consumers:
        await _until(lambda: all(check.ok for check in consumers.readiness()), "all are ready")
        await _until(lambda: consumers.apps["default"].status.role is Role.STREAMING, "the stream has begun")
        leading = [name for name, app in consumers.apps.items() if app.components.stream]
        assert leading == ["default"]
        [(walsenders,)] = outbox_db.execute(
            "SELECT count(*) FROM pg_stat_replication AS r JOIN pg_stat_activity AS a USING (pid)"
            " WHERE a.datname = current_database()"
        ).fetchall()
        assert walsenders == 1


async def test_the_library_runs_routers_by_name_and_drains_them_when_it_is_cancelled(
    outbox: str, outbox_db: psycopg.Connection, seen: dict[str, Seen]
) -> None:
    routers = {name: each.router for name, each in seen.items()}
    work = asyncio.create_task(cdc.run(outbox, routers, slot_name=slot_name()))
    expected = _publish(outbox_db)
    await _until(lambda: all(sorted(each.seqs) == expected for each in seen.values()) or work.done(), "all are seen")
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    assert settled(outbox_db)


async def test_what_cannot_start_is_told_at_the_start_and_nothing_runs(outbox: str, seen: dict[str, Seen]) -> None:
    router = seen["search"].router
    with pytest.raises(NotFoundError, match="serach"):
        await cdc.run(outbox, {"default": router, "serach": router})
    with pytest.raises(UsageError, match="there is no router"):
        await cdc.run(outbox, {})
    with pytest.raises(UsageError, match="name their subscriptions"):
        await cdc.run(outbox, {"search": router}, subscription="search")
    with pytest.raises(UsageError, match="no handler wants"):
        await cdc.run(outbox, {"default": router, "search": Router()})
    with pytest.raises(ConnectError):
        await cdc.run("host=127.0.0.1 port=1 dbname=x", {"default": router, "search": router})


async def test_one_router_by_name_is_a_consumer_as_any(
    outbox: str, outbox_db: psycopg.Connection, seen: dict[str, Seen]
) -> None:
    work = asyncio.create_task(cdc.run(outbox, {"search": seen["search"].router}, slot_name=slot_name()))
    expected = _publish(outbox_db)
    await _until(lambda: sorted(seen["search"].seqs) == expected or work.done(), "all are seen")
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work


def test_the_command_runs_the_sections_of_its_file_and_drains_them_all(
    outbox: str, outbox_db: psycopg.Connection, tmp_path: Path, processes: list[Process]
) -> None:
    number = subscribe(outbox_db, "search")
    file = tmp_path / "cdc.toml"
    file.write_text('[subscription.search]\nhandlers = "tests.handlers:router"\nthreads = 2\n')
    process = Process(outbox, tmp_path / "log", options=["--config", str(file)], slot_name=slot_name())
    processes.append(process)
    process.wait_for("consumes the subscriptions default, search")
    _publish(outbox_db, entity_type="nothing")
    eventually(lambda: settled(outbox_db) and is_done(outbox_db, number), what="both are done")
    assert process.terminate() == 0, process.log
    alone = Process(
        outbox, tmp_path / "alone", options=["--config", str(file)], slot_name=slot_name(), subscription="search"
    )
    processes.append(alone)
    alone.wait_for("listening")
    assert "consumes the subscriptions" not in alone.log
    assert alone.terminate() == 0, alone.log


def test_the_settings_in_force_are_shown_with_those_of_each_section(tmp_path: Path) -> None:
    file = tmp_path / "cdc.toml"
    file.write_text('handlers = "a:b"\n[subscription.search]\nhandlers = "c:d"\n')
    shown = CliRunner().invoke(root_command, ["config", "show", "--config", str(file), "--json"])
    found = json.loads(shown.stdout)
    assert found["settings"]["handlers"]["value"] == "a:b"
    assert found["subscriptions"]["search"] == {
        "handlers": {"value": "c:d", "source": "handlers in [subscription.search]"}
    }
    assert "search: handlers" in CliRunner().invoke(root_command, ["config", "show", "--config", str(file)]).stdout


async def test_the_first_of_several_tells_of_all_subscriptions_and_no_other_one_asks(
    outbox: str, outbox_db: psycopg.Connection, seen: dict[str, Seen]
) -> None:
    subscribe(outbox_db, "audit")
    async with _consuming(outbox, {name: seen[name] for name in ("search", "billing")}) as consumers:

        def told() -> dict[str, float]:
            for app in consumers.apps.values():
                app.poll_now(everything=True)
            names = ("audit", "billing", "search")
            return {name: metric(consumers.registry, "cdc_subscription_consumers", subscription=name) for name in names}

        await _until(lambda: told() == {"audit": 0, "billing": 1, "search": 1}, "the first tells of all")
        assert metric(consumers.registry, "cdc_subscriptions") == 3
        assert metric(consumers.apps["billing"].metrics.registry, "cdc_subscriptions") == 0
