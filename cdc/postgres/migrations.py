"""The objects in the database: install, upgrade, verify, uninstall.

``sql/NNNN_name.sql`` are the migrations. Each may run again, and all of them in order lead to the same objects from any
start: from nothing, from the documented SQL with rows in it, or from an installation in which a function was replaced.
``cdc_migrations``, in the same schema, records which have run.

``sql/NAME/NNNN_name.sql`` is an optional set, such as the tables of an application: installed when it is named, and
from then on upgraded with the rest. ``cdc_sets`` records that. It is not verified. In the same folder ``consumer.sql``
grants the rights that its handlers need, if any, and ``remove.sql`` undoes the set: on request, and at the latest when
the outbox is uninstalled. Without ``remove.sql`` the set's objects belong to the application, and stay.

The expected objects are not written down a second time. ``verify`` runs the migrations in the session's temporary
schema, reads the server's catalogs about both, rolls back, and compares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import psycopg
from psycopg import errors, sql

from cdc.core import failpoints
from cdc.core.errors import CdcError, NotFoundError, RefusedError, SchemaError, UsageError
from cdc.core.model import publication_name
from cdc.postgres import capture_role, catalogs, ddl_triggers, migration_scripts, repairs
from cdc.postgres.catalogs import Difference
from cdc.postgres.migration_scripts import Migration
from cdc.postgres.trigger_catalog import IS_TABLE_FUNCTION

_TEMPORARY = "pg_temp"
# The functions that triggers of tracked tables call.
_CAPTURING = f"""
SELECT p.proname::text AS name, p.oid, {IS_TABLE_FUNCTION}
FROM pg_catalog.pg_proc AS g JOIN pg_catalog.pg_proc AS p ON p.oid = g.oid OR p.pronamespace = g.pronamespace
  AND ({IS_TABLE_FUNCTION} OR p.proname = 'capture_truncate' AND p.pronargs = 0)
WHERE g.oid = pg_catalog.to_regprocedure(pg_catalog.format('%%I.capture_entity_change()', %s::text))
ORDER BY 1
"""  # noqa: S608 - of pieces of our own
_HOLDING_CHANGES = ("entity_changes", "cdc_due_changes")


def on_warning(connection: psycopg.Connection, say: Callable[[str], None]) -> None:
    """Call ``say`` with each warning of the server and its hint: an installation may be incomplete."""

    def pass_on(notice: errors.Diagnostic) -> None:
        if notice.severity_nonlocalized == "WARNING":
            say(f"{notice.message_primary}; {notice.message_hint or 'see the server log'}")

    connection.add_notice_handler(pass_on)


def install(connection: psycopg.Connection, schema: str, sets: Sequence[str] = ()) -> list[Migration]:
    """Bring ``schema`` to this version in one transaction; returns the migrations that ran, none if it was current.

    Creates the schema when it is missing. An ``entity_changes`` made from the documented SQL is upgraded in place and
    keeps its rows. ``sets`` are optional ones to install besides. Raises SchemaError when a table stays locked for
    ``migration_scripts.LOCK_TIMEOUT``, or existing objects do not fit.
    """
    migration_scripts.check_sets(sets)
    with _exclusively(connection, schema):
        if not _exists(connection, schema, None):
            connection.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(schema)))
        _run(connection, migration_scripts.read(migration_scripts.OWNERSHIP), schema)
        missing = _apply_pending(connection, schema, sets)
        _run(connection, migration_scripts.read(migration_scripts.CAPTURE_ROLE), schema)
        return missing


def remove(connection: psycopg.Connection, schema: str, name: str) -> bool:
    """Undo an optional set and delete its record; returns whether it was installed.

    Raises UsageError for a set whose objects belong to the application, and NotFoundError when there is no
    ``entity_changes``.
    """
    migration_scripts.check_sets([name])
    if not (script := migration_scripts.read_of_set(name, migration_scripts.REMOVE_SET)):
        raise UsageError(f"the set {name} stays: what it has made belongs to the application", hint="drop it by hand")
    with _exclusively(connection, schema):
        if not _exists(connection, schema, "entity_changes"):
            raise NotFoundError(f"schema {schema} has no entity_changes", hint="look into --schema")
        if name not in _sets(connection, schema):
            return False
        _run(connection, script, schema)
        ledger = sql.Identifier(schema, "cdc_sets")
        connection.execute(sql.SQL("DELETE FROM {} WHERE set_name = {}").format(ledger, sql.Literal(name)))
        return True


def upgrade(connection: psycopg.Connection, schema: str) -> tuple[list[Migration], list[Difference]]:
    """``install`` for an outbox that exists, and repair: where an object differs afterwards, all migrations run again.

    Returns the migrations that were missing and the findings that were repaired; ``verify`` returns what is left.
    Raises NotFoundError when there is no ``entity_changes``.
    """
    with _exclusively(connection, schema):
        if not _exists(connection, schema, "entity_changes"):
            raise NotFoundError(f"schema {schema} has no entity_changes to upgrade", hint="run `cdc db install`")
        _run(connection, migration_scripts.read(migration_scripts.OWNERSHIP), schema)
        missing = _apply_pending(connection, schema)
        findings = verify(connection, schema)
        if findings:
            _apply(connection, migration_scripts.migrations(), schema)
        _run(connection, migration_scripts.read(migration_scripts.CAPTURE_ROLE), schema)
        left = verify(connection, schema) if findings else []
        return missing, [finding for finding in findings if finding not in left]


def pending(connection: psycopg.Connection, schema: str, sets: Sequence[str] = ()) -> list[Migration]:
    """The migrations that ``install`` would run. Raises SchemaError when the schema is newer than this program."""
    migration_scripts.check_sets(sets)
    applied = {"": _applied(connection, schema), **dict.fromkeys(sets, frozenset()), **_sets(connection, schema)}
    missing: list[Migration] = []
    for name, versions in applied.items():
        known = migration_scripts.migrations(name)
        if unknown := versions - {migration.version for migration in known}:
            which = f"the set {name} in schema {schema}" if name else f"schema {schema}"
            raise SchemaError(
                f"{which} is at version {max(unknown)}, and this program knows up to {known[-1].version}",
                hint="use the cdc release that installed it, or a later one",
            )
        missing += [migration for migration in known if migration.version not in versions]
    return missing


def _applied(connection: psycopg.Connection, schema: str) -> frozenset[int]:
    if not _exists(connection, schema, "cdc_migrations"):
        return frozenset()
    ledger = sql.SQL("SELECT version FROM {}").format(sql.Identifier(schema, "cdc_migrations"))
    return frozenset(int(version) for (version,) in connection.execute(ledger))


def _sets(connection: psycopg.Connection, schema: str) -> dict[str, frozenset[int]]:
    """The optional sets that are installed, each with its versions."""
    if not _exists(connection, schema, "cdc_sets"):
        return {}
    ledger = sql.SQL("SELECT set_name, array_agg(version) FROM {} GROUP BY set_name ORDER BY set_name")
    rows = connection.execute(ledger.format(sql.Identifier(schema, "cdc_sets")))
    return {name: frozenset(versions) - {0} for name, versions in rows}  # 0: there before versions were recorded


def verify(connection: psycopg.Connection, schema: str) -> list[Difference]:
    """What is missing in ``schema`` or differs from this version; nothing is changed.

    Needs only the right TEMPORARY on the database, which every role has unless it was revoked.
    """
    migration_scripts.check_name(schema)
    with _explained(connection, schema), connection.transaction(force_rollback=True):
        connection.execute("SET LOCAL search_path = pg_catalog")
        query = migration_scripts.read(migration_scripts.PICTURE)
        _run(connection, migration_scripts.CREATE_LEDGER, _TEMPORARY, schema)
        for migration in migration_scripts.migrations():
            _run(connection, migration.template, _TEMPORARY, schema)
        expected = catalogs.picture(connection, query, _TEMPORARY)
        found = catalogs.picture(connection, query, schema, expected)
        whose = repairs.owners(connection, schema)
    return repairs.with_repairs(catalogs.compare(expected, found), schema, whose)


def owner(connection: psycopg.Connection, schema: str) -> str | None:
    """The role that owns the outbox in ``schema``; None where there is no outbox."""
    whose = repairs.owners(connection, schema)
    return repairs.owner_of_all(whose) if "table entity_changes" in whose else None


def uninstall(connection: psycopg.Connection, schema: str, *, discard_unprocessed: bool = False) -> list[str]:
    """Drop the triggers that capture, the functions, the views and the tables; returns what was dropped, in words.

    The schema and the tables of an application stay, also those that an optional set has made. Other sets go.
    Raises RefusedError while changes are unprocessed, unless ``discard_unprocessed``.
    """
    with _exclusively(connection, schema):
        if not _exists(connection, schema, "entity_changes"):
            raise NotFoundError(f"schema {schema} has no entity_changes", hint="look into --schema")
        # Tracked tables first: a writer locks one of them before it writes the outbox. In the other order the two
        # would deadlock.
        dropped = [f"event trigger {name}" for name in ddl_triggers.disable(connection, schema)]
        dropped += _drop_triggers(connection, schema)
        outbox = sql.Identifier(schema, "entity_changes")
        tables = [sql.Identifier(schema, name) for name in _HOLDING_CHANGES if _exists(connection, schema, name)]
        connection.execute(sql.SQL("LOCK TABLE {} IN ACCESS EXCLUSIVE MODE").format(sql.SQL(", ").join(tables)))
        if not discard_unprocessed:
            _refuse_unprocessed(connection, outbox)
            if _exists(connection, schema, "cdc_due_changes"):
                _refuse_due_later(connection, sql.Identifier(schema, "cdc_due_changes"))
        for name in _sets(connection, schema):
            if script := migration_scripts.read_of_set(name, migration_scripts.REMOVE_SET):
                _run(connection, script, schema)
                dropped.append(f"set {name}")
        role = capture_role.of(connection, schema)
        dropped += _drop_objects(connection, schema)
        return dropped + capture_role.drop(connection, schema, role)


def _drop_triggers(connection: psycopg.Connection, schema: str) -> list[str]:
    triggers = connection.execute(
        "SELECT t.tgname, n.nspname, c.relname FROM pg_catalog.pg_trigger AS t"
        " JOIN pg_catalog.pg_class AS c ON c.oid = t.tgrelid"
        " JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace"
        " WHERE t.tgfoid = ANY (%s::oid[]) AND t.tgparentid = 0 ORDER BY n.nspname, c.relname, t.tgname",
        [[each.oid for each in _capturing(connection, schema)]],
    ).fetchall()
    for trigger, namespace, table in triggers:
        connection.execute(
            sql.SQL("DROP TRIGGER {} ON {}").format(sql.Identifier(trigger), sql.Identifier(namespace, table))
        )
    return [f"trigger {trigger} on {namespace}.{table}" for trigger, namespace, table in triggers]


class _Capturing(NamedTuple):
    name: str
    oid: int
    of_table: bool


def _capturing(connection: psycopg.Connection, schema: str) -> list[_Capturing]:
    return [_Capturing(*row) for row in connection.execute(_CAPTURING.encode(), [schema]).fetchall()]


def _refuse_unprocessed(connection: psycopg.Connection, outbox: sql.Identifier) -> None:
    row = connection.execute(sql.SQL("SELECT count(*) FROM {} WHERE NOT processed").format(outbox)).fetchone()
    if row and row[0]:
        raise RefusedError(
            f"{row[0]} changes are not processed, and dropping the table would lose them",
            hint="let a consumer finish them, or discard them with --discard-unprocessed",
        )


def _refuse_due_later(connection: psycopg.Connection, table: sql.Identifier) -> None:
    row = connection.execute(sql.SQL("SELECT count(*) FROM {}").format(table)).fetchone()
    if row and row[0]:
        raise RefusedError(
            f"{row[0]} events are due later, and dropping the table would lose them",
            hint="wait until they are published, or discard them with --discard-unprocessed",
        )


def _drop_objects(connection: psycopg.Connection, schema: str) -> list[str]:
    # The order matters: a view is dropped before what it reads. An outbox that was not upgraded may lack some, and has
    # the publish_change() of an earlier version.
    objects = (
        *(("FUNCTION", each.name, "()") for each in _capturing(connection, schema) if each.of_table),
        ("VIEW", "recent_action_history", ""),
        ("VIEW", "action_processing_dashboard", ""),
        ("FUNCTION", "reprocess_failed_actions", "(text, integer)"),
        ("FUNCTION", "publish_change", "(text, text, text, jsonb, jsonb, jsonb, timestamp with time zone)"),
        ("FUNCTION", "publish_change", "(text, text, text, jsonb, jsonb, jsonb)"),
        ("FUNCTION", "publish_due", "(integer, bigint)"),
        ("FUNCTION", "capture_entity_change", "()"),
        ("FUNCTION", "capture_rows", "(anyarray, text, jsonb, integer)"),
        ("FUNCTION", "capture_truncate", "()"),
        ("FUNCTION", "capture_ddl", "()"),
        ("FUNCTION", "captured_columns", "(oid)"),
        ("FUNCTION", "capture_barrier", "(text, text, text, text, jsonb, jsonb, jsonb)"),
        ("FUNCTION", "barred", "(text, bigint)"),
        ("FUNCTION", "captured_row", "(record, oid, text[])"),
        ("FUNCTION", "bounded_text", "(text)"),
        ("FUNCTION", "default_entity_type", "(text)"),
        ("FUNCTION", "is_tracked_so", "(oid, text, text, text, text, text)"),
        ("FUNCTION", "is_tracked_so", "(oid, text, text, text, text, text, text[])"),
        ("TABLE", "entity_changes", ""),
        ("TABLE", "cdc_backfills", ""),
        ("TABLE", "cdc_due_changes", ""),
        ("TABLE", "cdc_barriers", ""),
        ("TABLE", "cdc_columns", ""),
        ("TABLE", "cdc_subscription_changes", ""),
        ("TABLE", "cdc_positions", ""),
        ("TABLE", "cdc_subscriptions", ""),
        ("TABLE", "cdc_controls", ""),
        ("TABLE", "change_attempts", ""),
        ("TABLE", "cdc_actions", ""),
        ("TABLE", "cdc_limit_leases", ""),
        ("FUNCTION", "fill_shard", "()"),
        ("FUNCTION", "keep_for_subscriptions", "()"),
        ("TABLE", "cdc_shards", ""),
        ("TABLE", "cdc_migrations", ""),
        ("TABLE", "cdc_sets", ""),
    )
    dropped = list[str]()
    for kind, name, arguments in objects:
        look_up = "to_regprocedure" if kind == "FUNCTION" else "to_regclass"
        there = f"SELECT pg_catalog.{look_up}(pg_catalog.format('%%I.%%I', %s::text, %s::text) || %s) IS NOT NULL"
        if connection.execute(there.encode(), [schema, name, arguments]).fetchone() == (True,):
            drop = sql.SQL("DROP {} {}{}")
            connection.execute(drop.format(sql.SQL(kind), sql.Identifier(schema, name), sql.SQL(arguments)))
            dropped.append(f"{kind.lower()} {schema}.{name}")
    return dropped + _drop_publication(connection, schema)


def _drop_publication(connection: psycopg.Connection, schema: str) -> list[str]:
    """A publication that another role owns, such as a consumer's, stays: it publishes nothing."""
    name = publication_name(schema)
    ours = "SELECT FROM pg_catalog.pg_publication WHERE pubname = %s AND pg_catalog.pg_has_role(pubowner, 'USAGE')"
    if not connection.execute(ours, [name]).fetchall():
        return []
    connection.execute(sql.SQL("DROP PUBLICATION {}").format(sql.Identifier(name)))
    return [f"publication {name}"]


def _apply_pending(connection: psycopg.Connection, schema: str, sets: Sequence[str] = ()) -> list[Migration]:
    """Run what is missing, until nothing is: a migration may record a set, of which the migrations are missing then."""
    applied = list[Migration]()
    while missing := pending(connection, schema, sets):
        _apply(connection, missing, schema)
        applied += missing
    return applied


def _apply(connection: psycopg.Connection, missing: Sequence[Migration], schema: str) -> None:
    if missing:
        _run(connection, migration_scripts.CREATE_LEDGER, schema)
    for migration in missing:
        failpoints.here("schema.between_steps")
        _run(connection, migration.template, schema)
        _run(connection, migration.record, schema)


def _run(connection: psycopg.Connection, template: str, schema: str, prefix_schema: str | None = None) -> None:
    connection.execute(migration_scripts.render(template, schema, prefix_schema=prefix_schema).encode())


def _exists(connection: psycopg.Connection, schema: str, relation: str | None) -> bool:
    """Whether the schema has such a table; with None, whether the schema exists."""
    asked = (
        "SELECT EXISTS (SELECT FROM pg_catalog.pg_namespace AS n WHERE n.nspname = %s AND (%s::text IS NULL OR EXISTS"
        " (SELECT FROM pg_catalog.pg_class AS c WHERE c.relnamespace = n.oid AND c.relname = %s)))"
    )
    row = connection.execute(asked, [schema, relation, relation]).fetchone()
    return bool(row and row[0])


@contextmanager
def _exclusively(connection: psycopg.Connection, schema: str) -> Iterator[None]:
    """One transaction, the only one that changes this schema, with a limit on its wait for a table's lock."""
    migration_scripts.check_name(schema)
    with _explained(connection, schema), connection.transaction():
        # Before the time limit: the holder of this lock runs the same work, bounded by its own limit.
        connection.execute(
            "SELECT pg_catalog.pg_advisory_xact_lock(%s, pg_catalog.hashtext(%s))",
            [migration_scripts.ADVISORY_LOCK, schema],
        )
        connection.execute("SELECT pg_catalog.set_config('lock_timeout', %s, true)", [migration_scripts.LOCK_TIMEOUT])
        connection.execute("SET LOCAL client_min_messages = warning")
        connection.execute("SET LOCAL search_path = pg_catalog")
        yield


@contextmanager
def _explained(connection: psycopg.Connection, schema: str) -> Iterator[None]:
    """Turn the server's error into one sentence with a remedy. A lost connection's error passes unchanged."""
    try:
        yield
    except (errors.LockNotAvailable, errors.DeadlockDetected) as busy:
        raise SchemaError(
            f"a table of schema {schema} stayed locked for {migration_scripts.LOCK_TIMEOUT}; nothing was changed",
            hint="end the long transaction that holds it (pg_stat_activity, oldest xact_start), and run this again",
        ) from busy
    except errors.InsufficientPrivilege as denied:
        raise SchemaError(
            f"the role may not do this: {_said(denied)}",
            hint="connect as the owner of these objects, or have a superuser run the output of `cdc db print`",
        ) from denied
    except errors.ReadOnlySqlTransaction as refused:
        raise _read_only(connection) from refused
    except (psycopg.ProgrammingError, psycopg.NotSupportedError, psycopg.InternalError, psycopg.DataError) as refused:
        raise _refusal(schema, refused) from refused


def _read_only(connection: psycopg.Connection) -> SchemaError:
    if connection.execute("SELECT pg_catalog.pg_is_in_recovery()").fetchone() == (True,):
        return SchemaError("this server is a standby and takes no writes", hint="connect to the primary "
                           "(target_session_attrs=read-write)")  # fmt: skip
    return SchemaError("the session is read only by default (default_transaction_read_only)", hint="is the disk full? "
                       "else ALTER DATABASE ... RESET default_transaction_read_only, or for the role")  # fmt: skip


def _refusal(schema: str, refused: psycopg.Error) -> CdcError:
    hint = refused.diag.message_hint or "see `cdc db print` for the statements"
    return SchemaError(f"schema {schema}: {_said(refused)}; nothing was changed", hint=hint)


def _said(error: psycopg.Error) -> str:
    return error.diag.message_primary or type(error).__name__
