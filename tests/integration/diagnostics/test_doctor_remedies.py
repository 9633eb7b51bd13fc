"""Every remedy that `cdc doctor` prints is played: what is broken is found, what is printed is run, and all is well."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from tests.commands import done
from tests.integration.diagnostics.test_doctor import apply, db, findings, run, shop, troubles, well
from tests.integration.postgres.test_capture import REACTIONS

__all__ = ["db", "shop", "well"]


@dataclass(frozen=True)
class Broken:
    """``filled``: what an operator puts into the places that the remedy leaves open."""

    check: str
    by: str
    filled: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    """What is told afterwards: a state of before."""


_FUNCTIONS = ("bounded_text", "captured_row", "capture_entity_change", "default_entity_type", "publish_change",
              "capture_rows", "capture_truncate", "capture_barrier", "captured_columns", "capture_ddl")  # fmt: skip
_WITHOUT_A_ROLE = "".join(f"ALTER FUNCTION {name} OWNER TO {{owner}};" for name in _FUNCTIONS)
_ORDERS = "CREATE TABLE orders (id int PRIMARY KEY, card text);"
_BY_HAND = "CREATE TRIGGER {} AFTER {} ON {} FOR EACH ROW EXECUTE FUNCTION capture_entity_change({});"
_MINE = "CREATE FUNCTION mine() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';"
_SEND = "pg_logical_emit_message(boolean, text, text)"
_CUT = "CREATE OR REPLACE FUNCTION bounded_text(text) RETURNS text LANGUAGE sql STABLE AS 'SELECT $1'"

BROKEN = {
    "the table is given away": Broken("schema", "ALTER TABLE entity_changes OWNER TO {other}"),
    "the table is given away and no role captures": Broken(
        "schema",
        _WITHOUT_A_ROLE + "ALTER TABLE entity_changes OWNER TO {other}",
        left={"capture-function": "warn"},
    ),
    "a view is given away": Broken("schema", "ALTER VIEW recent_action_history OWNER TO {other}"),
    "a function is given away": Broken("schema", "ALTER FUNCTION reprocess_failed_actions OWNER TO {other}"),
    "the shards are given away": Broken("schema", "ALTER TABLE cdc_shards OWNER TO {other}"),
    "a view is gone": Broken("schema", "DROP VIEW recent_action_history"),
    "an index is gone": Broken("schema", "DROP INDEX entity_changes_fresh"),
    "a constraint is gone": Broken("schema", "ALTER TABLE entity_changes DROP CONSTRAINT entity_changes_pkey"),
    "a default is gone": Broken("schema", "ALTER TABLE entity_changes ALTER depth DROP DEFAULT"),
    "a column may be empty": Broken("schema", "ALTER TABLE entity_changes ALTER entity_id DROP NOT NULL"),
    "a body is changed": Broken("schema", _CUT),
    "a trigger is added": Broken(
        "schema", _MINE + 'CREATE TRIGGER "It\'s" AFTER UPDATE ON entity_changes EXECUTE FUNCTION mine()'
    ),
    "a rule is added": Broken("schema", "CREATE RULE mine AS ON DELETE TO entity_changes DO INSTEAD NOTHING"),
    "a policy is added": Broken("schema", "CREATE POLICY mine ON cdc_shards USING (false)"),
    "everybody may publish": Broken("schema", "GRANT EXECUTE ON FUNCTION publish_change TO PUBLIC"),
    "everybody may capture": Broken("capture-function", "GRANT EXECUTE ON FUNCTION capture_entity_change TO PUBLIC"),
    "it is no definer": Broken("capture-function", "ALTER FUNCTION capture_entity_change SECURITY INVOKER"),
    "its path is not pinned": Broken("capture-function", "ALTER FUNCTION capture_entity_change RESET search_path"),
    "it is given away": Broken("capture-function", "ALTER FUNCTION capture_entity_change OWNER TO {other}"),
    "a superuser owns it": Broken("capture-function", "ALTER FUNCTION capture_entity_change OWNER TO CURRENT_USER"),
    "the owner of the outbox owns it": Broken("capture-function", _WITHOUT_A_ROLE),
    "it may not insert": Broken("capture-function", "REVOKE ALL ON entity_changes FROM {captures}"),
    "it may not insert a column": Broken(
        "capture-function", "REVOKE INSERT (entity_id) ON entity_changes FROM {captures}"
    ),
    "it may not read the number": Broken("capture-function", "REVOKE SELECT (seq) ON entity_changes FROM {captures}"),
    "it may not use the schema": Broken(
        "capture-function", "REVOKE USAGE ON SCHEMA public FROM PUBLIC, {captures}, {owner} CASCADE"
    ),
    "it may not send": Broken("capture-function", f"REVOKE EXECUTE ON FUNCTION {_SEND} FROM PUBLIC, {{captures}}"),
    "it may not write what is due later": Broken("capture-function", "REVOKE ALL ON cdc_due_changes FROM {captures}"),
    "row security of what is due later without a policy": Broken(
        "capture-function",
        "DROP POLICY cdc_capture ON cdc_due_changes; ALTER TABLE cdc_due_changes ENABLE ROW LEVEL SECURITY",
    ),
    "it may not write what holds back": Broken("capture-function", "REVOKE ALL ON cdc_barriers FROM {captures}"),
    "row security of what holds back without a policy": Broken(
        "capture-function",
        "DROP POLICY cdc_capture ON cdc_barriers; ALTER TABLE cdc_barriers ENABLE ROW LEVEL SECURITY",
    ),
    "row security": Broken("schema", "ALTER TABLE entity_changes ENABLE ROW LEVEL SECURITY"),
    "row security without a policy": Broken(
        "capture-function",
        "DROP POLICY cdc_capture ON entity_changes; ALTER TABLE entity_changes ENABLE ROW LEVEL SECURITY",
    ),
    "it is not tuned": Broken("autovacuum", "ALTER TABLE entity_changes RESET (autovacuum_vacuum_scale_factor)"),
    "autovacuum is off": Broken("autovacuum", "ALTER TABLE entity_changes SET (autovacuum_enabled = off)"),
    "a trigger is disabled": Broken("triggers", "ALTER TABLE tasks DISABLE TRIGGER ALL"),
    "nothing is tracked": Broken("triggers", 'DROP TRIGGER "#cdc_capture" ON tasks', {"TABLE": "tasks"}),
    "a key is gone": Broken("triggers", "ALTER TABLE tasks RENAME id TO number", {"COLUMNS": "number"}),
    "an option is misspelt": Broken(
        "triggers", _ORDERS + _BY_HAND.format("c", "INSERT", "orders", """'', '{{"excluded": ["card"]}}'""")
    ),
    "captured twice": Broken(
        "captured-twice",
        _ORDERS + _BY_HAND.format("a", "INSERT", "orders", "") + _BY_HAND.format("b", "INSERT", "orders", ""),
    ),
    "a trigger of before": Broken(
        "trigger-order",
        'ALTER TRIGGER "#cdc_capture" ON tasks RENAME TO cdc_capture;'
        + (_MINE + "CREATE TRIGGER audit AFTER INSERT ON tasks FOR EACH ROW EXECUTE FUNCTION mine()"),
    ),
    "a child": Broken("missed-rows", "CREATE TABLE child (PRIMARY KEY (id)) INHERITS (tasks)"),
    "unlogged": Broken("missed-rows", "ALTER TABLE tasks SET UNLOGGED"),
    "moves between partitions": Broken(
        "missed-rows",
        "CREATE TABLE parts (id int PRIMARY KEY) PARTITION BY RANGE (id);"
        + _BY_HAND.format("c", "UPDATE", "parts", ""),
    ),
    "a shared type": Broken(
        "shared-types",
        "CREATE SCHEMA tenant; CREATE TABLE tenant.tasks (id int PRIMARY KEY);"
        + _BY_HAND.format('"#cdc_capture"', "INSERT", "tenant.tasks", ""),
        {"TABLE": "tenant.tasks", "TYPE": "tenants"},
    ),
    "a schema that came later": Broken(
        "all-schemas",
        'DROP TRIGGER "#cdc_capture" ON tasks; CREATE SCHEMA tenant_2;'
        "CREATE TABLE tenant_2.tasks (id int PRIMARY KEY);"
        + _BY_HAND.format(
            '"#cdc_capture"', "INSERT", "tasks", """'t', '{{"schema_in_key": true}}', '{{"schemas": "*"}}'"""
        ),
    ),
    "leave to keep changes": Broken(
        "handled-by-writers",
        'DROP TRIGGER "#cdc_capture" ON tasks;'
        + _BY_HAND.format('"#cdc_capture"', "INSERT", "tasks", """'', '{{"handled": true}}'"""),
    ),
    "a reader": Broken("readers", "GRANT SELECT ON entity_changes TO {other}"),
    "a reader of what is due later": Broken("readers", "GRANT SELECT ON cdc_due_changes TO {other}"),
    "a reader of a column of it": Broken("readers", "GRANT SELECT (due, new_data) ON cdc_due_changes TO PUBLIC"),
    "a creator": Broken("creators", "GRANT CREATE ON SCHEMA public TO {other}, PUBLIC"),
    "an operator by hand": Broken(
        "operators", "GRANT SELECT, UPDATE ON entity_changes TO {other}; GRANT INSERT ON cdc_controls TO {other}"
    ),
    "an operator may not record": Broken(
        "operators",
        "GRANT SELECT ON cdc_controls, change_attempts, cdc_actions TO {other};"
        "GRANT UPDATE (processed) ON entity_changes TO {other}; GRANT INSERT (action) ON cdc_actions TO {other}",
    ),
    "an operator may not resume": Broken(
        "operators",
        "GRANT SELECT ON cdc_controls, change_attempts, cdc_actions, cdc_limit_leases TO {other};"
        "GRANT INSERT ON cdc_controls, cdc_actions TO {other}",
    ),
    "a sequence that is behind": Broken(
        "sequence", "INSERT INTO tasks VALUES (1); SELECT setval('entity_changes_seq_seq', 1, false)"
    ),
    "a shard that is written by hand": Broken(
        "shards", "INSERT INTO tasks VALUES (1), (2); UPDATE entity_changes SET shard = 64 + seq"
    ),
    "a key that is written by hand": Broken(
        "shards",
        "INSERT INTO tasks VALUES (1); UPDATE entity_changes SET entity_id = 'x', next_attempt_at = 'infinity'",
    ),
    "a dead letter": Broken(
        "dead", "INSERT INTO tasks VALUES (1); UPDATE entity_changes SET dead_at = now()", {"ID": "1"}
    ),
}
_COMMAND = re.compile(r"cdc (?:db upgrade|track (?:[^,;:()]|,(?! ))+|outbox (?:retry|discard) ID)")
_STATEMENT = re.compile(r"ALTER TABLE \S+ SET LOGGED|(?:ALTER|DROP|GRANT|REVOKE|SELECT|UPDATE) .*;$")
SCRIPTED = ("schema", "capture-function", "autovacuum", "readers", "creators", "operators")
ELSEWHERE = {
    "test_doctor": {
        "connect", "tls", "stream-tls", "pooler", "keepalives", "sender-timeout", "session-timeouts", "version",
        "recovery", "clock", "notify-queue", "old-transactions", "sync-standby", "wal-level", "slots-free",
        "walsenders-free", "replication-role", "stream-connect", "plugin", "plugin-allowed", "publication", "slot",
        "slot-limits", "outboxes", "grants", "row-security", "message-senders", "shard-holders", "handlers", "config",
    },
    "test_server_versions": {"virtual-columns"},
    "it takes a decision": {"foreign-casts", "tables-with-row-security", "unrouted", "unhandled", "backlog",
                            "due-later", "barriers", "ddl", "subscriptions", "subscriptions-behind",
                            "subscription-types", "paused"},
}  # fmt: skip


@pytest.fixture
def names(db: psycopg.Connection) -> dict[str, str]:
    """The owner of the outbox, the role that captures, and another, which owns nothing yet."""
    shop = db.info.dbname
    names = {"owner": f"{shop}_owner", "captures": f"cdc_capture_{shop}_public", "other": f"{shop}_other"}
    db.execute(sql.SQL("CREATE ROLE {}").format(sql.Identifier(names["other"])))
    return names


def broken(how: str, shop: str, db: psycopg.Connection, names: dict[str, str]) -> list[str]:
    """The remedies of whatever is told then."""
    db.execute(BROKEN[how].by.format(**names).encode())
    told = troubles(shop, "--no-stream")
    assert BROKEN[how].check in told
    found = findings(shop, "--no-stream")
    return [line for name in told for line in found[name]["remedies"]]


@pytest.mark.parametrize("how", BROKEN)
def test_what_the_doctor_prints_is_what_mends_it(
    how: str, shop: str, db: psycopg.Connection, names: dict[str, str]
) -> None:
    lines = dict.fromkeys(broken(how, shop, db, names))
    assert lines
    for line in lines:
        if statement := _STATEMENT.match(line):
            apply(shop, statement[0])
    for command in dict.fromkeys(found for line in lines for found in _COMMAND.findall(line)):
        acting = f"-c role={names['owner']}" if "db upgrade" in command else ""
        words = [BROKEN[how].filled.get(word, word) for word in shlex.split(command)]
        done(make_conninfo(shop, options=acting), *words[1:])
    assert troubles(shop, "--no-stream") == BROKEN[how].left


@pytest.mark.parametrize("how", [name for name, each in BROKEN.items() if each.check in SCRIPTED])
def test_the_script_mends_it_alone(how: str, shop: str, db: psycopg.Connection, names: dict[str, str]) -> None:
    if how == "the owner of the outbox owns it":
        pytest.skip("a warning: what it takes is a role that may create roles")
    broken(how, shop, db, names)
    apply(shop, run(shop, "--no-stream", "--fix").stdout)
    assert troubles(shop, "--no-stream") == BROKEN[how].left
    db.execute("INSERT INTO tasks VALUES (100)")


_OF_A_MIGRATION = _BY_HAND.format('"#cdc_capture"', "INSERT", "orders", """'order', '{{"key": ["id"]}}'""").format()
_DOCUMENTED = 'DROP TRIGGER "#cdc_capture" ON tasks;' + REACTIONS
_AGAIN = re.compile(r"cdc (track [\w.]+(?: --replace)?)")


@pytest.mark.parametrize(
    ("by", "count"), [(_ORDERS + _OF_A_MIGRATION, 1), (_DOCUMENTED, 3)], ids=["a migration's", "the document's"]
)
def test_what_is_well_and_could_cost_its_writers_less_is_told_with_the_command_for_it(
    shop: str, db: psycopg.Connection, by: str, count: int
) -> None:
    db.execute(by.encode())
    result = run(shop, "--no-stream")
    assert result.exit_code == 0
    assert troubles(shop, "--no-stream") == {}
    found = findings(shop, "--no-stream")["triggers"]
    assert (found["severity"], found["remedies"]) == ("ok", [])
    assert f"; {count} by capture_entity_change()" in found["detail"]
    commands = _AGAIN.findall(found["detail"])
    assert len(commands) == count
    for command in commands:
        done(shop, *command.split())
    assert troubles(shop, "--no-stream") == {}
    assert "capture_entity_change" not in findings(shop, "--no-stream")["triggers"]["detail"]
    [(general,)] = db.execute(
        "SELECT count(*) FROM pg_trigger WHERE tgfoid = 'capture_entity_change()'::regprocedure"
    ).fetchall()
    assert general == 0


@pytest.mark.parametrize(
    "by",
    [
        "CREATE TYPE mood AS ENUM ('well'); ALTER TABLE tasks ADD feels mood",
        "ALTER FUNCTION capture_entity_change SECURITY INVOKER",
    ],
    ids=["a column of a type of one's own", "a function without its owner's rights"],
)
def test_no_command_is_told_that_would_make_no_function(shop: str, db: psycopg.Connection, by: str) -> None:
    db.execute('DROP TRIGGER "#cdc_capture" ON tasks')
    db.execute(_OF_A_MIGRATION.replace("orders", "tasks").encode())
    assert "cdc track public.tasks" in findings(shop, "--no-stream")["triggers"]["detail"]
    db.execute(by.encode())
    assert findings(shop, "--no-stream")["triggers"]["detail"] == "captured: public.tasks"


def test_no_check_is_left_out(shop: str) -> None:
    played = {each.check for each in BROKEN.values()}
    assert set(findings(shop)) - played - set().union(*ELSEWHERE.values()) == set()
