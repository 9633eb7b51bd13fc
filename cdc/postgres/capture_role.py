"""The role that owns the capture functions and nothing else; ``sql/capture_role.sql`` creates it."""

from __future__ import annotations

import psycopg
from psycopg import errors, sql

_OWNER = """
SELECT r.rolname::text FROM pg_catalog.pg_proc AS p JOIN pg_catalog.pg_roles AS r ON r.oid = p.proowner
WHERE p.oid = pg_catalog.to_regprocedure(pg_catalog.format('%%I.capture_entity_change()', %s::text))
  AND r.rolname LIKE 'cdc\\_capture\\_%%'
"""


def of(connection: psycopg.Connection, schema: str) -> str | None:
    """The role's name; None where the functions belong to another role, or are missing."""
    row = connection.execute(_OWNER, [schema]).fetchone()
    return row[0] if row else None


def drop(connection: psycopg.Connection, schema: str, role: str | None) -> list[str]:
    """Returns what was dropped. The role stays where it owns something else, or the session may drop no roles."""
    if role is None:
        return []
    rights = sql.SQL("REVOKE ALL ON SCHEMA {} FROM {}").format(sql.Identifier(schema), sql.Identifier(role))
    emit = sql.SQL("REVOKE ALL ON FUNCTION pg_catalog.pg_logical_emit_message(boolean, text, text{}) FROM {}").format(
        sql.SQL(", boolean" if connection.info.server_version >= 170_000 else ""), sql.Identifier(role)
    )
    try:
        with connection.transaction():
            for statement in (rights, emit, sql.SQL("DROP ROLE {}").format(sql.Identifier(role))):
                connection.execute(statement)
    except (errors.InsufficientPrivilege, errors.DependentObjectsStillExist):
        return []
    return [f"role {role}"]
