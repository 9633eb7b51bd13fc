"""The doctor's checks, facts in and findings out; and the script that is made of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from cdc.core.model import ChangeState, Operation
from cdc.core.pauses import Pause
from cdc.diagnostics import check_outbox, check_replication, check_server, check_subscriptions, check_tables
from cdc.diagnostics.facts import (
    Astray,
    Backlog,
    Captured,
    CaptureFunctionFacts,
    Creators,
    DataReader,
    DataReaders,
    Decoding,
    IndexFacts,
    Installed,
    Numbering,
    OpenTransactions,
    Proof,
    ReplicationLink,
    Rights,
    RowSecurity,
    Senders,
    ServerFacts,
    SessionFacts,
    ShardHolders,
    SlotFacts,
    Subject,
    SubscriptionFacts,
    SubscriptionsFacts,
    TableFacts,
    Transaction,
    Unhandled,
)
from cdc.diagnostics.findings import Absent, Finding, Severity, Unknown, fail, ok, run_checks, warn
from cdc.diagnostics.fix_script import script
from cdc.postgres import remarks
from cdc.postgres.pages import Barrier, DueLater
from cdc.postgres.tracked_tables import Copy, Fires, Tracked
from cdc.postgres.tracked_tables import SourceTable as TrackedTable
from tests.unit.replication.test_slot_health import slot

SUBJECT = Subject(dsn=None, stream_dsn=None, schema="public", slot="cdc")
SESSION = SessionFacts(
    place="host=db", role="cdc", is_local=False, encrypted=True, sslmode="verify-full", handshake_pid=1, pids=(1, 1),
    sees_all_sessions=True, settings={}, idle_session_timeout_s=0, idle_in_transaction_timeout_s=0,
)  # fmt: skip
SERVER = ServerFacts(
    version_num=150_018, version="15.18", in_recovery=False, reads_by_default=False,
    server_time=datetime(2026, 10, 5, tzinfo=UTC),
    clock_ahead_s=0.1, wal_level="logical", slots=3, slots_max=10, idle_slots=("old",), walsenders=1,
    walsenders_max=10, slot_keep_bytes=10 << 30, slot_idle_timeout_s=None, notify_queue_ratio=0.0,
)  # fmt: skip
LINK = ReplicationLink(
    role="cdc", may_replicate=True, encrypted=True, is_local=False, sslmode="verify-full", wal_sender_timeout_s=15.0,
    wanted_timeout_s=15.0, status_interval_s=2.5,
)  # fmt: skip
DECODING = Decoding(
    role="cdc", proofs=(Proof("wal2json"),), allowed=None, publication="cdc_public", published=None, may_publish=False
)  # fmt: skip
PGOUTPUT = replace(DECODING, proofs=(Proof("pgoutput"),), published=())
SLOT_FACTS = SlotFacts(slot=slot(), keep_bytes=10 << 30, idle_timeout_s=None)
OLD = Transaction(
    pid=42, gid=None, database="shop", application_name="batch", state="idle in transaction", age_s=900.0, writes=True,
    ends_it="SELECT pg_terminate_backend(42);",
)  # fmt: skip
PREPARED = replace(OLD, pid=None, gid="x'y", ends_it="ROLLBACK PREPARED 'x''y';")
OPEN = OpenTransactions(
    old=(), limit_s=300.0, sees_all=True, oldest_writer=None, waiting_commits=(), synchronous_standbys=""
)
INSTALLED = Installed(schema="public", exists=True, pending=(), differences=(), elsewhere=(), script="")
CAPTURE = CaptureFunctionFacts(
    name="public.capture_entity_change()", owner="app", owner_is_superuser=False, security_definer=True,
    settings=("search_path=pg_catalog, pg_temp",), public_may_call=False,
)  # fmt: skip
TRIGGER = Tracked(
    table="tasks", trigger="#cdc_capture", entity_type="task", operations=(Operation.INSERT, Operation.DELETE),
    key=("id",), oid=1, namespace="public", name="tasks", root="tasks",
)  # fmt: skip
CAPTURED = Captured(triggers=(TRIGGER,))
ROW_SECURITY = RowSecurity(role="cdc", tables=(), active=())
GRANTED = DataReader(role="grafana", tables=("public.entity_changes",), by_default=(), intended=True)
SNOOP = DataReader(role="an", tables=("public.cdc_due_changes",), intended=False, by_default=("ALTER ...;",))
READERS = DataReaders(owner="app", readers=(GRANTED,))
MESSAGES = ("pg_catalog.m(boolean, text, bytea)", "pg_catalog.m(boolean, text, text)")
CREATORS = Creators(schema="public", others=())
SENDERS = Senders(open_to_all=(), owners=("app",), others=("queue",))
ASTRAY = Astray(table='"public"."entity_changes"', rows=0)
NUMBERS = Numbering(role="cdc", table='"public"."entity_changes"', sequence="public.s", last=9, highest=9)
RIGHTS = Rights(role="cdc", grants=(), schema="public")
HOLDERS = ShardHolders(held=64, consumers=2, strangers=())
TABLE = TableFacts(name="public.entity_changes", autovacuum=True, excluded=False, tuned=True, live=100, dead=5)
SEARCH = SubscriptionFacts(
    name="search", consumers=1, paused=False, behind=3, held_back=1, oldest_age_s=10.0
)  # fmt: skip
INDEX = IndexFacts(name="public.s", valid=True, creation="CREATE ...;")
SUBSCRIPTIONS = SubscriptionsFacts(indexes=(INDEX,), each=(SEARCH,))
BACKLOG = Backlog(fresh=3, waiting=1, dead=0, oldest_ready_age_s=1.0, due_later=DueLater(3, 60.0), pauses=())
PAUSE = Pause(1, entity_type="order", because="the provider is down", set_by="anna", age_s=90_000.0)


def checks_of(facts: Any, subject: Subject = SUBJECT) -> dict[str, Callable[[Any], Finding]]:
    found = facts.slot if isinstance(facts, SlotFacts) else None
    by_kind: dict[type, Any] = {
        SessionFacts: check_server.of_session(60.0),
        ServerFacts: {**check_server.SERVER, **check_replication.of_server(found)},
        OpenTransactions: check_server.TRANSACTIONS,
        ReplicationLink: check_replication.LINK,
        Decoding: check_replication.of_decoding(found),
        SlotFacts: check_replication.of_slot(subject),
        Installed: check_outbox.of_installed(subject.slot),
        CaptureFunctionFacts: check_outbox.CAPTURE,
        Captured: check_tables.of_captured(subject),
        RowSecurity: check_outbox.ROW_SECURITY,
        DataReaders: check_outbox.READERS,
        Creators: check_outbox.CREATORS,
        Senders: check_outbox.SENDERS,
        Numbering: check_outbox.NUMBERING,
        Astray: check_outbox.ASTRAY,
        Rights: check_outbox.RIGHTS,
        ShardHolders: check_outbox.SHARDS_HELD,
        TableFacts: check_outbox.TABLE,
        Backlog: check_outbox.BACKLOG,
        Unhandled: check_outbox.UNHANDLED,
        SubscriptionsFacts: check_subscriptions.SUBSCRIPTIONS,
        Subject: check_outbox.LOCAL,
    }
    return dict(by_kind[type(facts)])


def check(name: str, facts: Any, subject: Subject = SUBJECT) -> Finding:
    return checks_of(facts, subject)[name](facts)


HEALTHY = (SESSION, SERVER, OPEN, LINK, DECODING, SLOT_FACTS, INSTALLED, CAPTURE, CAPTURED, RIGHTS,
           ROW_SECURITY, READERS, CREATORS, SENDERS, NUMBERS, ASTRAY, HOLDERS, TABLE, BACKLOG,
           SUBSCRIPTIONS,
           Unhandled(()), SUBJECT)  # fmt: skip


@pytest.mark.parametrize("facts", HEALTHY, ids=lambda facts: type(facts).__name__)
def test_what_is_well_asks_for_nothing(facts: Any) -> None:
    for found in run_checks(facts, checks_of(facts)):
        assert found.severity in (Severity.OK, Severity.SKIP), found
        assert found.detail
        assert found.remedies == []


@pytest.mark.parametrize("facts", HEALTHY, ids=lambda facts: type(facts).__name__)
def test_a_check_that_cannot_look_says_why(facts: Any) -> None:
    checks = checks_of(facts)
    found = list(run_checks(Unknown("permission denied"), checks))
    assert [each.check for each in found] == list(checks)
    assert {(each.severity, each.detail) for each in found} == {(Severity.UNKNOWN, "permission denied")}
    assert {each.severity for each in run_checks(Absent("it is switched off"), checks)} == {Severity.SKIP}


PROVEN = "pgoutput has decoded a message"
REFUSED = Proof("wal2json", "plugin_refused", "the server does not allow wal2json", "as a superuser: ...")
MISSING = Proof("wal2json", "plugin_missing", "wal2json is not installed", "install it there")

OK, WARN, FAIL, SKIP, UNKNOWN = Severity.OK, Severity.WARN, Severity.FAIL, Severity.SKIP, Severity.UNKNOWN

COPY = Copy(namespace="public", name="tasks_1", spelt="tasks_1", trigger="#cdc_capture", fires=Fires.ORIGIN)

TENANT = replace(TRIGGER, name="tasks", all_schemas="b*")

SILENT = replace(COPY, fires=Fires.DISABLED)


def remarked(*triggers: Tracked) -> Captured:
    """As looked at in the catalogs, where nothing about the tables is to be remarked."""
    said = [remark for each in triggers for remark in (*remarks.faults(each), *remarks.cautions(PLAIN, each))]
    return Captured(triggers=triggers, remarks=(*said, *remarks.doubled(triggers), *remarks.shared(triggers)))


PLAIN = TrackedTable(
    oid=1, namespace="public", name="tasks", spelt="tasks", kind="r", root=None, columns=("id", "a", "card")
)

TROUBLES: list[tuple[str, Any, Severity, str, str]] = [
    # check, facts, severity, a word of the detail, a word of the remedy
    ("tls", replace(SESSION, encrypted=False), WARN, "not encrypted", "verify-full"),
    ("tls", replace(SESSION, sslmode="require"), WARN, "sslmode=require", "sslrootcert"),
    ("pooler", replace(SESSION, pids=(1, 2)), FAIL, "another session", "itself"),
    ("pooler", replace(SESSION, handshake_pid=9), WARN, "in between", "session mode"),
    ("keepalives", replace(SESSION, settings={"tcp_user_timeout": "0"}), WARN, "tcp_user_timeout is 0", "proxy"),
    ("session-timeouts", replace(SESSION, idle_session_timeout_s=600), WARN, "10 min",
     'ALTER ROLE "cdc" SET idle_session_timeout = 0;'),
    ("session-timeouts", replace(SESSION, idle_in_transaction_timeout_s=30), WARN, "30 s", "ALTER ROLE"),
    ("version", replace(SERVER, version_num=130_014), FAIL, "too old", "upgrade"),
    ("version", replace(SERVER, server_time=datetime(2027, 12, 1, tzinfo=UTC)), WARN, "2027-11-11", "upgrade"),
    ("recovery", replace(SERVER, in_recovery=True), FAIL, "standby", "target_session_attrs"),
    ("recovery", replace(SERVER, reads_by_default=True), WARN, "read only by default", "RESET"),
    ("clock", replace(SERVER, clock_ahead_s=-3.0), WARN, "3.0 s", "NTP"),
    ("notify-queue", replace(SERVER, notify_queue_ratio=0.6), WARN, "60%", "listens"),
    ("wal-level", replace(SERVER, wal_level="replica"), FAIL, "replica", "ALTER SYSTEM SET wal_level = logical;"),
    ("slots-free", replace(SERVER, slots=10), FAIL, "10 of 10", "old"),
    ("walsenders-free", replace(SERVER, walsenders=10), FAIL, "10 of 10", "max_wal_senders = 15"),
    ("old-transactions", replace(OPEN, old=(OLD,)), WARN, "process 42, 15 min old, database shop, batch",
     r"pg_terminate_backend\(42\)"),
    ("old-transactions", replace(OPEN, old=(PREPARED,)), WARN, "prepared transaction x'y", "ROLLBACK PREPARED"),
    ("sync-standby", replace(OPEN, synchronous_standbys="s1", waiting_commits=(7,)), WARN, "process 7", "standby"),
    ("stream-connect", replace(LINK, refused=("no entry", "add a line")), FAIL, "no entry", "add a line"),
    ("stream-tls", replace(LINK, encrypted=False), WARN, "not encrypted", "verify-full"),
    ("replication-role", replace(LINK, may_replicate=False), FAIL, "cdc", 'ALTER ROLE "cdc" REPLICATION;'),
    ("replication-role", replace(LINK, role='a"b', may_replicate=False), FAIL, 'a"b', 'ALTER ROLE "a""b" REPL'),
    ("sender-timeout", replace(LINK, wal_sender_timeout_s=0.0), WARN, "for ever", "CDC_STREAM_DSN"),
    ("sender-timeout", replace(LINK, wal_sender_timeout_s=5.0), FAIL, "too short", "CDC_STREAM_DSN"),
    ("sender-timeout", replace(LINK, wal_sender_timeout_s=60.0), WARN, "not the 15 s", "CDC_STREAM_DSN"),
    ("plugin", replace(DECODING, proofs=(MISSING,)), FAIL, "not installed", "install it there"),
    ("plugin", replace(DECODING, proofs=(REFUSED,)), FAIL, "not allow",
     'ALTER ROLE "cdc" SET output_plugin_libraries = pgoutput, test_decoding, wal2json;'),
    ("plugin", replace(DECODING, proofs=(Proof("wal2json", "slot_missing", "a transaction is open", "end it"),)),
     WARN, "not proven: a transaction is open", "end it"),
    ("plugin-allowed", replace(DECODING, allowed="pgoutput, test_decoding"), FAIL, "without wal2json",
     "output_plugin_libraries = pgoutput, test_decoding, wal2json;"),
    ("plugin-allowed", replace(DECODING, allowed='"pgoutput, test_decoding, wal2json"'), FAIL, "without wal2json",
     "ALTER ROLE"),
    ("publication", replace(PGOUTPUT, published=None), FAIL, "no publication cdc_public",
     'CREATE PUBLICATION "cdc_public";'),
    ("publication", replace(PGOUTPUT, published=("public.t",)), WARN, "public.t", "DROP PUBLICATION"),
    ("slot", replace(SLOT_FACTS, slot=slot(ours=False, plugin="test_decoding")), FAIL, "test_decoding",
     "CDC_SLOT_NAME.*cdc slot recreate cdc --force"),
    ("slot", replace(SLOT_FACTS, slot=slot(application_name="pg_recvlogical")), FAIL, "pg_recvlogical", "end that"),
    ("slot", replace(SLOT_FACTS, slot=slot(wal_status="lost", active=False)), FAIL, "lost",
     r"pg_drop_replication_slot\('cdc'\)"),
    ("slot", replace(SLOT_FACTS, slot=slot(retained_wal_bytes=2 << 30, active=False)), FAIL, "2 GB", "consumer"),
    ("slot-limits", replace(SLOT_FACTS, keep_bytes=None), FAIL, "disk is full", "max_slot_wal_keep_size = '10GB';"),
    ("slot-limits", replace(SLOT_FACTS, keep_bytes=16 << 20), WARN, "16 MB", "max_slot_wal_keep_size"),
    ("slot-limits", replace(SLOT_FACTS, idle_timeout_s=60.0), WARN, "idle_replication_slot_timeout", "longer"),
    ("schema", replace(INSTALLED, exists=False), FAIL, "no entity_changes in schema public", "cdc db install"),
    ("schema", replace(INSTALLED, exists=False, elsewhere=("events",)), FAIL, "events: is --schema right", "install"),
    ("schema", replace(INSTALLED, schema="events", pending=("0002 capture",)), FAIL, "0002 capture",
     "cdc db upgrade --schema events"),
    ("schema", replace(INSTALLED, differences=("column seq is missing",)), FAIL, "column seq", "cdc db upgrade"),
    ("outboxes", replace(INSTALLED, elsewhere=("events",)), WARN, "events", "CDC_SLOT_NAME"),
    ("capture-function", replace(CAPTURE, security_definer=False), FAIL, "SECURITY DEFINER", "cdc db upgrade"),
    ("capture-function", replace(CAPTURE, settings=()), FAIL, "search_path", "cdc db upgrade"),
    ("capture-function", replace(CAPTURE, public_may_call=True), FAIL, "forge", "REVOKE ALL ON FUNCTION public"),
    ("capture-function", replace(CAPTURE, owner_is_superuser=True), WARN, "superuser", "role of its own"),
    ("capture-function", replace(CAPTURE, owner_is_superuser=True, others=("app",)), FAIL, "superuser.*app", "its own"),
    ("capture-function", replace(CAPTURE, owns_outbox=True, others=("x",)), WARN, "also owns", "role of its own"),
    ("capture-function", replace(CAPTURE, lacks=("INSERT on entity_changes",)), FAIL, "every write .* lacks INSERT",
     "see schema"),
    ("capture-function", replace(CAPTURE, owns_outbox=True, lacks=("INSERT on entity_changes",), grants=("GRANT x;",)),
     FAIL, "every write .* lacks INSERT", "GRANT x;"),
    ("triggers", Captured(triggers=()), WARN, "no table is tracked", "cdc track TABLE"),
    ("triggers", remarked(replace(TRIGGER, missing=("id",))), FAIL, "tasks has no column id, its key",
     "cdc track tasks --key"),
    ("triggers", remarked(replace(TRIGGER, exclude=("card",), missing=("card",))), FAIL, "no column card, .* left out",
     "cdc track tasks --exclude"),
    ("triggers", remarked(replace(TRIGGER, columns=("id", "a"), missing=("a",))), FAIL, "no column a, .* be captured",
     "cdc track tasks --columns"),
    ("triggers", remarked(replace(TRIGGER, broken="its options are no JSON")), FAIL,
     "every write to tasks fails .* no JSON", "--replace"),
    ("triggers", remarked(replace(TRIGGER, fires=Fires.DISABLED)), FAIL,
     "nothing is captured from tasks: .* disabled",
     'ALTER TABLE "public"."tasks" ENABLE TRIGGER "#cdc_capture";'),
    ("triggers", remarked(replace(TRIGGER, fires=Fires.REPLICA)), FAIL, "fires for replicated rows only",
     "ENABLE TRIGGER"),
    ("triggers", remarked(replace(TRIGGER, copies=(COPY, replace(SILENT, spelt="t2", name="t2")))), FAIL,
     "from t2:", 'ALTER TABLE "public"."t2" ENABLE'),
    ("captured-twice", remarked(TRIGGER, replace(TRIGGER, trigger="by_hand")), FAIL,
     "#cdc_capture of tasks and by by_hand", "--replace"),
    ("captured-twice", remarked(TRIGGER, replace(TRIGGER, oid=2, above=(1,), table="tasks_1")), FAIL,
     "#cdc_capture of tasks and by #cdc_capture of tasks_1", "cdc track tasks --replace"),
    ("trigger-order", remarked(replace(TRIGGER, earlier=("!audit",))), WARN,
     "!audit fires before #cdc_capture of tasks", "RENAME"),
    ("shared-types", remarked(TRIGGER, replace(TRIGGER, oid=2, table="b.tasks", entity_type=None)), WARN,
     "b.tasks and tasks share the type task", "--type"),
    ("all-schemas", Captured(triggers=(TENANT,), remarks=tuple(remarks.unmatched([TENANT], [(9, "b", "tasks")]))), WARN,
     "b.tasks is not tracked, and its schema matches b*", r"cdc track tasks --all-schemas 'b\*'"),
    ("row-security", replace(ROW_SECURITY, tables=("public.entity_changes",), active=("public.entity_changes",)), FAIL,
     "row level security is on for public.entity_changes, and goes for cdc",
     'ALTER TABLE public.entity_changes DISABLE ROW LEVEL SECURITY;.*BYPASSRLS'),
    ("readers", replace(READERS, readers=(GRANTED, SNOOP)), WARN, r"whatever .*: an \(by default privileges\)",
     r'ALTER ...; REVOKE ALL ON TABLE public.cdc_due_changes FROM "an";'),
    ("creators", Creators(schema='o"x', others=("PUBLIC", "app")), WARN, "in schema o\"x, .*: PUBLIC, app",
     'REVOKE CREATE ON SCHEMA "o""x" FROM PUBLIC, "app";'),
    ("message-senders", replace(SENDERS, open_to_all=MESSAGES, owners=("app", 'o"x')), WARN, "every role",
     r'GRANT EXECUTE ON FUNCTION pg_catalog.m\(.* bytea\), .* TO "app"; GRANT .* TO "o""x"; REVOKE .* FROM PUBLIC;'),
    ("sequence", replace(NUMBERS, highest=12), FAIL, "the last number drawn is 9, and there is a change 12",
     r"SELECT setval\('public.s', \(SELECT max\(seq\)"),
    ("sequence", replace(NUMBERS, last=None), UNKNOWN, "cdc may not see",
     'GRANT SELECT ON SEQUENCE public.s TO "cdc";'),
    ("shards", replace(ASTRAY, rows=7), FAIL, "7 or more changes are not in the shard of their key",
     'UPDATE "public"."entity_changes" SET shard = '),
    ("grants", replace(RIGHTS, grants=('GRANT SELECT ON "public"."entity_changes" TO "cdc";',)), FAIL, "lacks",
     "GRANT SELECT"),
    ("shard-holders", replace(HOLDERS, strangers=((9, "psql", 3),)), FAIL, r"process 9 \(psql\): 3",
     r"pg_terminate_backend\(9\)"),
    ("autovacuum", replace(TABLE, autovacuum=False), FAIL, "on the server", "autovacuum = on"),
    ("autovacuum", replace(TABLE, excluded=True), FAIL, "is off for", r"RESET \(autovacuum_enabled\)"),
    ("autovacuum", replace(TABLE, tuned=False), WARN, "settings of a queue", "cdc db upgrade"),
    ("autovacuum", replace(TABLE, dead=20_000), WARN, "20,000 dead rows", "VACUUM"),
    ("backlog", replace(BACKLOG, oldest_ready_age_s=900), WARN, "15 min", "cdc outbox stats"),
    ("backlog", replace(BACKLOG, snoozed=2), WARN, "captured more than a day ago: 2", "cdc outbox discard ID"),
    ("backlog", replace(BACKLOG, oldest_ready_age_s=900, pauses=(Pause(1, handler="send"),)), WARN, "15 min", "paused"),
    ("paused", replace(BACKLOG, pauses=(PAUSE,)), WARN, "the type order, for 25 h, by anna: the provider is down",
     "cdc resume"),
    ("paused", replace(BACKLOG, pauses=None), UNKNOWN, "may not see", "cdc db grant"),
    ("due-later", replace(BACKLOG, due_later=DueLater(2, -300.0)), WARN, "due for 5 min", "cdc db grant"),
    ("due-later", replace(BACKLOG, due_later=None), UNKNOWN, "may not see", "cdc db grant"),
    *(("barriers", replace(BACKLOG, barrier=Barrier("TRUNCATE", "order", 7, state, 600.0, clear)), WARN,
       rf"TRUNCATE 7 of the type order .* 10 min now: {why}", remedy)
      for state, clear, why, remedy in (
        (ChangeState.DEAD, True, "it is a dead letter that pauses", "cdc outbox discard 7, or retry it"),
        (ChangeState.WAITING, True, "it waits for its next attempt", "cdc outbox discard 7"),
        (ChangeState.FRESH, True, "all before it is settled", "does a consumer run"),
        (ChangeState.FRESH, False, "it waits for changes of its type from before it", "cdc outbox list --type order"),
    )),
    ("dead", replace(BACKLOG, dead=2), WARN, "dead letters: 2", "cdc outbox list --state dead"),
    ("subscriptions", replace(SUBSCRIPTIONS, indexes=(replace(INDEX, valid=None),)), FAIL, "missing.* public.s",
     "CREATE ...;"),
    ("subscriptions", replace(SUBSCRIPTIONS, indexes=(replace(INDEX, valid=False),)), FAIL, "not valid",
     "DROP INDEX CONCURRENTLY public.s;"),
    ("subscriptions", replace(SUBSCRIPTIONS, each=()), WARN, "there are none", "DROP INDEX CONCURRENTLY public.s;"),
    ("subscriptions", replace(SUBSCRIPTIONS, each=(replace(SEARCH, consumers=0),)), WARN, r"nobody .* search \(3\)",
     "cdc run --subscription search"),
    ("subscriptions", replace(SUBSCRIPTIONS, each=(replace(SEARCH, consumers=0, behind=0),)), WARN,
     r"nobody .* search \(keeps 1\)", "cdc run --subscription search"),
    ("subscriptions-behind", replace(SUBSCRIPTIONS, each=(replace(SEARCH, oldest_age_s=180_000.0),)), WARN,
     r"search \(1, the oldest 2.1 days old\)", "cdc subscription drop"),
    ("subscription-types", replace(SUBSCRIPTIONS, each=(replace(SEARCH, unknown_types=("ordr",)),)), WARN,
     r"search \(ordr\)", "cdc tracked"),
    ("handlers", replace(SUBJECT, handlers_error=("no module x", "install it")), FAIL, "no module x", "install it"),
    ("config", replace(SUBJECT, exposed_files=("cdc.toml",)), WARN, "cdc.toml", "chmod 600 cdc.toml"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "facts", "severity", "word", "remedy"), TROUBLES)
def test_each_trouble_has_its_severity_and_its_remedy(
    name: str, facts: Any, severity: Severity, word: str, remedy: str
) -> None:
    found = check(name, facts)
    assert found.severity == severity
    assert re.search(word, found.detail), found.detail
    assert re.search(remedy, " ".join(found.remedies)), found.remedies


@pytest.mark.parametrize("reason", ["wal_level", "no_replication_role", "no_free_slot", "in_recovery"])
def test_what_another_check_finds_is_not_blamed_on_the_plugin(reason: str) -> None:
    found = check("plugin", replace(DECODING, proofs=(Proof("wal2json", reason, "it is so", "fix it"),)))
    assert found.severity == SKIP
    assert "it is so: see " in found.detail


def test_a_plugin_that_steps_in_for_another_is_well_and_says_for_which() -> None:
    found = check("plugin", replace(DECODING, proofs=(MISSING, Proof("pgoutput"))))
    assert (found.severity, found.detail) == (OK, f"{PROVEN} (wal2json is not installed)")


def test_a_list_that_allows_nothing_is_mended_by_one_statement_for_both_plugins() -> None:
    seen = replace(DECODING, allowed='"pgoutput, wal2json"', proofs=(REFUSED, replace(REFUSED, plugin="pgoutput")))
    statements = {*check("plugin", seen).sql, *check("plugin-allowed", seen).sql}
    assert statements == {'ALTER ROLE "cdc" SET output_plugin_libraries = pgoutput, test_decoding, wal2json;'}


def test_a_list_of_plugins_that_the_role_may_not_see_is_judged_by_the_proof_alone() -> None:
    assert check("plugin-allowed", replace(DECODING, allowed="")).severity == OK
    assert check("plugin-allowed", replace(DECODING, allowed="", proofs=(REFUSED,))).severity == UNKNOWN
    assert check("plugin-allowed", replace(DECODING, allowed="pgoutput,wal2json")).severity == OK


def test_a_slot_of_the_plugin_that_is_not_wanted_has_to_be_recreated() -> None:
    found = check("slot", SLOT_FACTS, replace(SUBJECT, plugin="pgoutput"))
    assert found.severity == FAIL
    assert found.remedy.startswith("cdc slot recreate cdc --plugin pgoutput")
    assert check("slot", SLOT_FACTS, replace(SUBJECT, plugin="wal2json")).severity == OK


def test_a_missing_slot_is_a_problem_only_where_no_consumer_makes_it() -> None:
    none = replace(SLOT_FACTS, slot=None)
    assert check("slot", none).severity == OK
    assert check("slot", none, replace(SUBJECT, temporary=True)).severity == OK
    found = check("slot", none, replace(SUBJECT, creates_slot=False))
    assert (found.severity, found.remedy) == (FAIL, "cdc slot create cdc")


def test_a_durable_slot_that_is_left_where_a_temporary_one_is_wanted_is_warned_of() -> None:
    found = check("slot", SLOT_FACTS, replace(SUBJECT, temporary=True))
    assert (found.severity, found.remedies) == (WARN, ["cdc slot drop cdc; no change is lost"])
    ours = replace(SLOT_FACTS, slot=slot(temporary=True))
    assert check("slot", ours, replace(SUBJECT, temporary=True)).severity == OK


def test_a_temporary_slot_needs_no_limit() -> None:
    assert check("slot-limits", replace(SLOT_FACTS, keep_bytes=None), replace(SUBJECT, temporary=True)).severity == OK


def test_a_slot_that_is_there_needs_no_free_one_and_one_that_is_read_no_free_walsender() -> None:
    full = replace(SERVER, slots=10, walsenders=10)
    assert check_replication.of_server(slot(active=False))["slots-free"](full).severity == OK
    assert check_replication.of_server(slot(active=False))["walsenders-free"](full).severity == FAIL
    assert check_replication.of_server(slot())["walsenders-free"](full).severity == OK


def test_the_publication_matters_to_pgoutput_only() -> None:
    assert check("publication", DECODING).severity == SKIP
    assert check("publication", PGOUTPUT).severity == OK
    assert check("publication", replace(PGOUTPUT, published=None, may_publish=True)).severity == OK, (
        "the consumer makes it"
    )
    ours = slot(plugin="pgoutput")
    assert check_replication.of_decoding(ours)["publication"](DECODING).severity == FAIL


def test_a_role_that_may_not_replicate_is_said_once() -> None:
    refused = replace(LINK, may_replicate=False, refused=("must be superuser", "ALTER ROLE"))
    assert check("stream-connect", refused).severity == SKIP
    assert check("replication-role", refused).severity == FAIL


def test_ages_that_the_role_may_not_see_are_not_taken_for_none() -> None:
    found = check("old-transactions", replace(OPEN, sees_all=False, oldest_writer="process 5"))
    assert found.severity == WARN
    assert "process 5" in found.detail
    assert "pg_read_all_stats" in found.remedy


def test_another_outbox_is_well_when_this_one_has_a_slot_of_its_own_name() -> None:
    both = replace(INSTALLED, elsewhere=("events",))
    assert check("outboxes", both, replace(SUBJECT, slot="shop")).severity == OK


def test_a_type_that_no_handler_wants_is_named_with_its_operation() -> None:
    subject = replace(SUBJECT, handles=lambda entity_type, operation: (entity_type, operation) == ("task", "INSERT"))
    found = check("unrouted", CAPTURED, subject)
    assert found.severity == WARN
    assert found.detail.endswith("task DELETE")
    assert check("unrouted", CAPTURED, replace(SUBJECT, handles=lambda *_: True)).severity == OK
    assert check("unrouted", CAPTURED).severity == SKIP


@pytest.mark.parametrize(
    ("table", "entity_type"),
    [("tasks", "task"), ("whatsapp_messages", "message"), ("whatsapp_message_reactions", "reaction"), ("x", "x")],
)
def test_a_trigger_without_a_type_is_judged_by_the_one_that_its_table_gives_it(table: str, entity_type: str) -> None:
    seen = Captured(triggers=(replace(TRIGGER, entity_type=None, root=table, name="a_partition"),))
    wanting = replace(SUBJECT, handles=lambda found, _operation: found == entity_type)
    assert check("unrouted", seen, wanting).severity == OK
    assert check("unrouted", seen, replace(SUBJECT, handles=lambda *_: False)).detail.endswith(f"{entity_type} INSERT")


def test_a_table_that_could_have_a_capture_function_of_its_own_is_told_beside_what_is_well() -> None:
    by_hand = replace(TRIGGER, table="orders", ours=False, oid=2)
    found = check("triggers", Captured(triggers=(TRIGGER, by_hand), general=(TRIGGER, by_hand)))
    assert found.severity == OK
    assert not found.remedies
    assert "; 2 by capture_entity_change()" in found.detail
    assert ": cdc track tasks, cdc track orders --replace, as a superuser or" in found.detail
    assert check("triggers", CAPTURED).detail == "captured: tasks"


def test_a_local_connection_needs_no_encryption() -> None:
    assert check("tls", replace(SESSION, is_local=True, encrypted=False)).severity == OK


def test_the_script_has_each_statement_once_and_the_rest_as_comments() -> None:
    findings = [
        ok("fine"),
        replace(fail("a", "then restart", "ALTER SYSTEM SET x = 1;"), check="one"),
        replace(warn("b\nDROP TABLE t;", "", "ALTER SYSTEM SET x = 1;", "GRANT y;"), check="two"),
    ]
    lines = script(findings).splitlines()
    said = [line for line in lines if line.startswith("--")]
    assert [line for line in lines if line and line not in said] == [
        "ALTER SYSTEM SET x = 1;", "GRANT y;", "SELECT pg_reload_conf();",
    ]  # fmt: skip
    assert "-- one: a" in said
    assert "--   then restart" in said
    assert "-- two: b DROP TABLE t;" in said


def test_the_script_of_a_healthy_database_is_comments_only() -> None:
    assert {line[:2] for line in script([ok("fine")]).splitlines()} <= {"--", ""}


def test_where_a_remedy_has_a_script_it_is_printed_in_its_place() -> None:
    found = check("schema", replace(INSTALLED, exists=False, script="BEGIN; ... COMMIT;"))
    assert "BEGIN; ... COMMIT;" in script([found])
    assert found.remedies == ["cdc db install"]


def test_every_check_is_in_the_runbook() -> None:
    checks = [name for facts in HEALTHY for name in checks_of(facts)]
    runbook = (Path(__file__).parents[3] / "docs/operations/doctor.md").read_text()
    assert [name for name in checks if f"`{name}`" not in runbook] == []
