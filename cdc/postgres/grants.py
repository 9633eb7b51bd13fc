"""The rights of the roles that work on the outbox: what each needs, and no more.

Rights are values; the script for psql and what ``grant`` runs are made of the same statements. They begin by revoking
every direct grant, so that the result does not depend on the beginning: a right that is not asked for is gone, and one
that was too wide is narrow. Rights that a role has in other ways (as a superuser, by membership, through PUBLIC) cannot
be revoked from it; they are looked up afterwards and reported.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import psycopg
from psycopg import errors, sql

from cdc.core.errors import NotFoundError, RefusedError, SchemaError, UsageError

CHANGES, SHARDS, LEDGER = "entity_changes", "cdc_shards", "cdc_migrations"
NUMBERS = "entity_changes_seq_seq"
BACKFILLS = "cdc_backfills"
DUE_CHANGES = "cdc_due_changes"
BARRIERS = "cdc_barriers"
COLUMNS = "cdc_columns"
SUBSCRIPTIONS, POSITIONS, SUBSCRIPTION_CHANGES = "cdc_subscriptions", "cdc_positions", "cdc_subscription_changes"
CONTROLS = "cdc_controls"
ACTIONS = "cdc_actions"
ATTEMPTS = "change_attempts"
LIMIT_LEASES = "cdc_limit_leases"
DASHBOARD, HISTORY = "action_processing_dashboard", "recent_action_history"
RELATIONS = (
    CHANGES, SHARDS, LEDGER, DASHBOARD, HISTORY, NUMBERS, BACKFILLS, DUE_CHANGES, BARRIERS, COLUMNS, SUBSCRIPTIONS,
    POSITIONS, SUBSCRIPTION_CHANGES, CONTROLS, ATTEMPTS,
    ACTIONS, LIMIT_LEASES,
)  # fmt: skip
PUBLISH = "publish_change(text, text, text, jsonb, jsonb, jsonb, timestamp with time zone)"
PUBLISH_DUE = "publish_due(integer, bigint)"
BARRED = "barred(text, bigint)"
FUNCTIONS = ("capture_entity_change()", "capture_truncate()", PUBLISH, PUBLISH_DUE, BARRED,
             "capture_rows(anyarray, text, jsonb, integer)")  # fmt: skip
"""The functions that write changes, and one that reads of them call. ``reprocess_failed_actions`` has its caller's
rights, and needs no guard."""

STATE = (
    "processed", "processed_at", "next_attempt_at", "dead_at", "error_count", "last_error", "error_summary",
    "error_kind", "started_by",
)  # fmt: skip
"""The columns of entity_changes that record the outcome of a change."""
SHARD_RIGHTS = ("SELECT", "INSERT", "UPDATE", "DELETE")
"""A consumer's rights on cdc_shards."""
BARRIER_RIGHTS = ("SELECT", "UPDATE", "DELETE")
"""The same on cdc_barriers."""
POSITION_RIGHTS = ("SELECT", "UPDATE")
"""The same on cdc_positions, for a consumer of a subscription."""
FLOOR_RIGHTS = ("SELECT", "INSERT", "UPDATE")
"""The same there, for a consumer of the default subscription, whose rows are made as they are needed."""
SUBSCRIPTION_RIGHTS = ("SELECT", "INSERT", "UPDATE", "DELETE")
"""The same on cdc_subscription_changes."""
KEEPING = (SUBSCRIPTIONS, POSITIONS, SUBSCRIPTION_CHANGES)
"""What says who is not done with a change: whoever removes changes reads it."""
ATTEMPT_RIGHTS = ("SELECT", "INSERT", "DELETE")
"""A consumer's rights on change_attempts."""
LEASE_RIGHTS = ("SELECT", "INSERT", "UPDATE", "DELETE")
"""The same on cdc_limit_leases."""
CONTROL_RIGHTS = ("SELECT", "INSERT", "DELETE")
"""An operator's rights on cdc_controls."""
ACTION = ("command", "person", "via", "action", "target", "because", "count")
"""The columns of cdc_actions that who acts may write. Nobody but the owner may change a row."""
PAYLOAD = ("old_data", "new_data", "metadata")
"""The columns that hold the application's data."""
DESCRIPTION = (
    "id", "seq", "shard", "table_schema", "table_name", "operation", "entity_type", "entity_id", "changed_at",
    "caused_by", "depth", "replay_of", "subscription",
)  # fmt: skip
"""The other columns, which describe a change."""
DUE_DESCRIPTION = (
    "due", "number", "id", "entity_type", "entity_id", "operation", "caused_by", "depth", "written_at",
)  # fmt: skip
"""The columns of cdc_due_changes that hold none of it."""
HISTORY_WITHOUT_PREVIEW = (
    "id", "entity_type", "operation", "changed_at", "processed", "processed_at", "processing_delay_seconds",
    "error_count", "last_error",
)  # fmt: skip
"""The preview quotes new_data."""

_IDENTIFIER_BYTES = 63
_DOLLAR_QUOTE = "$cdc$"


@dataclass(frozen=True, slots=True)
class Right:
    """``privileges`` on a relation or function of the outbox, or on these ``columns`` of it only."""

    privileges: tuple[str, ...]
    object: str
    columns: tuple[str, ...] = ()


RECORDING = (Right(("SELECT",), ACTIONS), Right(("INSERT",), ACTIONS, ACTION))
"""What it takes to act."""


@dataclass(frozen=True, slots=True)
class Grantee:
    """``streams``: it also needs the attribute REPLICATION, which only a superuser gives.

    ``scripts``: scripts that grant it further rights, on the tables of an application. Those tables are not ours: their
    rights are neither revoked nor judged.
    """

    role: str
    rights: tuple[Right, ...]
    streams: bool = False
    scripts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Granted:
    """``excess``: a sentence about rights it has besides, or "". ``advice``: what it needs that no grant gives."""

    role: str
    excess: str
    advice: tuple[str, ...]


def consumer(role: str, *, retention: bool = False, publish: bool = False, scripts: Sequence[str] = ()) -> Grantee:
    """A role for ``cdc run``, which reads changes and marks them.

    ``retention``: it also removes them. ``publish``: its handlers call publish_change(); so do those whose rights in
    ``scripts`` include it.
    """
    rights = [
        Right(("SELECT",), CHANGES),
        Right(("UPDATE",), CHANGES, STATE),
        Right(SHARD_RIGHTS, SHARDS),
        Right(BARRIER_RIGHTS, BARRIERS),
        Right(("SELECT",), SUBSCRIPTIONS),
        Right(FLOOR_RIGHTS, POSITIONS),
        Right(SUBSCRIPTION_RIGHTS, SUBSCRIPTION_CHANGES),
        Right(("SELECT",), CONTROLS),
        Right(ATTEMPT_RIGHTS, ATTEMPTS),
        Right(LEASE_RIGHTS, LIMIT_LEASES),
        Right(("SELECT",), LEDGER),
        Right(("SELECT",), NUMBERS),
        Right(("SELECT",), DUE_CHANGES, DUE_DESCRIPTION),
        Right(("EXECUTE",), PUBLISH_DUE),
        Right(("EXECUTE",), BARRED),
        *RECORDING,
    ]
    if retention:
        rights += [Right(("DELETE",), CHANGES), Right(("DELETE",), ACTIONS)]
    if publish or any(PUBLISH in script for script in scripts):
        rights.append(Right(("EXECUTE",), PUBLISH))
    return Grantee(role, tuple(rights), streams=True, scripts=tuple(scripts))


def reader(role: str, *, payload: bool = False) -> Grantee:
    """For dashboards and operators: everything about the changes; their content only with ``payload``."""
    seen = Right(("SELECT",), CHANGES, () if payload else DESCRIPTION + STATE)
    history = Right(("SELECT",), HISTORY, () if payload else HISTORY_WITHOUT_PREVIEW)
    due = Right(("SELECT",), DUE_CHANGES, DUE_DESCRIPTION + PAYLOAD if payload else DUE_DESCRIPTION)
    others = [Right(("SELECT",), name) for name in (DASHBOARD, CONTROLS, ATTEMPTS, ACTIONS, LIMIT_LEASES)]
    return Grantee(role, (seen, history, due, *others))


def operator(role: str, *, payload: bool = False) -> Grantee:
    """For who decides: what a reader sees, subscriptions and backfills, and pauses, limits, retries and discards."""
    seen = reader(role, payload=payload).rights
    decides = (
        Right(("UPDATE",), CHANGES, STATE),
        Right(("SELECT",), BARRIERS),
        Right(("SELECT",), SUBSCRIPTIONS),
        Right(("SELECT",), POSITIONS),
        Right(("UPDATE",), POSITIONS, ("owned_since",)),  # to discard locks a position
        Right(SUBSCRIPTION_RIGHTS, SUBSCRIPTION_CHANGES),
        Right(("SELECT",), BACKFILLS),
        Right(("UPDATE",), BACKFILLS, ("state", "changed_at")),
        Right(CONTROL_RIGHTS, CONTROLS),
        *RECORDING,
    )
    return Grantee(role, (*(right for right in seen if right.object not in (CONTROLS, ACTIONS)), *decides))


def print_sql(schema: str, grantees: Sequence[Grantee]) -> str:
    """One script for psql, safe to repeat, that does what ``grant`` does."""
    parts = ["\\set ON_ERROR_STOP on\nBEGIN;\n"]
    for grantee in grantees:
        _check_names(schema, grantee)
        if grantee.streams:
            # On one line: a line break in a name must not end the comment.
            alter = " ".join(_alter(grantee.role).split())
            parts.append(f"-- To stream, the role also needs, from a superuser: {alter};")
        parts += [f"{statement.as_string()};" for statement in _statements(schema, grantee)]
    return "\n".join([*parts, "\nCOMMIT;\n"])


def grant(connection: psycopg.Connection, schema: str, grantees: Sequence[Grantee]) -> list[Granted]:
    """Give these roles their rights and revoke all others they have, in one transaction; safe to repeat.

    Raises NotFoundError for a missing role or outbox, RefusedError for the owner of the outbox, whose rights the
    capture function uses, and SchemaError when this session's role may not grant.
    """
    for grantee in grantees:
        _check_names(schema, grantee)
    with _explained(schema), connection.transaction():
        for grantee in grantees:
            _refuse_unless_grantable(connection, schema, grantee)
            for statement in _statements(schema, grantee):
                connection.execute(statement)
        return [_judge(connection, schema, grantee) for grantee in grantees]


def _statements(schema: str, grantee: Grantee) -> Iterator[sql.SQL | sql.Composed]:
    role = sql.Identifier(grantee.role)
    relations = sql.SQL(", ").join(sql.Identifier(schema, name) for name in RELATIONS)
    functions = sql.SQL(", ").join(_function(schema, name) for name in FUNCTIONS)
    yield _guard(schema, grantee.role)
    yield sql.SQL("REVOKE ALL ON TABLE {} FROM {}").format(relations, role)
    yield sql.SQL("REVOKE ALL ON FUNCTION {} FROM {}").format(functions, role)
    yield sql.SQL("GRANT USAGE ON SCHEMA {} TO {}").format(sql.Identifier(schema), role)
    for right in grantee.rights:
        yield sql.SQL("GRANT {} ON {} TO {}").format(_privileges(right), _object(schema, right.object), role)
    for script in grantee.scripts:
        yield sql.SQL(script.strip().removesuffix(";"))


def _guard(schema: str, role: str) -> sql.Composed:
    """The statement that refuses the owner: it would lose the rights that the capture function uses."""
    outbox = sql.Literal(sql.Identifier(schema, CHANGES).as_string())
    return sql.SQL(
        """\
DO $cdc$ BEGIN
  IF (SELECT relowner::regrole FROM pg_catalog.pg_class WHERE oid = {}::regclass) = {}::regrole THEN
    RAISE EXCEPTION 'this role owns the outbox, and what an owner may do cannot be limited';
  END IF;
END $cdc$"""
    ).format(outbox, sql.Literal(sql.Identifier(role).as_string()))


def _privileges(right: Right) -> sql.Composable:
    columns = sql.SQL(", ").join(map(sql.Identifier, right.columns))
    narrowed = sql.SQL(" ({})").format(columns) if right.columns else sql.SQL("")
    return sql.SQL(", ").join(sql.SQL(privilege) + narrowed for privilege in right.privileges)


def _object(schema: str, name: str) -> sql.Composable:
    if name in FUNCTIONS:
        return sql.SQL("FUNCTION {}").format(_function(schema, name))
    return sql.SQL("TABLE {}").format(sql.Identifier(schema, name))


def _function(schema: str, signature: str) -> sql.Composed:
    name, opening, arguments = signature.partition("(")
    return sql.SQL("{}{}").format(sql.Identifier(schema, name), sql.SQL(opening + arguments))


def _alter(role: str) -> str:
    return sql.SQL("ALTER ROLE {} REPLICATION").format(sql.Identifier(role)).as_string()


# --- before and after ----------------------------------------------------------------------------------------------

_ROLE = """
SELECT r.rolsuper, r.rolsuper OR r.rolreplication OR EXISTS (
         SELECT FROM pg_catalog.pg_roles AS rds
         WHERE rds.rolname = 'rds_replication' AND pg_catalog.pg_has_role(r.oid, rds.oid, 'MEMBER')
       ) AS replicates,
       has_database_privilege(r.oid, current_database(), 'CONNECT') AS connects
FROM pg_catalog.pg_roles AS r WHERE r.rolname = %s
"""
_OWNER = """
SELECT owner.rolname::text, pg_catalog.pg_has_role(%(role)s, owner.oid, 'USAGE')
FROM pg_catalog.pg_class AS c
JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
JOIN pg_catalog.pg_roles AS owner ON owner.oid = c.relowner
WHERE n.nspname = %(schema)s AND c.relname = %(outbox)s
"""
# The rights that exist, and whether the role has them in any way: (privilege, object, column or NULL, held).
_HOLDINGS = """
WITH namespace AS (
  SELECT oid FROM pg_catalog.pg_namespace WHERE nspname = %(schema)s
), relation AS (
  SELECT c.oid, c.relname::text AS name FROM pg_catalog.pg_class AS c JOIN namespace ON c.relnamespace = namespace.oid
  WHERE c.relname = ANY (%(relations)s::text[])
)
SELECT 'USAGE', 'its schema', NULL, has_schema_privilege(%(role)s, oid, 'USAGE') FROM namespace
UNION ALL
SELECT p, name, NULL, has_table_privilege(%(role)s, oid, p)
FROM relation, pg_catalog.unnest(ARRAY['DELETE', 'TRUNCATE', 'TRIGGER']) AS p
UNION ALL
SELECT p, name, a.attname::text, has_column_privilege(%(role)s, relation.oid, a.attnum, p)
FROM relation JOIN pg_catalog.pg_attribute AS a ON a.attrelid = relation.oid AND a.attnum > 0 AND NOT a.attisdropped,
  pg_catalog.unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'REFERENCES']) AS p
UNION ALL
SELECT 'EXECUTE', f, NULL, has_function_privilege(%(role)s, p.oid, 'EXECUTE')
FROM pg_catalog.unnest(%(functions)s::text[]) AS f
JOIN pg_catalog.pg_proc AS p ON p.oid = pg_catalog.to_regprocedure(pg_catalog.format('%%I.%%s', %(schema)s::text, f))
"""
_SHOWN_COLUMNS = 3


@dataclass(frozen=True, slots=True)
class _Holding:
    privilege: str
    object: str
    column: str | None
    held: bool

    def wanted(self, grantee: Grantee) -> bool:
        return self.privilege == "USAGE" or any(
            self.privilege in right.privileges
            and self.object == right.object
            and (not right.columns or self.column in right.columns)
            for right in grantee.rights
        )


def _refuse_unless_grantable(connection: psycopg.Connection, schema: str, grantee: Grantee) -> None:
    role = grantee.role
    if connection.execute(_ROLE, [role]).fetchone() is None:
        attributes = sql.SQL("LOGIN REPLICATION" if grantee.streams else "LOGIN")
        create = sql.SQL("CREATE ROLE {} {} PASSWORD '...'").format(sql.Identifier(role), attributes)
        raise NotFoundError(f"there is no role {role}", hint=f"create it: {create.as_string()}")
    owner, _ = _owner(connection, schema, role)
    if owner == role:
        raise RefusedError(
            f"{role} owns the outbox, and what an owner may do cannot be limited",
            hint="grant to another role, and run cdc as that one; or give the outbox an owner of its own",
        )


def _owner(connection: psycopg.Connection, schema: str, role: str) -> tuple[str, bool]:
    """The owner of the outbox, and whether the role has that owner's rights."""
    found = connection.execute(_OWNER, {"role": role, "schema": schema, "outbox": CHANGES}).fetchone()
    if found is None:
        raise NotFoundError(
            f"schema {schema} has no entity_changes", hint="run `cdc db install`, or look into --schema"
        )
    return found[0], found[1]


def _judge(connection: psycopg.Connection, schema: str, grantee: Grantee) -> Granted:
    """Whether the role has the rights asked for: a session that may not grant gets a warning, and no error."""
    parameters = {
        "role": grantee.role, "schema": schema, "relations": list(RELATIONS), "functions": list(FUNCTIONS),
    }  # fmt: skip
    holdings = [_Holding(*row) for row in connection.execute(_HOLDINGS, parameters)]
    if lacking := [each for each in holdings if each.wanted(grantee) and not each.held]:
        raise SchemaError(f"{grantee.role} would still lack {_named(lacking)}; nothing was changed", hint=_BY_WHOM)
    excess = [each for each in holdings if each.held and not each.wanted(grantee)]
    row = connection.execute(_ROLE, [grantee.role]).fetchone()
    assert row is not None
    is_superuser, replicates, connects = row
    owner, is_member = _owner(connection, schema, grantee.role)
    return Granted(
        grantee.role,
        excess=_excess(grantee.role, excess, superuser=is_superuser, member_of=owner if is_member else None),
        advice=tuple(_advice(connection, grantee, replicates=replicates, connects=connects)),
    )


def _excess(role: str, excess: Sequence[_Holding], *, superuser: bool, member_of: str | None) -> str:
    if not excess:
        return ""
    if superuser:
        return f"{role} is a superuser, whom no grant limits"
    if member_of:
        return f"{role} is a member of {member_of}, which owns the outbox, and no grant limits that"
    return f"{role} also has, through PUBLIC or a role it is a member of, {_named(excess)}"


def _advice(connection: psycopg.Connection, grantee: Grantee, *, replicates: bool, connects: bool) -> Iterator[str]:
    if grantee.streams and not replicates:
        yield (
            f"{grantee.role} has no REPLICATION (an attribute, never inherited), so it finds changes by sweeping; as a"
            f" superuser: {_alter(grantee.role)} (rds_replication on RDS and Aurora), or name another role in"
            " CDC_STREAM_DSN"
        )
    if not connects:
        connect = sql.SQL("GRANT CONNECT ON DATABASE {} TO {}").format(
            sql.Identifier(connection.info.dbname), sql.Identifier(grantee.role)
        )
        yield f"{grantee.role} may not connect to this database; as its owner: {connect.as_string()}"


def _named(holdings: Sequence[_Holding]) -> str:
    """``UPDATE (id, seq, shard, ...) on entity_changes, DELETE on entity_changes``."""
    columns: dict[tuple[str, str], list[str]] = {}
    for each in holdings:
        columns.setdefault((each.privilege, each.object), []).extend([each.column] if each.column else [])
    return ", ".join(f"{privilege}{_some(names)} on {name}" for (privilege, name), names in columns.items())


def _some(columns: Sequence[str]) -> str:
    more = ["..."] if len(columns) > _SHOWN_COLUMNS else []
    return f" ({', '.join([*columns[:_SHOWN_COLUMNS], *more])})" if columns else ""


_BY_WHOM = "connect as the owner of the schema and of what is in it, or have a superuser run cdc db grant --print"


def _check_names(schema: str, grantee: Grantee) -> None:
    for name, kind in ((schema, "schema"), (grantee.role, "role")):
        if not 0 < len(name.encode()) <= _IDENTIFIER_BYTES or "\0" in name or _DOLLAR_QUOTE in name:
            raise UsageError(
                f"{name!r} cannot be a {kind}", hint=f"1 to {_IDENTIFIER_BYTES} bytes, without {_DOLLAR_QUOTE} in it"
            )


@contextmanager
def _explained(schema: str) -> Iterator[None]:
    try:
        yield
    except errors.InsufficientPrivilege as denied:
        raise SchemaError(f"this role may not grant: {denied.diag.message_primary}", hint=_BY_WHOM) from denied
    except (errors.UndefinedTable, errors.UndefinedColumn, errors.UndefinedFunction) as missing:
        raise SchemaError(
            f"schema {schema} does not fit this version: {missing.diag.message_primary}",
            hint="run: cdc db upgrade, or cdc db install with the same --with",
        ) from missing
    except errors.DependentObjectsStillExist as dependent:
        raise RefusedError(
            "this role has passed its rights on to others", hint="REVOKE ... FROM it CASCADE, then run this again"
        ) from dependent
