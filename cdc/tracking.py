"""Which tables are captured: one row trigger on each, with its entity type, key and excluded columns as arguments.

The triggers are the whole configuration; there is no table of tracked tables that could say something else. Triggers
made by hand, as the documented SQL does, count like our own.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psycopg
from psycopg import errors, sql

from cdc.errors import CdcError, NotFoundError, RefusedError, UsageError
from cdc.model import Operation, trigger_name

_LOCK_TIMEOUT = "5s"
_TYPE_BITS = {Operation.INSERT: 4, Operation.DELETE: 8, Operation.UPDATE: 16}
"""Bits of pg_trigger.tgtype, catalog/pg_trigger.h."""
_KINDS = {"v": "a view", "m": "a materialized view", "f": "a foreign table"}

COARSE_KEY = (
    "the key {key} does not tell the rows of {table} apart: a key coarser than the source row has no one true order"
    " between concurrent transactions"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tracked:
    """One capturing trigger. ``table`` is spelt as SQL wants it; an empty ``key`` is looked up at each capture."""

    table: str
    trigger: str
    operations: tuple[Operation, ...]
    entity_type: str | None
    key: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    enabled: bool = True
    ours: bool = True
    """False for a trigger made by hand."""

    def as_json(self) -> dict[str, Any]:
        return {
            "table": self.table,
            "trigger": self.trigger,
            "operations": [operation.lower() for operation in self.operations],
            "entity_type": self.entity_type,
            "key": list(self.key),
            "exclude": list(self.exclude),
            "enabled": self.enabled,
            "ours": self.ours,
        }


@dataclass(frozen=True, slots=True)
class Tracking:
    """What ``track`` did."""

    tracked: Tracked
    changed: bool
    """False when the trigger was there already, as asked for."""
    replaced: tuple[str, ...] = ()
    """Triggers made by hand that were dropped in its favour."""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Table:
    oid: int
    namespace: str
    name: str
    spelt: str
    kind: str
    root: str | None
    columns: tuple[str, ...]
    primary_key: tuple[str, ...]
    unique_keys: tuple[frozenset[str], ...] = field(default=())
    """Sets of NOT NULL columns of which no two rows have the same values."""

    @property
    def identifier(self) -> sql.Identifier:
        return sql.Identifier(self.namespace, self.name)


def track(
    connection: psycopg.Connection,
    schema: str,
    table: str,
    *,
    entity_type: str | None = None,
    operations: Sequence[Operation] = tuple(Operation),
    key: Sequence[str] = (),
    exclude: Sequence[str] = (),
    replace_others: bool = False,
) -> Tracking:
    """Capture the rows of ``table``, a name as PostgreSQL reads it, into the outbox in ``schema``.

    ``key`` defaults to the column id, else to the primary key. Raises NotFoundError for a table that does not exist,
    UsageError for one that cannot be tracked or columns it does not have, RefusedError when a trigger made by hand
    captures it already and ``replace_others`` is not set. Writers of the table wait while the trigger is made, not
    longer than the lock of the longest open transaction on it or 5 s.
    """
    with _changing(connection, table):
        source = _resolve(connection, table)
        capture = _capture_function(connection, schema)
        _refuse_kind(source, schema)
        wanted = Tracked(
            table=source.spelt,
            trigger=trigger_name(schema),
            operations=tuple(operation for operation in Operation if operation in operations),
            entity_type=entity_type,
            key=_choose_key(source, key, exclude),
            exclude=_known_columns(source, exclude),
        )
        present = _triggers(connection, capture, schema, source.oid)
        others = [trigger for trigger in present if not trigger.ours]
        if others and not replace_others:
            raise _doubled(source, others)
        for other in others:
            _drop(connection, source, other.trigger)
        changed = wanted not in present
        if changed:
            _refuse_foreign(connection, capture, source, wanted.trigger)
            _create(connection, schema, source, wanted)
        return Tracking(wanted, changed, tuple(other.trigger for other in others), _warnings(source, wanted))


def untrack(connection: psycopg.Connection, schema: str, table: str) -> list[Tracked]:
    """Drop every trigger on ``table`` that captures into ``schema``, also those made by hand; those dropped.

    Raises NotFoundError when there is none, RefusedError with the statements to run when the role does not own it.
    """
    with _changing(connection, table):
        source = _resolve(connection, table)
        found = _triggers(connection, _capture_function(connection, schema), schema, source.oid)
        if not found:
            raise NotFoundError(f"{source.spelt} is not tracked", hint="`cdc tracked` lists the tables that are")
        try:
            for trigger in found:
                _drop(connection, source, trigger.trigger)
        except errors.InsufficientPrivilege as denied:
            statements = "; ".join(_drop_statement(source, trigger.trigger).as_string() for trigger in found)
            raise RefusedError(
                f"only the owner of {source.spelt} may drop its triggers", hint=f"have the owner run: {statements}"
            ) from denied
        return found


def tracked(connection: psycopg.Connection, schema: str) -> list[Tracked]:
    """Every trigger that captures into ``schema``, by table; of a partitioned table that of its root."""
    with connection.transaction():
        _use_server_names(connection)
        return _triggers(connection, _capture_function(connection, schema), schema, None)


def trigger_arguments(wanted: Tracked) -> tuple[str, str]:
    """The two arguments of capture_entity_change(): entity type ("" = by the table's name) and options."""
    options = {"key": list(wanted.key)} | ({"exclude": list(wanted.exclude)} if wanted.exclude else {})
    return wanted.entity_type or "", json.dumps(options, ensure_ascii=False)


def read_arguments(raw: bytes) -> tuple[str | None, tuple[str, ...], tuple[str, ...]]:
    """Entity type, key and excluded columns out of pg_trigger.tgargs; what cannot be read counts as not given."""
    arguments = raw.decode(errors="replace").split("\0")
    try:
        options = json.loads(arguments[1]) if len(arguments) > 2 and arguments[1] else {}
    except (ValueError, RecursionError):
        options = {}
    named = options if isinstance(options, dict) else {}
    lists = (named.get(option) for option in ("key", "exclude"))
    key, exclude = (tuple(map(str, value)) if isinstance(value, list) else () for value in lists)
    return arguments[0] or None, key, exclude


def _choose_key(source: _Table, key: Sequence[str], exclude: Sequence[str]) -> tuple[str, ...]:
    chosen = _known_columns(source, key) or (("id",) if "id" in source.columns else source.primary_key)
    if not chosen:
        raise UsageError(
            f"{source.spelt} has neither a column id nor a primary key to tell its rows apart",
            hint="name the columns that do: --key col[,col]",
        )
    hidden = [column for column in chosen if column in exclude]
    if hidden:
        raise UsageError(
            f"column {hidden[0]} is in the key of {source.spelt}, so it cannot be left out",
            hint="choose another --key, or do not exclude it: the key is written into each change as entity_id",
        )
    return chosen


def _known_columns(source: _Table, named: Sequence[str]) -> tuple[str, ...]:
    for column in named:
        if column not in source.columns:
            near = difflib.get_close_matches(column.lower(), {name.lower(): name for name in source.columns}, n=3)
            likely = [name for name in source.columns if name.lower() in near]
            raise UsageError(
                f"{source.spelt} has no column {column}",
                hint=f"did you mean {', '.join(likely)}?" if likely else f"its columns: {', '.join(source.columns)}",
            )
    return tuple(dict.fromkeys(named))


def _warnings(source: _Table, wanted: Tracked) -> tuple[str, ...]:
    if any(unique <= set(wanted.key) for unique in source.unique_keys):
        return ()
    return (COARSE_KEY.format(key=", ".join(wanted.key), table=source.spelt),)


def _refuse_kind(source: _Table, schema: str) -> None:
    if source.kind not in ("r", "p"):
        raise UsageError(
            f"{source.spelt} is {_KINDS.get(source.kind, 'no table')}, and only a table's rows can be captured",
            hint="track the tables behind it; for events without a table there is publish_change()",
        )
    if source.root is not None:
        raise UsageError(f"{source.spelt} is a partition of {source.root}", hint=f"track {source.root}")
    if source.namespace == schema and source.name in ("entity_changes", "cdc_migrations"):
        raise UsageError(f"{source.spelt} belongs to the outbox itself", hint="track the tables of your application")


def _doubled(source: _Table, others: Sequence[Tracked]) -> CdcError:
    names = ", ".join(other.trigger for other in others)
    return RefusedError(
        f"{source.spelt} is captured by {names} already, and would be captured twice",
        hint="--replace drops that trigger in the same transaction, so that no change is missed",
    )


@contextmanager
def _changing(connection: psycopg.Connection, table: str) -> Iterator[None]:
    """One transaction that does not make writers queue for long behind its wait for the table's lock."""
    try:
        with connection.transaction():
            connection.execute("SELECT pg_catalog.set_config('lock_timeout', %s, true)", [_LOCK_TIMEOUT])
            connection.execute("SET LOCAL client_min_messages = warning")
            _use_server_names(connection)
            yield
    except (errors.LockNotAvailable, errors.DeadlockDetected) as busy:
        raise CdcError(
            f"{table} stayed locked for {_LOCK_TIMEOUT}; nothing was changed",
            hint="end the long transaction that holds it (pg_stat_activity, oldest xact_start), and run this again",
        ) from busy
    except errors.InsufficientPrivilege as denied:
        raise RefusedError(
            f"the role may not do this: {denied.diag.message_primary}",
            hint="it needs the right TRIGGER on the table and EXECUTE on capture_entity_change()",
        ) from denied


_USER_PATH = "cdc.user_path"


def _use_server_names(connection: psycopg.Connection) -> None:
    """Until the transaction ends, operators and functions are the server's own, whatever else the user's path offers.

    Where that path counts, for the name of a table as one writes it, ``_by_user`` asks; it is kept in a setting.
    """
    connection.execute(
        "SELECT pg_catalog.set_config(%s, pg_catalog.current_setting('search_path'), true),"
        " pg_catalog.set_config('search_path', 'pg_catalog', true)",
        [_USER_PATH],
    )


def _by_user(connection: psycopg.Connection, query: str, parameters: list[Any]) -> list[tuple[Any, ...]]:
    """The rows of a query that is safe on any path, with the names of the user's."""
    switch = "SELECT pg_catalog.set_config('search_path', {}, true)"
    connection.execute(switch.format("pg_catalog.current_setting(%s)").encode(), [_USER_PATH])
    rows = connection.execute(query.encode(), parameters).fetchall()
    connection.execute(switch.format("'pg_catalog'").encode())
    return rows


_SPELL = """
SELECT table_oid, table_oid::pg_catalog.regclass::pg_catalog.text
FROM pg_catalog.unnest(%s::pg_catalog.oid[]) AS named (table_oid)
"""


def _spelt(connection: psycopg.Connection, tables: Iterable[int]) -> dict[int, str]:
    """The names of tables as the user would write them."""
    return dict(_by_user(connection, _SPELL, [list(tables)]))


def _capture_function(connection: psycopg.Connection, schema: str) -> int:
    row = connection.execute(
        "SELECT pg_catalog.to_regprocedure(pg_catalog.format('%%I.capture_entity_change()', %s::text))::oid", [schema]
    ).fetchone()
    if row is None or row[0] is None:
        raise NotFoundError(
            f"schema {schema} has no capture_entity_change()", hint="run `cdc db install`, or look into --schema"
        )
    return int(row[0])


_RESOLVE = """
SELECT c.oid, n.nspname, c.relname, c.relkind,
  CASE WHEN c.relispartition THEN pg_catalog.pg_partition_root(c.oid)::oid END,
  ARRAY(SELECT a.attname::text FROM pg_catalog.pg_attribute AS a
        WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum)
FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
WHERE c.oid = %s::oid
"""

# Immediate, unconditional and without expressions: only such an index tells any two rows apart at any moment. A primary
# key is listed in any case, since it is what the key defaults to.
_UNIQUE_KEYS = """
SELECT i.indisprimary, pg_catalog.array_agg(a.attname::text ORDER BY k.place)
FROM pg_catalog.pg_index AS i
CROSS JOIN LATERAL pg_catalog.unnest(i.indkey::int2[]) WITH ORDINALITY AS k (attnum, place)
LEFT JOIN pg_catalog.pg_attribute AS a ON a.attrelid = i.indrelid AND a.attnum = k.attnum
WHERE i.indrelid = %s AND i.indisunique AND i.indisvalid AND i.indpred IS NULL AND k.place <= i.indnkeyatts
GROUP BY i.indexrelid, i.indisprimary, i.indimmediate
HAVING pg_catalog.bool_and(coalesce(a.attnotnull, false)) AND (i.indimmediate OR i.indisprimary)
"""


def _resolve(connection: psycopg.Connection, name: str) -> _Table:
    try:
        [(found,)] = _by_user(connection, "SELECT pg_catalog.to_regclass(%s)::pg_catalog.oid", [name])
    except (errors.InvalidName, errors.SyntaxError, errors.FeatureNotSupported) as bad:
        raise UsageError(
            f"{name!r} is not the name of a table", hint='write it as in SQL: schema.table, or "Mixed Case" in quotes'
        ) from bad
    row = connection.execute(_RESOLVE, [found]).fetchone()
    if row is None:
        raise NotFoundError(f"there is no table {name}", hint=_similar(connection, name))
    oid, namespace, table, kind, root, columns = row
    spelt = _spelt(connection, [oid, root] if root else [oid])
    keys = connection.execute(_UNIQUE_KEYS, [oid]).fetchall()
    return _Table(
        oid=oid,
        namespace=namespace,
        name=table,
        spelt=spelt[oid],
        kind=kind,
        root=spelt[root] if root else None,
        columns=tuple(columns),
        primary_key=next((tuple(names) for primary, names in keys if primary), ()),
        unique_keys=tuple(frozenset(names) for _, names in keys),
    )


def _similar(connection: psycopg.Connection, name: str) -> str:
    rows = connection.execute(
        "SELECT c.oid, c.relname::text FROM pg_catalog.pg_class AS c"
        " JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace WHERE c.relkind IN ('r', 'p')"
        " AND NOT c.relispartition AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'"
    ).fetchall()
    bare = name.rpartition(".")[2].strip('"').lower()
    near = set(difflib.get_close_matches(bare, [table.lower() for _, table in rows], n=3))
    spelt = sorted(_spelt(connection, [oid for oid, table in rows if table.lower() in near]).values())
    return f"did you mean {' or '.join(spelt[:3])}?" if spelt else "write the schema with it: schema.table"


def _triggers(connection: psycopg.Connection, capture: int, schema: str, table: int | None) -> list[Tracked]:
    rows = connection.execute(
        "SELECT t.tgrelid, t.tgname, t.tgtype, t.tgenabled, t.tgargs FROM pg_catalog.pg_trigger AS t"
        " WHERE t.tgfoid = %(capture)s AND t.tgparentid = 0 AND (%(table)s::oid IS NULL OR t.tgrelid = %(table)s::oid)",
        {"capture": capture, "table": table},
    ).fetchall()
    spelt = _spelt(connection, {oid for oid, *_ in rows})
    found = []
    for oid, trigger, bits, enabled, raw in sorted(rows, key=lambda row: (spelt[row[0]], row[1])):
        entity_type, key, exclude = read_arguments(raw)
        found.append(
            Tracked(
                table=spelt[oid],
                trigger=trigger,
                operations=tuple(operation for operation in Operation if bits & _TYPE_BITS[operation]),
                entity_type=entity_type,
                key=key,
                exclude=exclude,
                # O fires for writers, A also while rows are replicated into the table; D and R do not fire for writers.
                enabled=enabled in ("O", "A"),
                ours=trigger == trigger_name(schema),
            )
        )
    return found


def _create(connection: psycopg.Connection, schema: str, source: _Table, wanted: Tracked) -> None:
    # OR REPLACE also enables a trigger that was disabled, and needs no ownership of the table as DROP TRIGGER does.
    connection.execute(
        sql.SQL("CREATE OR REPLACE TRIGGER {} AFTER {} ON {} FOR EACH ROW EXECUTE FUNCTION {}({}, {})").format(
            sql.Identifier(wanted.trigger),
            sql.SQL(" OR ").join(sql.SQL(operation.value) for operation in wanted.operations),
            source.identifier,
            sql.Identifier(schema, "capture_entity_change"),
            *map(sql.Literal, trigger_arguments(wanted)),
        )
    )


def _refuse_foreign(connection: psycopg.Connection, capture: int, source: _Table, trigger: str) -> None:
    """Replacing a trigger that somebody else made under our name would switch off what it does."""
    taken = connection.execute(
        "SELECT FROM pg_catalog.pg_trigger WHERE tgrelid = %s AND tgname = %s AND tgfoid <> %s",
        [source.oid, trigger, capture],
    ).fetchone()
    if taken is not None:
        raise RefusedError(
            f"{source.spelt} has a trigger {trigger} that is not ours",
            hint="rename it: ALTER TRIGGER ... ON ... RENAME TO ...",
        )


def _drop(connection: psycopg.Connection, source: _Table, trigger: str) -> None:
    connection.execute(_drop_statement(source, trigger))


def _drop_statement(source: _Table, trigger: str) -> sql.Composed:
    return sql.SQL("DROP TRIGGER {} ON {}").format(sql.Identifier(trigger), source.identifier)
