"""`cdc doctor` on real servers: each state it warns of is made, found, and fixed by what it prints."""

from __future__ import annotations

import asyncio
import json
import stat
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner, Result
from psycopg import sql
from psycopg.conninfo import make_conninfo

from cdc import Router
from cdc.cli import cdc
from cdc.contrib.demo.temp_server import TempServer
from cdc.diagnostics.doctor import examine
from cdc.diagnostics.facts import Subject
from cdc.diagnostics.findings import Finding, Severity
from cdc.postgres import migrations, tracking
from cdc.postgres.shard_locks import lock_class
from cdc.replication import slots, wal2json
from tests import servers
from tests.eventually import eventually, eventually_async
from tests.fix_consumer import consuming, metric
from tests.fix_slot import allow, lose

PASSWORD = "pw with blanks@%'"


def run(dsn: str, *options: str) -> Result:
    result = CliRunner().invoke(cdc, ["doctor", "--dsn", dsn, *options])
    assert PASSWORD not in result.output
    assert "Traceback" not in result.output
    return result


def findings(dsn: str, *options: str) -> dict[str, dict[str, Any]]:
    """By id, each with the three things that are said."""
    found = json.loads(run(dsn, "--json", *options).stdout)["findings"]
    return {each["id"]: each for each in found}


def troubles(dsn: str, *options: str) -> dict[str, str]:
    """What fails or warns: id to verdict."""
    return {
        name: each["severity"] for name, each in findings(dsn, *options).items() if each["severity"] in ("fail", "warn")
    }


BLIND = {"old-transactions": "warn"}
"""A role without pg_read_all_stats does not see how old the transactions of others are."""


def apply(dsn: str, script: str) -> None:
    """As an operator would: psql, as the superuser."""
    psql = [servers.program("psql"), "-X", "-q", "-v", "ON_ERROR_STOP=1", dsn]
    subprocess.run(psql, input=script, text=True, check=True, stdout=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def well() -> Iterator[TempServer]:
    """A server on which nothing is left to be fixed."""
    with TempServer(durable=False, settings={"max_slot_wal_keep_size": "1GB"}) as server:
        yield server


def closed(db: psycopg.Connection, sender: str) -> None:
    """From now on not everybody may send logical messages, but ``sender`` may."""
    for message in db.execute("SELECT oid::regprocedure::text FROM pg_proc WHERE proname = 'pg_logical_emit_message'"):
        db.execute(sql.SQL("REVOKE EXECUTE ON FUNCTION {0} FROM PUBLIC; GRANT EXECUTE ON FUNCTION {0} TO {1}").format(
            sql.SQL(message[0]), sql.Identifier(sender)))  # fmt: skip


@pytest.fixture
def shop(well: TempServer) -> Iterator[str]:
    """The DSN of a database of the test's own, with an outbox whose owner is no superuser and a tracked table in it."""
    name = f"shop_{uuid.uuid4().hex[:8]}"
    owner = sql.Identifier(f"{name}_owner")
    with psycopg.connect(well.dsn(), autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        with psycopg.connect(well.dsn(name), autocommit=True) as db:
            db.execute(sql.SQL("CREATE ROLE {} NOLOGIN CREATEROLE").format(owner))
            db.execute(sql.SQL("GRANT ALL ON SCHEMA public TO {} WITH GRANT OPTION").format(owner))
            db.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC")  # before 15 everybody has it
            db.execute(sql.SQL("SET ROLE {}").format(owner))
            migrations.install(db, "public")
            db.execute("CREATE TABLE tasks (id int PRIMARY KEY, title text)")
            tracking.track(db, "public", "tasks")
            db.execute("RESET ROLE")
            closed(db, f"cdc_capture_{name}_public")
        yield well.dsn(name)
        admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.fixture
def db(shop: str) -> Iterator[psycopg.Connection]:
    with psycopg.connect(shop, autocommit=True) as connection:
        yield connection


@pytest.fixture
def role(shop: str, db: psycopg.Connection) -> Iterator[str]:
    """A role that may log in and nothing else; its name."""
    name = f"weak_{uuid.uuid4().hex[:8]}"
    db.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(name)))
    yield name
    db.execute(sql.SQL("DROP OWNED BY {}; DROP ROLE {}").format(*[sql.Identifier(name)] * 2))


@pytest.fixture
def slot(shop: str, db: psycopg.Connection) -> Iterator[str]:
    """A name for ``--slot-name``; what is there at the end is dropped."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    yield name
    with psycopg.connect(shop, autocommit=True) as connection:
        in_use = "SELECT FROM pg_replication_slots WHERE slot_name = %s AND active"
        eventually(lambda: not connection.execute(in_use, [name]).fetchall(), what="the slot is left alone")
        connection.execute(
            "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = %s", [name]
        )


# What is well


def test_where_all_is_well_it_ends_with_0_and_leaves_nothing_behind(shop: str, db: psycopg.Connection) -> None:
    result = run(shop, "--handlers", "tests.handlers:router")
    assert result.exit_code == 0
    verdicts = {line.split()[1]: line.split()[0] for line in result.stdout.splitlines() if not line.startswith(" ")}
    assert {name for name, severity in verdicts.items() if severity != "ok"} <= {"publication", "unrouted"}
    left = "SELECT FROM pg_replication_slots WHERE database = current_database()"
    eventually(lambda: not db.execute(left).fetchall(), what="the session that had the temporary slot is gone")
    assert db.execute("SELECT count(*) FROM pg_publication").fetchone() == (0,)
    assert db.execute("SELECT count(*) FROM entity_changes").fetchone() == (0,)


def test_json_has_the_id_the_verdict_the_detail_and_the_remedies_of_each_check(shop: str) -> None:
    found = findings(shop)
    assert {frozenset(each) for each in found.values()} == {frozenset({"id", "severity", "detail", "remedies"})}
    assert {each["severity"] for each in found.values()} <= {"ok", "warn", "fail", "skip"}
    assert f"{servers.preferred_plugin()} has decoded a message" in found["plugin"]["detail"]


def test_pgoutput_is_proven_as_well_and_asks_for_its_publication(shop: str, db: psycopg.Connection, role: str) -> None:
    db.execute(sql.SQL("ALTER ROLE {} REPLICATION").format(sql.Identifier(role)))
    closed(db, role)
    options = ("--slot-plugin", "pgoutput", "--stream-dsn", make_conninfo(shop, user=role))
    found = findings(shop, *options)
    assert found["plugin"]["detail"] == "pgoutput has decoded a message"
    assert found["publication"]["severity"] == "fail"
    apply(shop, run(shop, *options, "--fix").stdout)
    assert troubles(shop, *options) == {}
    db.execute("DROP PUBLICATION cdc_public; CREATE PUBLICATION cdc_public FOR TABLE tasks")
    assert "public.tasks" in findings(shop, "--slot-plugin", "pgoutput")["publication"]["detail"]


def test_warnings_count_when_one_is_strict(shop: str, db: psycopg.Connection) -> None:
    tracking.untrack(db, "public", "tasks")
    assert run(shop).exit_code == 0
    assert run(shop, "--strict").exit_code == 1
    assert troubles(shop) == {"triggers": "warn"}


@pytest.mark.server
def test_a_server_as_it_is_installed_is_examined_and_mended() -> None:
    with TempServer(durable=False) as server:
        apply(server.dsn(), run(server.dsn(), "--fix").stdout)
        left = troubles(server.dsn())
        left.pop("version", None)  # a version that is maintained no more
        left.pop("creators", None)  # before 15
        assert left == {"message-senders": "warn", "triggers": "warn"}
        assert "has decoded a message" in findings(server.dsn())["plugin"]["detail"]
        apply(server.dsn(), run(server.dsn(), "--fix").stdout)
        assert findings(server.dsn())["message-senders"]["severity"] == "ok"


# The server


def test_a_server_that_cannot_be_reached_is_a_finding_and_no_error(well: TempServer) -> None:
    result = run(make_conninfo(well.dsn("nosuch"), password=PASSWORD))
    assert result.exit_code == 1
    first, second, *_ = result.stdout.splitlines()
    assert first.startswith("fail    connect")
    assert "createdb" in second
    assert "unknown backlog" in result.stdout


def test_wal_that_is_not_logical_is_mended_by_the_script_and_a_restart() -> None:
    settings = {"wal_level": "replica", "max_slot_wal_keep_size": "-1"}
    with TempServer(durable=False, settings=settings) as server:
        dsn = server.dsn()
        found = findings(dsn)
        assert {found[name]["severity"] for name in ("wal-level", "slot-limits", "schema")} == {"fail"}
        assert found["plugin"]["severity"] == "skip"
        assert "restart" in found["wal-level"]["remedies"][1]
        apply(dsn, run(dsn, "--fix").stdout)
        server.restart()
        # What is left needs a decision: which table.
        assert troubles(dsn) == {"message-senders": "warn", "triggers": "warn"}


def test_a_server_without_a_free_slot_or_walsender_names_who_has_them() -> None:
    settings = {"max_replication_slots": "1", "max_wal_senders": "1", "max_slot_wal_keep_size": "1GB"}
    with TempServer(durable=False, settings=settings) as server, psycopg.connect(server.dsn(), autocommit=True) as db:
        db.execute("SELECT pg_create_physical_replication_slot('backup')")
        found = findings(server.dsn())
        assert found["slots-free"]["severity"] == "fail"
        assert "backup" in found["slots-free"]["remedies"][1]
        assert (found["plugin"]["severity"], "see slots-free" in found["plugin"]["detail"]) == ("skip", True)
        with psycopg.connect(server.dsn(), replication="true", autocommit=True):
            found = findings(server.dsn())
        assert found["walsenders-free"]["severity"] == found["stream-connect"]["severity"] == "fail"
        apply(server.dsn(), run(server.dsn(), "--fix").stdout)
        server.restart()
        assert findings(server.dsn())["slots-free"]["severity"] == "ok"


def test_for_a_role_without_replication_the_remedy_is_named(shop: str, db: psycopg.Connection, role: str) -> None:
    weak = make_conninfo(shop, user=role)
    found = findings(shop, "--stream-dsn", weak)
    assert found["replication-role"]["remedies"][0] == f'ALTER ROLE "{role}" REPLICATION;'
    assert found["stream-connect"]["severity"] == found["plugin"]["severity"] == "skip"
    apply(shop, run(shop, "--stream-dsn", weak, "--fix").stdout)
    assert troubles(shop, "--stream-dsn", weak) == {}


def test_a_standby_is_distinguished_from_a_primary_and_nothing_is_tried_on_it() -> None:
    with TempServer(durable=False) as server:
        (server.data / "standby.signal").touch()
        server.restart()
        found = findings(server.dsn())
    assert found["recovery"]["severity"] == "fail"
    assert "target_session_attrs" in found["recovery"]["remedies"][0]
    assert found["plugin"]["severity"] == "skip"


# The plugin


def asked(dsn: str, **fields: Any) -> dict[str, Finding]:
    subject = Subject(**{"dsn": dsn, "stream_dsn": dsn, "schema": "public", "slot": "cdc", **fields})
    return {found.check: found for found in examine(subject)}


def test_a_plugin_that_is_not_installed_is_distinguished_from_a_role_and_a_list(
    shop: str, db: psycopg.Connection
) -> None:
    allow(db, "nosuch")
    found = asked(shop, plugin="nosuch")["plugin"]
    assert (found.severity, "nosuch is not installed" in found.detail) == (Severity.FAIL, True)
    assert "postgresql-NN-nosuch" in found.remedy


@pytest.mark.needs("wal2json")
def test_a_plugin_that_swallows_our_messages_has_not_proven_anything(
    shop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    misled = wal2json.plugin("entity_change:elsewhere")
    monkeypatch.setattr(wal2json, "plugin", lambda _prefix: misled)
    found = asked(shop, plugin="wal2json")["plugin"]
    assert (found.severity, found.detail) == (Severity.FAIL, "wal2json did not pass on a message")


def test_an_open_write_transaction_that_delays_the_proof_is_named(shop: str) -> None:
    with psycopg.connect(shop, application_name="nightly batch") as writer:
        writer.execute("SELECT pg_current_xact_id()")
        pid = writer.info.backend_pid
        found = asked(shop, old_transaction_s=0.0)
    assert found["plugin"].severity == found["old-transactions"].severity == Severity.WARN
    for said in (found["plugin"].remedy, found["old-transactions"].detail):
        assert f"process {pid}" in said
        assert "nightly batch" in said
        assert " s old" in said
    assert f"pg_terminate_backend({pid})" in found["old-transactions"].remedy


def test_a_prepared_transaction_is_named_with_what_ends_it() -> None:
    with (
        TempServer(durable=False, settings={"max_prepared_transactions": "2"}) as server,
        psycopg.connect(server.dsn(), autocommit=True) as db,
    ):
        db.execute("BEGIN; SELECT pg_current_xact_id(); PREPARE TRANSACTION 'it''s left'")
        found = asked(server.dsn(), old_transaction_s=0.0)
        assert "it's left" in found["old-transactions"].detail
        assert "ROLLBACK PREPARED 'it''s left';" in found["old-transactions"].remedy
        assert "it's left" in found["plugin"].remedy
        db.execute("ROLLBACK PREPARED 'it''s left'")


def test_for_a_role_that_sees_no_ages_the_right_is_named_and_the_writer_is_shown(
    shop: str, db: psycopg.Connection, role: str
) -> None:
    with psycopg.connect(shop, application_name="batch") as writer:
        writer.execute("SELECT pg_current_xact_id()")
        found = findings(make_conninfo(shop, user=role), "--no-stream")["old-transactions"]
        assert f"process {writer.info.backend_pid}" in found["detail"]
    assert found["severity"] == "warn"
    assert "pg_read_all_stats" in found["remedies"][0]


# The slot


def test_another_programs_slot_under_our_name_is_not_touched(shop: str, db: psycopg.Connection, slot: str) -> None:
    db.execute("SELECT pg_create_logical_replication_slot(%s, 'test_decoding')", [slot])
    found = findings(shop, "--slot-name", slot)["slot"]
    assert found["severity"] == "fail"
    assert "test_decoding" in found["detail"]
    assert "pg_drop_replication_slot" not in run(shop, "--slot-name", slot, "--fix").stdout


def test_another_databases_slot_under_our_name_is_a_failure(
    well: TempServer, shop: str, db: psycopg.Connection, slot: str
) -> None:
    slots.create(db, slot)
    found = findings(well.dsn(), "--slot-name", slot)["slot"]
    assert found["severity"] == "fail"
    assert db.info.dbname in found["detail"]


def test_a_stranger_who_reads_our_slot_is_named(shop: str, db: psycopg.Connection, slot: str) -> None:
    slots.create(db, slot)
    with closing(psycopg.connect(shop, replication="database", autocommit=True, application_name="tailer")) as reader:
        start = sql.SQL("START_REPLICATION SLOT {} LOGICAL 0/0 (\"format-version\" '2')").format(sql.Identifier(slot))
        reader.pgconn.exec_(start.as_bytes(None))
        found = findings(shop, "--slot-name", slot)
        assert found["slot"]["severity"] == "fail"
        assert f"process {reader.info.backend_pid} (tailer)" in found["slot"]["detail"]
        assert found["walsenders-free"]["severity"] == "ok"
    eventually(lambda: not slots.status(db, slot).active)


def test_a_lost_slot_is_found_and_the_script_makes_room_for_a_new_one() -> None:
    settings = {"max_slot_wal_keep_size": "1MB", "min_wal_size": "32MB", "max_wal_size": "32MB"}
    with TempServer(durable=False, settings=settings) as server, psycopg.connect(server.dsn(), autocommit=True) as db:
        slots.create(db, "cdc")
        lose(db, "cdc")
        found = findings(server.dsn())
        assert found["slot"]["severity"] == "fail"
        assert "cdc slot recreate cdc" in found["slot"]["remedies"][1]
        assert found["slot-limits"]["severity"] == "warn"
        apply(server.dsn(), run(server.dsn(), "--fix").stdout)
        assert slots.snapshot(db, "cdc") is None
        found = findings(server.dsn())
        assert found["slot"]["severity"] == found["slot-limits"]["severity"] == "ok"


# The outbox


def test_an_outbox_that_is_elsewhere_is_pointed_out(shop: str, db: psycopg.Connection) -> None:
    found = findings(shop, "--schema", "events")
    assert found["schema"]["severity"] == "fail"
    assert "there is one in public" in found["schema"]["detail"]
    migrations.install(db, "events")
    assert findings(shop)["outboxes"]["severity"] == "warn"
    assert findings(shop, "--slot-name", "shop")["outboxes"]["severity"] == "ok"


def test_an_older_outbox_is_brought_up_to_date_by_the_script(shop: str, db: psycopg.Connection) -> None:
    db.execute("DELETE FROM cdc_migrations WHERE version = 14; DROP VIEW recent_action_history")
    found = findings(shop)["schema"]
    assert (found["severity"], "0014 views" in found["detail"]) == ("fail", True)
    assert found["remedies"] == [f"cdc db upgrade, as {db.info.dbname}_owner"]
    apply(shop, run(shop, "--fix").stdout)
    assert findings(shop)["schema"]["severity"] == "ok"


def test_a_trigger_that_is_disabled_is_enabled_by_the_script(shop: str, db: psycopg.Connection) -> None:
    db.execute('CREATE TABLE "Odd One" (id int PRIMARY KEY) PARTITION BY RANGE (id)')
    db.execute('CREATE TABLE odd_1 PARTITION OF "Odd One" FOR VALUES FROM (0) TO (10)')
    tracking.track(db, "public", '"Odd One"')
    db.execute('ALTER TABLE tasks DISABLE TRIGGER "#cdc_capture"; ALTER TABLE odd_1 DISABLE TRIGGER "#cdc_capture"')
    found = findings(shop)["triggers"]
    assert found["severity"] == "fail"
    assert "tasks" in found["detail"]
    assert "odd_1" in found["detail"]
    assert 'ALTER TABLE "public"."tasks" ENABLE TRIGGER "#cdc_capture";' in found["remedies"]
    apply(shop, run(shop, "--fix").stdout)
    assert troubles(shop) == {}


def test_a_key_column_that_is_gone_is_named_before_the_next_write_fails(shop: str, db: psycopg.Connection) -> None:
    db.execute("ALTER TABLE tasks RENAME id TO task_id")
    found = findings(shop)["triggers"]
    assert (found["severity"], "tasks has no column id" in found["detail"]) == ("fail", True)


@pytest.mark.parametrize("lacking", ["schema", "select", "column", "shards", "leases", "attempts", "floors", "numbers"])
def test_each_missing_right_is_named_by_its_grant(shop: str, db: psycopg.Connection, role: str, lacking: str) -> None:
    weak = make_conninfo(shop, user=role)
    apply(shop, run(weak, "--no-stream", "--fix").stdout)
    assert troubles(weak, "--no-stream") == BLIND
    revoke, grant = {
        "schema": ("USAGE ON SCHEMA public FROM PUBLIC, {}", 'GRANT USAGE ON SCHEMA "public" TO "{}";'),
        "select": ("SELECT ON entity_changes FROM {}", 'GRANT SELECT ON "public"."entity_changes" TO "{}";'),
        "column": ("UPDATE (dead_at) ON entity_changes FROM {}",
                   'GRANT UPDATE ("dead_at") ON "public"."entity_changes" TO "{}";'),
        "shards": ("DELETE ON cdc_shards FROM {}",
                   'GRANT SELECT, INSERT, UPDATE, DELETE ON "public"."cdc_shards" TO "{}";'),
        "leases": ("UPDATE ON cdc_limit_leases FROM {}",
                   'GRANT SELECT, INSERT, UPDATE, DELETE ON "public"."cdc_limit_leases" TO "{}";'),
        "attempts": ("INSERT ON change_attempts FROM {}",
                     'GRANT SELECT, INSERT, DELETE ON "public"."change_attempts" TO "{}";'),
        "floors": ("INSERT ON cdc_positions FROM {}",
                   'GRANT SELECT, INSERT, UPDATE ON "public"."cdc_positions" TO "{}";'),
        "numbers": ("SELECT ON SEQUENCE entity_changes_seq_seq FROM {}",
                    'GRANT SELECT ON SEQUENCE "public"."entity_changes_seq_seq" TO "{}";'),
    }[lacking]  # fmt: skip
    db.execute(sql.SQL("REVOKE " + revoke).format(sql.Identifier(role)))
    found = findings(weak, "--no-stream")["grants"]
    assert found["remedies"] == [grant.format(role)]
    apply(shop, run(weak, "--no-stream", "--fix").stdout)
    assert troubles(weak, "--no-stream") == BLIND


def test_retention_needs_the_right_to_delete(shop: str, db: psycopg.Connection, role: str) -> None:
    weak = make_conninfo(shop, user=role)
    apply(shop, run(weak, "--no-stream", "--fix").stdout)
    found = findings(weak, "--no-stream", "--retention", "30d")["grants"]
    assert found["remedies"] == [f'GRANT DELETE ON "public"."entity_changes" TO "{role}";']


def test_a_capture_function_that_everybody_may_call_is_shut_by_the_script(shop: str, db: psycopg.Connection) -> None:
    db.execute("GRANT EXECUTE ON FUNCTION capture_entity_change() TO PUBLIC")
    assert troubles(shop) == {"schema": "fail", "capture-function": "fail"}
    apply(shop, run(shop, "--fix").stdout)
    assert troubles(shop) == {}


def test_a_table_that_autovacuum_leaves_out_is_put_back(shop: str, db: psycopg.Connection) -> None:
    db.execute("ALTER TABLE entity_changes SET (autovacuum_enabled = off)")
    assert findings(shop)["autovacuum"]["severity"] == "fail"
    apply(shop, run(shop, "--fix").stdout)
    assert findings(shop)["autovacuum"]["severity"] == "ok"


def test_a_stranger_that_holds_shards_is_named_and_not_ended(shop: str, db: psycopg.Connection) -> None:
    with psycopg.connect(shop, autocommit=True, application_name="batch") as stranger:
        stranger.execute(
            "SELECT pg_advisory_lock(%s, shard) FROM generate_series(3, 5) AS shard", [lock_class("public")]
        )
        found = findings(shop)["shard-holders"]
        assert found["severity"] == "fail"
        assert f"process {stranger.info.backend_pid} (batch, role {stranger.info.user}): 3" in found["detail"]
        apply(shop, run(shop, "--fix").stdout)
        assert stranger.execute("SELECT 1").fetchone() == (1,)


async def test_a_consumer_at_work_is_found_well_and_seen_at_its_shards_and_its_slot(shop: str, slot: str) -> None:
    router = Router()
    router.on("tasks")(lambda change: None)
    async with consuming(shop, router, slot_name=slot) as app:

        async def at_work() -> bool:
            owned, streaming = (metric(app.metrics.registry, n) for n in ("cdc_shards_owned", "cdc_stream_connected"))
            return owned == 64 and streaming == 1

        await eventually_async(at_work, what="it has all shards and streams")
        found = await asyncio.to_thread(asked, shop, slot=slot, handles=lambda *_: True)
    assert {each.check for each in found.values() if each.severity in (Severity.FAIL, Severity.WARN)} == set()
    assert found["shard-holders"].detail == "64 of 64 shards are held; consumers: 1"
    assert "read by process" in found["slot"].detail


def test_a_backlog_and_dead_letters_are_warned_of(shop: str, db: psycopg.Connection) -> None:
    db.execute("INSERT INTO tasks VALUES (1), (2)")
    db.execute("UPDATE entity_changes SET changed_at = now() - interval '1 hour'")
    db.execute("UPDATE entity_changes SET dead_at = now() WHERE entity_id = '1'")
    found = findings(shop)
    assert "60 min" in found["backlog"]["detail"]
    assert found["dead"]["detail"] == "there are dead letters: 1"
    assert troubles(shop) == {"backlog": "warn", "dead": "warn"}


def test_a_change_that_its_handler_snoozes_from_day_to_day_is_warned_of(shop: str, db: psycopg.Connection) -> None:
    db.execute("INSERT INTO tasks VALUES (1), (2), (3)")
    db.execute("UPDATE entity_changes SET next_attempt_at = now() + '1 h', error_summary = 'snoozed'")
    assert troubles(shop) == {}
    db.execute("UPDATE entity_changes SET changed_at = now() - interval '2 days' WHERE entity_id < '3'")
    assert findings(shop)["backlog"]["detail"].endswith("captured more than a day ago: 2")
    assert troubles(shop) == {"backlog": "warn"}
    db.execute("UPDATE entity_changes SET processed = true")  # by hand, and next_attempt_at stays
    assert troubles(shop) == {}


# Here


def test_handlers_that_do_not_load_are_a_finding(shop: str) -> None:
    found = findings(shop, "--handlers", "tests.nosuch:router")["handlers"]
    assert (found["severity"], "tests.nosuch" in found["detail"]) == ("fail", True)


def test_so_are_those_of_a_section_and_a_section_that_names_none(shop: str, tmp_path: Path) -> None:
    file = tmp_path / "cdc.toml"
    for section, said in (
        ('handlers = "tests.nosuch:router"', "tests.nosuch"),
        ("threads = 2", "[subscription.search] names no handlers"),
    ):
        file.write_text(f"[subscription.search]\n{section}\n")
        found = findings(shop, "--config", str(file), "--handlers", "tests.handlers:router")["handlers"]
        assert (found["severity"], said in found["detail"]) == ("fail", True), found


@pytest.mark.parametrize(("types", "severity"), [([], "ok"), (["--type", "task"], "ok"), (["--type", "order"], "warn")])
def test_what_is_captured_and_not_delivered_is_warned_of(types: list[str], severity: str, shop: str) -> None:
    with psycopg.connect(shop, autocommit=True) as db:
        tracking.untrack(db, "public", "tasks")
        tracking.track(db, "public", "tasks", entity_type="task")
    assert findings(shop, "--deliver-to", "http://127.0.0.1:3000/", *types)["unrouted"]["severity"] == severity


def test_a_settings_file_with_a_dsn_that_everybody_may_read_is_warned_of(shop: str, tmp_path: Path) -> None:
    file = tmp_path / "cdc.toml"
    file.write_text(f"dsn = {json.dumps(make_conninfo(shop, password=PASSWORD))}\n")
    file.chmod(0o644)

    def severity() -> str:
        result = CliRunner().invoke(cdc, ["doctor", "--json", "--no-stream", "--config", str(file)])
        assert PASSWORD not in result.output
        return str({each["id"]: each for each in json.loads(result.stdout)["findings"]}["config"]["severity"])

    assert severity() == "warn"
    file.chmod(stat.S_IRUSR)
    assert severity() == "ok"


def test_a_stream_that_is_switched_off_is_not_examined_but_a_slot_that_was_left_behind_is(
    shop: str, db: psycopg.Connection, slot: str
) -> None:
    found = findings(shop, "--no-stream", "--slot-name", slot)
    of_the_stream = ("wal-level", "stream-connect", "plugin", "replication-role", "slot", "slot-limits")
    assert {found[name]["severity"] for name in of_the_stream} == {"skip"}
    slots.create(db, slot)
    found = findings(shop, "--no-stream", "--slot-name", slot)
    assert "read by no consumer" in found["slot"]["detail"]
