"""Each alert fires in a real Prometheus when its condition is really produced, and each panel shows something.

Five consumers of a server of their own, each with its database and its scrape job, as docs/operations/alerts.md asks:
``well`` and what befalls it, ``stuck`` with handlers that never return, ``mute`` without the right to replicate,
``cut_off``, whose outbox is written by hand, behind a proxy, and ``lonely``, whose application does not run. What no
consumer can tell is told by postgres_exporter.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from cdc.contrib.demo.temp_server import TempServer, free_port
from cdc.postgres import migrations
from cdc.postgres.shard_locks import lock_class
from cdc.postgres.subscriptions import Subscriptions
from tests.eventually import eventually
from tests.fix_consumer import Process
from tests.fix_proxy import Proxy
from tests.prometheus.fix_queries import DASHBOARDS, alerts, dashboard, needed, panel_queries
from tests.prometheus.fix_server import Exporter, Prometheus

JOBS = ("well", "stuck", "mute", "cut_off", "lonely")
_WITHIN_S = 90.0

CAUSED: set[str] = set()
"""Alerts that have been seen to fire."""


class Scene:
    """The consumers, each with an autocommit connection to its database, and who looks at them."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._stack = stack
        self._folder = folder
        self.server = stack.enter_context(TempServer(durable=False, settings={"max_slot_wal_keep_size": "1GB"}))
        self.ports = {job: free_port() for job in JOBS}
        self.dbs = {job: self._database(job) for job in JOBS}
        exporter = Exporter(self.server.dsn(), folder)
        stack.callback(exporter.stop)
        self.prometheus = Prometheus(folder, {**self.ports, "postgres": exporter.port})
        stack.callback(self.prometheus.stop)
        self.proxy = Proxy(self.server.dsn("cut_off"))
        self.proxy.start()
        stack.callback(self.proxy.stop)
        self.processes: dict[str, Process] = {}

    def _database(self, job: str) -> psycopg.Connection:
        with psycopg.connect(self.server.dsn(), autocommit=True) as admin:
            admin.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(job)))
        db = self._stack.enter_context(psycopg.connect(self.server.dsn(job), autocommit=True))
        migrations.install(db, "public")
        return db

    def start(self) -> None:
        with psycopg.connect(self.server.dsn(), autocommit=True) as admin:
            admin.execute("CREATE ROLE mute LOGIN")
        patch = self._stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("CDC_SLOT_RECREATE", "no")  # else a lost slot is gone before anybody has looked
        own = {
            "mute": {"stream_dsn": make_conninfo(self.server.dsn("mute"), user="mute")},
            "cut_off": {"stream_dsn": self.proxy.dsn},
            "lonely": {"deliver_to": f"http://127.0.0.1:{free_port()}/"},
        }
        for job in JOBS:
            self.processes[job] = process = Process(
                self.server.dsn(job), self._folder / f"{job}.log", handlers="tests.prometheus.handlers:router",
                http_port=self.ports[job], slot_name=f"slot_{job}", drain_time=0,
                **own.get(job, {}),
            )  # fmt: skip
            self._stack.callback(_end, process)

    def publish(self, job: str, entity_type: str, number: int = 1) -> None:
        self.dbs[job].execute(
            "SELECT publish_change(%s, n::text) FROM generate_series(1, %s) AS n", [entity_type, number]
        )

    def fires(self, alert: str, meanwhile: Callable[[], object] = lambda: None, **labels: str) -> None:
        def firing() -> bool:
            meanwhile()
            return self.prometheus.firing(alert, **labels)

        eventually(firing, within_s=_WITHIN_S, what=f"{alert} {labels}")
        CAUSED.add(alert)


def _end(process: Process) -> None:
    if process.process.poll() is None:
        process.kill()


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    needed("prometheus")
    with ExitStack() as stack:
        scene = Scene(tmp_path_factory.mktemp("prometheus"), stack)
        scene.fires("CdcAbsent")
        stranger = stack.enter_context(psycopg.connect(scene.server.dsn("mute"), autocommit=True))
        stranger.execute("SELECT pg_advisory_lock(%s, 7)", [lock_class("public")])
        scene.start()
        for job, process in scene.processes.items():
            process.wait_for("not streaming (no_replication_role)" if job == "mute" else "streaming the slot")
        yield scene


def test_shards_that_a_stranger_holds_are_missed(scene: Scene) -> None:
    scene.fires("CdcShardsUnowned", job="mute")


def test_a_role_without_the_right_to_replicate_is_recognised(scene: Scene) -> None:
    scene.fires("CdcStreamMisconfigured", job="mute", reason="no_replication_role")
    scene.fires("CdcNotStreaming", job="mute", slot="slot_mute")


def test_handlers_that_fail_and_what_they_leave_behind(scene: Scene) -> None:
    def work() -> None:
        scene.publish("well", "bad")
        scene.publish("well", "good", 5)

    scene.fires("CdcHandlerFailing", work, job="well", handler="bad")
    scene.fires("CdcDeadChanges", job="well")
    scene.dbs["well"].execute("UPDATE entity_changes SET dead_at = dead_at - interval '25 hours' WHERE NOT processed")
    scene.fires("CdcDeadChangesLeft", job="well")


def test_an_operation_that_no_handler_of_its_type_names(scene: Scene) -> None:
    scene.publish("well", "removed")
    scene.fires("CdcChangesSkipped", job="well", entity_type="removed")


def test_changes_that_no_handler_wants(scene: Scene) -> None:
    scene.publish("well", "nobody's")
    scene.fires("CdcChangesUnhandled", job="well")


def test_a_subscription_that_nobody_consumes_and_that_holds_back_what_others_have_done(scene: Scene) -> None:
    db = scene.dbs["well"]
    Subscriptions("public").create(db, "search", start="beginning")
    scene.publish("well", "good", 5)
    scene.fires("CdcSubscriptionNotConsumed", job="well", subscription="search")
    db.execute("UPDATE entity_changes SET changed_at = changed_at - interval '2 days' WHERE processed")
    scene.fires("CdcSubscriptionHoldsBack", job="well", subscription="search")


def test_a_limit_that_lets_nothing_through(scene: Scene) -> None:
    scene.publish("well", "limited", 5)
    scene.fires("CdcLimitStarves", job="well", handler="limited")


@pytest.mark.parametrize("reader", DASHBOARDS)
def test_every_panel_shows_something(scene: Scene, reader: str) -> None:
    """Of ``well``, which has worked, failed and has a subscription; of ``lonely``, which delivers."""
    queries = {
        where: query.replace('job=~".+"', f'job=~"{"lonely" if "cdc_delivery" in query else "well"}"')
        for where, query in panel_queries(reader)
    }
    restarts = {annotation["name"] for annotation in dashboard(reader)["annotations"]["list"]}  # there was none
    missing = set(queries)

    def all_seen() -> bool:
        scene.publish("well", "bad")
        scene.publish("well", "good", 5)
        for where in sorted(missing):
            found = scene.prometheus.query(queries[where])
            if where in restarts or any(not math.isnan(float(series["value"][1])) for series in found):
                missing.discard(where)
        return not missing

    with contextlib.suppress(AssertionError):
        eventually(all_seen, within_s=_WITHIN_S)
    assert missing == set(), "these show nothing"
    assert len(queries) == len(list(panel_queries(reader))), "two panels share a title"


def test_an_application_that_does_not_run(scene: Scene) -> None:
    scene.publish("lonely", "order")
    scene.fires("CdcApplicationAway", job="lonely")


def test_a_handler_that_finds_away_what_it_needs(scene: Scene) -> None:
    scene.publish("stuck", "away", 10)
    scene.fires("CdcHandlerResting", job="stuck", handler="away")


def test_handlers_that_never_return_leave_a_backlog_and_then_one_blocks_the_event_loop(scene: Scene) -> None:
    scene.publish("stuck", "endless", 300)
    scene.fires("CdcBacklogOld", job="stuck")
    scene.fires("CdcStalled", job="stuck")
    scene.dbs["stuck"].execute(
        "CREATE TABLE emptied ();"
        "CREATE TRIGGER truncated AFTER TRUNCATE ON emptied EXECUTE FUNCTION capture_truncate('endless', 'event');"
        "TRUNCATE emptied"
    )
    scene.fires("CdcTruncateStands", job="stuck")
    scene.publish("stuck", "blocking")
    scene.fires("CdcLoopStuck", job="stuck", loop="consumer")


def test_a_pause_that_was_forgotten(scene: Scene) -> None:
    scene.dbs["well"].execute(
        "INSERT INTO cdc_controls (entity_type, because, set_by, set_at)"
        " VALUES ('good', 'an incident', 'somebody', now() - interval '2 days')"
    )
    scene.fires("CdcPausedLong", job="well")
    scene.dbs["well"].execute("DELETE FROM cdc_controls")


def test_a_table_that_is_locked_blinds_the_collector(scene: Scene) -> None:
    with psycopg.connect(scene.server.dsn("mute")) as upgrade:
        upgrade.execute("LOCK TABLE entity_changes IN ACCESS EXCLUSIVE MODE")
        scene.fires("CdcCollectorFailing", job="mute", collector="outbox")


def test_an_outbox_that_sends_no_wake_ups_is_reported(scene: Scene) -> None:
    def insert() -> None:
        scene.dbs["cut_off"].execute(
            "INSERT INTO entity_changes (table_name, operation, entity_id) VALUES ('good', 'INSERT', 'by hand')"
        )

    scene.fires("CdcWakeupsMissing", insert, job="cut_off")


def test_a_stream_that_hears_nothing_and_one_that_keeps_breaking(scene: Scene) -> None:
    scene.proxy.hold()
    scene.fires("CdcStreamSilent", job="cut_off", slot="slot_cut_off")
    scene.proxy.open()

    def cut() -> None:
        scene.dbs["cut_off"].execute(
            "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots"
            " WHERE slot_name = 'slot_cut_off' AND active"
        )

    scene.fires("CdcStreamFlapping", cut, job="cut_off", slot="slot_cut_off")


def test_wal_that_an_open_transaction_keeps_and_a_slot_that_is_lost_with_it(scene: Scene) -> None:
    db = scene.dbs["well"]

    def write(mebibytes: int) -> None:
        db.execute(
            "SELECT pg_logical_emit_message(false, 'bulk', repeat('x', 1048576)) FROM generate_series(1, %s)",
            [mebibytes],
        )

    with psycopg.connect(scene.server.dsn("well")) as writer:
        writer.execute("INSERT INTO entity_changes (table_name, operation, entity_id) VALUES ('x', 'INSERT', 'open')")
        write(20)
        for severity in ("warning", "critical"):
            scene.fires("CdcSlotWalRetentionHigh", lambda: write(1), job="well", severity=severity)
        scene.fires("CdcSlotWillBeLost", lambda: write(1), job="well")
        db.execute("ALTER SYSTEM SET max_slot_wal_keep_size = '1MB'")
        db.execute("SELECT pg_reload_conf()")

        def lose() -> None:
            db.execute("SELECT pg_switch_wal()")
            write(1)
            db.execute("CHECKPOINT")

        scene.fires("CdcSlotLost", lose, slot="slot_well")


def test_an_unread_slot_is_reported_though_no_consumer_runs(scene: Scene) -> None:
    db = scene.dbs["mute"]
    for name in ("cdc", "cdc_forgotten"):  # the name that a consumer takes unless told otherwise, and one like it
        db.execute("SELECT pg_create_logical_replication_slot(%s, 'wal2json')", [name])

    def write() -> None:
        db.execute("SELECT pg_logical_emit_message(false, 'bulk', repeat('x', 1048576))")

    for name in ("cdc", "cdc_forgotten"):
        scene.fires("CdcOrphanSlot", write, slot_name=name)


def test_of_several_installations_one_whose_only_consumer_is_killed(scene: Scene) -> None:
    scene.processes["lonely"].kill()
    scene.fires("CdcTargetDown", job="lonely")
    scene.fires("CdcAbsent", job="lonely")


def test_nothing_is_left_out(scene: Scene) -> None:
    assert {alert["alert"] for alert in alerts()} == CAUSED
