"""The role of their own that the functions which capture belong to; ``sql/capture_role.sql`` makes it."""

from __future__ import annotations

import psycopg
from psycopg import errors, sql

_OWNER = """
SELECT r.rolname::text FROM pg_catalog.pg_proc AS p JOIN pg_catalog.pg_roles AS r ON r.oid = p.proowner
WHERE p.oid = pg_catalog.to_regprocedure(pg_catalog.format('%%I.capture_entity_change()', %s::text))
  AND r.rolname LIKE 'cdc\\_capture\\_%%'
"""


def of(connection: psycopg.Connection, schema: str) -> str | None:
    """None where the functions belong to another role, or are not there."""
    row = connection.execute(_OWNER, [schema]).fetchone()
    return row[0] if row else None


def drop(connection: psycopg.Connection, schema: str, role: str | None) -> list[str]:
    """What was dropped, as it is called. It stays where something else is its own, or the session may drop no roles."""
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
