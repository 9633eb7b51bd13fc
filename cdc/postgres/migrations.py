"""The objects in the database: install, upgrade, verify, print, uninstall.

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

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg
from psycopg import errors, sql

from cdc.core import failpoints
from cdc.core.errors import CdcError, NotFoundError, RefusedError, SchemaError, UsageError
from cdc.core.model import message_prefix, publication_name, trigger_name
from cdc.postgres import capture_role, catalogs, repairs
from cdc.postgres.catalogs import Difference

LOCK_TIMEOUT = "5s"
"""How long DDL waits for a table's lock. Writers queue behind it: longer would be an outage for the application."""

_ADVISORY_LOCK = 0x63646301
"""First key of the lock held while migrations run; the second is a hash of the schema's name."""

_TEMPORARY = "pg_temp"
_DOLLAR_QUOTE = "$cdc$"
_IDENTIFIER_BYTES = 63

_OWNERSHIP = "ownership.sql"
_CAPTURE_ROLE = "capture_role.sql"
_CONSUMER_OF_SET = "consumer.sql"
_REMOVE_SET = "remove.sql"

_OPEN_SCRIPT = """\
\\set ON_ERROR_STOP on
BEGIN;
SELECT pg_catalog.pg_advisory_xact_lock({lock}, pg_catalog.hashtext({name}));
SET LOCAL lock_timeout = '{timeout}';
SET LOCAL client_min_messages = warning;
-- Whoever may CREATE in a schema of the path could offer an operator that fits better than the server's own.
SET LOCAL search_path = pg_catalog;
-- Not IF NOT EXISTS: that asks for the right to create a schema even where it is there.
DO $cdc$ BEGIN IF pg_catalog.to_regnamespace({identifier_literal}) IS NULL THEN
  CREATE SCHEMA {identifier};
END IF; END $cdc$;
"""
CREATE_LEDGER = """\
CREATE TABLE IF NOT EXISTS @schema@.cdc_migrations (
  version integer PRIMARY KEY,
  name text NOT NULL,
  applied_at timestamptz NOT NULL DEFAULT pg_catalog.now()
);
"""
_RECORD = """\
INSERT INTO @schema@.cdc_migrations (version, name) VALUES ({version}, {name}) ON CONFLICT DO NOTHING;
"""
_RECORD_OF_SET = """\
CREATE TABLE IF NOT EXISTS @schema@.cdc_sets (
  set_name text NOT NULL,
  version integer NOT NULL,
  name text NOT NULL,
  applied_at timestamptz NOT NULL DEFAULT pg_catalog.now(),
  PRIMARY KEY (set_name, version)
);
INSERT INTO @schema@.cdc_sets (set_name, version, name) VALUES ({set}, {version}, {name}) ON CONFLICT DO NOTHING;
"""


@dataclass(frozen=True, slots=True)
class Migration:
    version: int
    name: str
    template: str
    """SQL in which ``@schema@`` and ``@publication@`` stand for identifiers, ``@schema_literal@``,
    ``@publication_literal@``, ``@prefix_literal@`` and ``@trigger_literal@`` for literals."""
    set: str = ""
    """The optional set it belongs to; "" is the outbox itself."""

    def __str__(self) -> str:
        return f"{self.set}{' ' if self.set else ''}{self.version:04} {self.name}"

    @property
    def record(self) -> str:
        """The template of the statement that records that this migration ran."""
        form = _RECORD_OF_SET if self.set else _RECORD
        return form.format(set=_literal(self.set), version=self.version, name=_literal(self.name))


def migrations(name: str = "") -> list[Migration]:
    """All migrations of this version, in order: of the outbox, or of an optional set."""
    found = [
        Migration(int(path.name[:4]), path.stem[5:], path.read_text("utf-8"), name)
        for path in sorted((folder() / name).glob("[0-9][0-9][0-9][0-9]_*.sql"))
    ]
    assert [migration.version for migration in found] == list(range(1, len(found) + 1)), "a gap in the numbers"
    return found


def sets() -> list[str]:
    """The names of the optional sets."""
    return sorted(path.name for path in folder().iterdir() if path.is_dir() and migrations(path.name))


def check_sets(names: Sequence[str]) -> None:
    """Raises UsageError for a name that is none of the ``sets``."""
    for name in names:
        if name not in (known := sets()):
            raise UsageError(f"there is no set {name!r}", hint=f"there are {', '.join(known)}")


def consumer_rights(name: str, schema: str, role: str) -> str:
    """A script that grants a consumer's role what the handlers of a set need; "" for nothing."""
    return render(_script_of_set(name, _CONSUMER_OF_SET), schema, role=role)


def folder() -> Path:
    """``cdc/sql`` in a wheel; an editable install leaves ``sql`` next to the package."""
    package = Path(__file__).parents[1]
    return next(path for path in (package / "sql", package.parent / "sql") if path.is_dir())


def _script(name: str) -> str:
    return (folder() / name).read_text("utf-8")


def _script_of_set(name: str, file: str) -> str:
    """Empty where the set has no such file."""
    path = folder() / name / file
    return path.read_text("utf-8") if path.exists() else ""


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
    ``LOCK_TIMEOUT``, or existing objects do not fit.
    """
    check_sets(sets)
    with _exclusively(connection, schema):
        if not _exists(connection, schema, None):
            connection.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(schema)))
        _run(connection, _script(_OWNERSHIP), schema)
        missing = _apply_pending(connection, schema, sets)
        _run(connection, _script(_CAPTURE_ROLE), schema)
        return missing


def remove(connection: psycopg.Connection, schema: str, name: str) -> bool:
    """Undo an optional set and delete its record; returns whether it was installed.

    Raises UsageError for a set whose objects belong to the application, and NotFoundError when there is no
    ``entity_changes``.
    """
    check_sets([name])
    if not (script := _script_of_set(name, _REMOVE_SET)):
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
        _run(connection, _script(_OWNERSHIP), schema)
        missing = _apply_pending(connection, schema)
        findings = verify(connection, schema)
        if findings:
            _apply(connection, migrations(), schema)
        _run(connection, _script(_CAPTURE_ROLE), schema)
        left = verify(connection, schema) if findings else []
        return missing, [finding for finding in findings if finding not in left]


def pending(connection: psycopg.Connection, schema: str, sets: Sequence[str] = ()) -> list[Migration]:
    """The migrations that ``install`` would run. Raises SchemaError when the schema is newer than this program."""
    check_sets(sets)
    applied = {"": _applied(connection, schema), **dict.fromkeys(sets, frozenset()), **_sets(connection, schema)}
    missing: list[Migration] = []
    for name, versions in applied.items():
        known = migrations(name)
        if versions and max(versions) > len(known):
            which = f"the set {name} in schema {schema}" if name else f"schema {schema}"
            raise SchemaError(
                f"{which} is at version {max(versions)}, and this program knows up to {len(known)}",
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
    return {name: frozenset(versions) for name, versions in rows}


def verify(connection: psycopg.Connection, schema: str) -> list[Difference]:
    """What is missing in ``schema`` or differs from this version; nothing is changed.

    Needs only the right TEMPORARY on the database, which every role has unless it was revoked.
    """
    _check_name(schema)
    with _explained(connection, schema), connection.transaction(force_rollback=True):
        connection.execute("SET LOCAL search_path = pg_catalog")
        query = _script("picture.sql")
        _run(connection, CREATE_LEDGER, _TEMPORARY, schema)
        for migration in migrations():
            _run(connection, migration.template, _TEMPORARY, schema)
        expected = catalogs.picture(connection, query, _TEMPORARY)
        found = catalogs.picture(connection, query, schema, expected)
        whose = repairs.owners(connection, schema)
    return repairs.with_repairs(catalogs.compare(expected, found), schema, whose)


def owner(connection: psycopg.Connection, schema: str) -> str | None:
    """The role that owns the outbox in ``schema``; None where there is no outbox."""
    whose = repairs.owners(connection, schema)
    return repairs.owner_of_all(whose) if "table entity_changes" in whose else None


def print_sql(
    schema: str,
    steps: Sequence[Migration] | None = None,
    *,
    sets: Sequence[str] = (),
    owner: str | None = None,
) -> str:
    """One script for psql, safe to repeat, that does what ``install`` does, for operators who run DDL by hand.

    ``steps`` are the migrations to print, by default all, and those of the optional ``sets``. ``owner`` is the role
    that owns the outbox already: the script runs as that role.
    """
    _check_name(schema)
    check_sets(sets)
    if steps is None:
        steps = [migration for name in dict.fromkeys(("", *sets)) for migration in migrations(name)]
    identifier = sql.Identifier(schema).as_string()
    opening = _OPEN_SCRIPT.format(
        lock=_ADVISORY_LOCK,
        timeout=LOCK_TIMEOUT,
        name=_literal(schema),
        identifier=identifier,
        identifier_literal=_literal(identifier),
    )
    act_as = [f"SET LOCAL ROLE {sql.Identifier(owner).as_string()};\n"] if owner else []
    parts = [opening, *act_as, render(_script(_OWNERSHIP), schema), render(CREATE_LEDGER, schema)]
    for migration in steps:
        parts += [f"\n-- {migration}\n", render(migration.template + migration.record, schema)]
    parts += ["", render(_script(_CAPTURE_ROLE), schema)]
    return "\n".join([*parts, "COMMIT;\n"])


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
        dropped = _drop_triggers(connection, schema)
        outbox = sql.Identifier(schema, "entity_changes")
        connection.execute(sql.SQL("LOCK TABLE {} IN ACCESS EXCLUSIVE MODE").format(outbox))
        if not discard_unprocessed:
            _refuse_unprocessed(connection, outbox)
        for name in _sets(connection, schema):
            if script := _script_of_set(name, _REMOVE_SET):
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
        " WHERE t.tgfoid = pg_catalog.to_regprocedure(pg_catalog.format('%%I.capture_entity_change()', %s::text))"
        " AND t.tgparentid = 0 ORDER BY n.nspname, c.relname, t.tgname",
        [schema],
    ).fetchall()
    for trigger, namespace, table in triggers:
        connection.execute(
            sql.SQL("DROP TRIGGER {} ON {}").format(sql.Identifier(trigger), sql.Identifier(namespace, table))
        )
    return [f"trigger {trigger} on {namespace}.{table}" for trigger, namespace, table in triggers]


def _refuse_unprocessed(connection: psycopg.Connection, outbox: sql.Identifier) -> None:
    row = connection.execute(sql.SQL("SELECT count(*) FROM {} WHERE NOT processed").format(outbox)).fetchone()
    if row and row[0]:
        raise RefusedError(
            f"{row[0]} changes are not processed, and dropping the table would lose them",
            hint="let a consumer finish them, or discard them with --discard-unprocessed",
        )


def _drop_objects(connection: psycopg.Connection, schema: str) -> list[str]:
    # The order matters: a view is dropped before what it reads.
    objects = (
        ("VIEW", "recent_action_history", ""),
        ("VIEW", "action_processing_dashboard", ""),
        ("FUNCTION", "reprocess_failed_actions", "(text, integer)"),
        ("FUNCTION", "publish_change", "(text, text, text, jsonb, jsonb, jsonb)"),
        ("FUNCTION", "capture_entity_change", "()"),
        ("FUNCTION", "captured_row", "(record, oid, text[])"),
        ("FUNCTION", "bounded_text", "(text)"),
        ("FUNCTION", "default_entity_type", "(text)"),
        ("TABLE", "entity_changes", ""),
        ("TABLE", "cdc_shards", ""),
        ("TABLE", "cdc_migrations", ""),
        *([("TABLE", "cdc_sets", "")] if _exists(connection, schema, "cdc_sets") else []),
    )
    for kind, name, arguments in objects:
        connection.execute(
            sql.SQL("DROP {} IF EXISTS {}{}").format(sql.SQL(kind), sql.Identifier(schema, name), sql.SQL(arguments))
        )
    return [f"{kind.lower()} {schema}.{name}" for kind, name, _ in objects] + _drop_publication(connection, schema)


def _drop_publication(connection: psycopg.Connection, schema: str) -> list[str]:
    """A publication that another role owns, such as a consumer's, stays: it publishes nothing."""
    name = publication_name(schema)
    ours = "SELECT FROM pg_catalog.pg_publication WHERE pubname = %s AND pg_catalog.pg_has_role(pubowner, 'USAGE')"
    if not connection.execute(ours, [name]).fetchall():
        return []
    connection.execute(sql.SQL("DROP PUBLICATION {}").format(sql.Identifier(name)))
    return [f"publication {name}"]


def render(template: str, schema: str, *, prefix_schema: str | None = None, role: str = "") -> str:
    """``template`` for ``schema``; its messages carry the prefix of ``prefix_schema``, by default the same.

    ``role`` is what ``@role@`` stands for.
    """
    values = {
        "@schema@": sql.Identifier(schema).as_string(),
        "@schema_literal@": _literal(schema),
        "@prefix_literal@": _literal(message_prefix(prefix_schema or schema)),
        "@publication@": sql.Identifier(publication_name(schema)).as_string(),
        "@publication_literal@": _literal(publication_name(schema)),
        "@trigger_literal@": _literal(trigger_name(schema)),
        "@role@": sql.Identifier(role).as_string(),
    }
    # In one pass: a schema's name may be @schema_literal@.
    return re.sub("|".join(values), lambda match: values[match[0]], template)


def _literal(text: str) -> str:
    return sql.Literal(text).as_string()


def _check_name(schema: str) -> None:
    too_long = not 0 < len(schema.encode()) <= _IDENTIFIER_BYTES
    if too_long or "\0" in schema or _DOLLAR_QUOTE in schema or schema.startswith("pg_"):
        raise UsageError(
            f"{schema!r} cannot be the schema of the outbox",
            hint=f"1 to {_IDENTIFIER_BYTES} bytes, not beginning with pg_, without {_DOLLAR_QUOTE} in it",
        )


def _apply_pending(connection: psycopg.Connection, schema: str, sets: Sequence[str] = ()) -> list[Migration]:
    """Run what is missing, until nothing is: a migration may record a set, of which the migrations are missing then."""
    applied = list[Migration]()
    while missing := pending(connection, schema, sets):
        _apply(connection, missing, schema)
        applied += missing
    return applied


def _apply(connection: psycopg.Connection, missing: Sequence[Migration], schema: str) -> None:
    if missing:
        _run(connection, CREATE_LEDGER, schema)
    for migration in missing:
        failpoints.here("schema.between_steps")
        _run(connection, migration.template, schema)
        _run(connection, migration.record, schema)


def _run(connection: psycopg.Connection, template: str, schema: str, prefix_schema: str | None = None) -> None:
    connection.execute(render(template, schema, prefix_schema=prefix_schema).encode())


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
    _check_name(schema)
    with _explained(connection, schema), connection.transaction():
        # Before the time limit: the holder of this lock runs the same work, bounded by its own limit.
        connection.execute(
            "SELECT pg_catalog.pg_advisory_xact_lock(%s, pg_catalog.hashtext(%s))", [_ADVISORY_LOCK, schema]
        )
        connection.execute("SELECT pg_catalog.set_config('lock_timeout', %s, true)", [LOCK_TIMEOUT])
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
            f"a table of schema {schema} stayed locked for {LOCK_TIMEOUT}; nothing was changed",
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
