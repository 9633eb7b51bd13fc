"""The statements that fix what `cdc db upgrade` leaves as it is: owners, added objects, columns, constraints.

The upgrade creates what is missing. It drops no object that is not ours, changes no owner, and does not rewrite the
table.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import psycopg
from psycopg import sql

from cdc.postgres.catalogs import Difference
from cdc.postgres.table_capture import CAPTURE_ROLE

_TABLE = "table entity_changes"
_CAPTURING = ("bounded_text", "captured_row", "capture_entity_change", "default_entity_type", "publish_change",
              "capture_rows", "capture_truncate", "capture_barrier", "captured_columns", "capture_ddl")  # fmt: skip
"""Functions that capture_role.sql may give to a role of their own."""
_COLUMN = re.compile(r"(?P<type>.*?)(?P<not_null> NOT NULL)?(?: DEFAULT (?P<default>.*))?", re.DOTALL)

# The names that picture.sql uses.
_OWNERS = """
SELECT CASE c.relkind WHEN 'v' THEN 'view ' ELSE 'table ' END || c.relname,
  pg_catalog.pg_get_userbyid(c.relowner)::text
FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
WHERE n.nspname = %(schema)s AND c.relkind IN ('r', 'p', 'v') AND c.relname = ANY (%(names)s::name[])
UNION ALL
SELECT pg_catalog.format('function %%s(%%s)', p.proname, pg_catalog.oidvectortypes(p.proargtypes)),
  pg_catalog.pg_get_userbyid(p.proowner)::text
FROM pg_catalog.pg_proc AS p JOIN pg_catalog.pg_namespace AS n ON n.oid = p.pronamespace
WHERE n.nspname = %(schema)s AND p.proname = ANY (%(names)s::name[])
"""


def owners(connection: psycopg.Connection, schema: str) -> dict[str, str]:
    """The owners of the outbox's objects, by their names in a finding, "table entity_changes"."""
    names = ["entity_changes", "cdc_shards", "cdc_migrations", "cdc_backfills", "cdc_due_changes", "cdc_barriers",
             "cdc_columns", "cdc_subscriptions", "cdc_positions", "cdc_subscription_changes", "cdc_controls",
             "change_attempts", "cdc_actions", "cdc_limit_leases", "action_processing_dashboard",
             "recent_action_history",
             "reprocess_failed_actions", "fill_shard", "keep_for_subscriptions", "publish_due", "barred",
             "is_tracked_so", *_CAPTURING]  # fmt: skip
    return dict(connection.execute(_OWNERS.encode(), {"schema": schema, "names": names}).fetchall())


def owner_of_all(owners: Mapping[str, str]) -> str:
    """The owner of the outbox. Where the table's owner differs from all others, only the table was given away."""
    table = owners[_TABLE]
    others = [owner for name, owner in owners.items() if name != _TABLE and not _captures(name)]
    return others[0] if len(others) > 1 and len({*others}) == 1 else table


def with_repairs(findings: Sequence[Difference], schema: str, owners: Mapping[str, str]) -> list[Difference]:
    """The same findings, each with the statement that fixes it (``by_hand``) where the upgrade does not."""
    given = dict(_given_back(schema, owners)) if _TABLE in owners else {}
    return [replace(each, by_hand=given.get(each.object, "") or _statement(each, schema)) for each in findings]


def _given_back(schema: str, owners: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    wanted = owner_of_all(owners)
    if wanted != owners[_TABLE]:
        # The owners of all other objects are compared with that of the table.
        yield from ((f"owner of {name}", _give(schema, _TABLE, wanted)) for name in owners if owners[name] == wanted)
    roles = {owner for name, owner in owners.items() if _captures(name) and owner.startswith(CAPTURE_ROLE)}
    for name, owner in owners.items():
        goal = next(iter(roles)) if len(roles) == 1 and _captures(name) else wanted
        if name != _TABLE and owner != goal and owner not in (roles if _captures(name) else ()):
            yield f"owner of {name}", _give(schema, name, goal)


def _captures(name: str) -> bool:
    kind, _, called = name.partition(" ")
    return kind == "function" and called.partition("(")[0] in _CAPTURING


def _give(schema: str, name: str, owner: str) -> str:
    kind, _, called = name.partition(" ")
    called, parenthesis, arguments = called.partition("(")
    return _script("ALTER {} {}{} OWNER TO {};", sql.SQL(kind.upper()), sql.Identifier(schema, called),
                   sql.SQL(parenthesis + arguments), sql.Identifier(owner))  # fmt: skip


def _statement(finding: Difference, schema: str) -> str:
    _, of, table_name = finding.object.partition("row-level security of table ")
    if of:
        return _script("ALTER TABLE {} DISABLE ROW LEVEL SECURITY, NO FORCE ROW LEVEL SECURITY;",
                       sql.Identifier(schema, table_name))  # fmt: skip
    kind, _, part = finding.object.partition(" ")
    part, of, table_name = part.rpartition(" of table ")
    if not of:
        return ""
    table, name = sql.Identifier(schema, table_name), sql.Identifier(part)
    match kind, finding.problem:
        case "trigger" | "rule" | "policy", "not ours":
            return _script("DROP {} {} ON {};", sql.SQL(kind.upper()), name, table)
        case "constraint", _:
            return _script("ALTER TABLE {} DROP CONSTRAINT IF EXISTS {}, ADD CONSTRAINT {} {};", table, name, name,
                           sql.SQL(" ".join(finding.expected.split())))  # fmt: skip
        case "column", "different":
            return _column(table, name, finding)
    return ""


def _column(table: sql.Identifier, name: sql.Identifier, finding: Difference) -> str:
    """Sets whether it may be NULL, and its default; not its type, which would rewrite the table."""
    expected, found = (_COLUMN.fullmatch(text) for text in (finding.expected, finding.found))
    if not expected or not found or expected["type"] != found["type"]:
        return ""
    changes = []
    if expected["default"] != found["default"]:
        default = expected["default"]
        changes.append(f"ALTER COLUMN {{0}} SET DEFAULT {default}" if default else "ALTER COLUMN {0} DROP DEFAULT")
    if expected["not_null"] != found["not_null"]:
        changes.append(f"ALTER COLUMN {{0}} {'SET' if expected['not_null'] else 'DROP'} NOT NULL")
    return _script("ALTER TABLE {} {};", table, sql.SQL(", ").join(sql.SQL(each).format(name) for each in changes))


def _script(statement: str, *parts: sql.Composable) -> str:
    return sql.SQL(statement).format(*parts).as_string()
