"""The statements that a backfill runs on the table it reads.

The role that runs them may be a superuser, and the table another's. So nothing of the table's owner runs with that
role's rights: keys are compared by the operators of the key's own index, and come and go as texts through the input and
output functions of their types, which only a superuser can make; a cast between a type and text may be anybody's. Where
policies would hide rows, reading is refused. All names say their schema, because a condition is read with the user's
search_path. The rows are converted by capture_rows(), with the rights of the role that captures.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import errors, sql
from psycopg.rows import dict_row

from cdc.core.backfill_pace import Page
from cdc.core.errors import RefusedError, UsageError
from cdc.postgres import capture_catalog
from cdc.postgres.sql_files import load
from cdc.postgres.tracked_tables import SourceTable, Tracked, arguments

_BYTES = 4 << 20
"""Of stored rows in a page; the first row always fits."""
_KEY_TYPES = "a number, a text, a time, a uuid or an enum"


@dataclass(frozen=True, slots=True)
class KeyColumn:
    """``operators``: the schema of those that compare it. ``simple``: its type is made of no others."""

    name: str
    type_schema: str
    type_name: str
    operators: str
    simple: bool


@dataclass(frozen=True, slots=True)
class Written:
    """The changes of a page, by number and shard."""

    seqs: list[int]
    shards: list[int]


class BackfillTable:
    """One table, as the outbox in ``schema`` captures it. ``condition``: SQL, or None for all rows.

    ``path``: the search_path for the condition. Raises RefusedError for a table that this role may not read as a whole,
    or without a primary key.
    """

    def __init__(
        self, connection: psycopg.Connection, schema: str, source: SourceTable, *, condition: str | None, path: str
    ) -> None:
        self._connection = connection
        self._schema = schema
        self._statements = load("backfill.sql", schema)
        self._source = source
        self._path = path
        self._conditional = condition is not None
        self._capture = capture_catalog.capture_function(connection, schema)
        self._triggers: list[tuple[Any, ...]] = []
        self._arguments = ("", "")
        with connection.cursor(row_factory=dict_row) as cursor:
            facts = cursor.execute(self._statements["relation"], {"table": source.oid}).fetchone()
            columns = cursor.execute(self._statements["key"], {"table": source.oid}).fetchall()
        assert facts is not None
        _refuse_unreadable(source, facts)
        self.key = [KeyColumn(**row) for row in columns]
        self.key_order = facts["key_order"]
        _refuse_keyless(source, self.key)
        # The name of the table stays usable in a condition.
        self._name = sql.Identifier(source.name)
        self._from = sql.SQL("{}{} AS {}").format(
            sql.SQL("" if source.kind == "p" else "ONLY "), self._qualified, self._name
        )
        # A comment at its end must not hide what follows.
        self._alone = _raw("true" if condition is None else f"\n{condition}\n")
        self._columns = [sql.SQL("{}.{}").format(self._name, sql.Identifier(column.name)) for column in self.key]

    @property
    def columns(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """All of the table, and those that are computed when they are read."""
        return self._source.columns, self._source.virtual

    @property
    def _qualified(self) -> sql.Identifier:
        return sql.Identifier(self._source.namespace, self._source.name)

    @property
    def _row(self) -> sql.Composed:
        """A row as a trigger gets it: what is computed when it is read is NULL, for it may fail.

        capture_rows() computes it, value by value.
        """
        if not self._source.virtual:
            return sql.SQL("{}.*::{}").format(self._name, self._qualified)
        each = [
            _raw("NULL") if column in self._source.virtual else sql.Identifier(self._source.name, column)
            for column in self._source.columns
        ]
        return sql.SQL("ROW({})::{}").format(sql.SQL(", ").join(each), self._qualified)

    @property
    def _condition(self) -> sql.Composed:
        return sql.SQL("({})").format(self._alone)

    def last(self) -> list[str] | None:
        """The highest key; None for a table without rows."""
        descending = sql.SQL(", ").join(sql.SQL("{} DESC").format(column) for column in self._columns)
        row = self._execute(
            sql.SQL("SELECT {} FROM {} ORDER BY {} LIMIT 1").format(self._texts(self._columns), self._from, descending)
        ).fetchone()
        return None if row is None else list(row[0])

    def check(self, since: Sequence[str] | None) -> None:
        """Have the server read the condition and the key, and not one row. Raises UsageError."""
        # In parentheses ``a) OR (b`` would be a condition, and end the range; here it is none.
        alone = sql.SQL("CASE WHEN {} THEN true END").format(self._alone)
        for option, condition in (("--since", self._range(since, None, None)), ("--where", alone)):
            try:
                with self._connection.transaction(), self._on_user_path():
                    self._execute(sql.SQL("SELECT FROM {} WHERE false AND {}").format(self._from, condition))
            except errors.InsufficientPrivilege:
                raise
            except (psycopg.DataError, psycopg.ProgrammingError, psycopg.NotSupportedError) as wrong:
                raise UsageError(
                    f"{option} does not fit {self._source.spelt}: {wrong.diag.message_primary}",
                    hint="an SQL condition on its columns" if option == "--where" else "a value of its primary key",
                ) from None

    def estimate(self, since: Sequence[str] | None, until: Sequence[str]) -> int:
        """How many rows there are in between, by the planner, whatever the condition."""
        within = self._range(since, None, until)
        statement = sql.SQL("EXPLAIN (FORMAT JSON) SELECT FROM {} WHERE {}").format(self._from, within)
        [(plan,)] = self._execute(statement).fetchall()
        return int(plan[0]["Plan"]["Plan Rows"])

    def edge(
        self, size: Page, since: Sequence[str] | None, after: Sequence[str] | None, until: Sequence[str]
    ) -> tuple[list[str], int] | None:
        """The last key of the next page, and how many rows it examines; None: there are no more."""
        keys = [sql.Identifier(f"k{number}") for number in range(len(self.key))]
        stored = sql.SQL(" + ").join(
            sql.SQL("coalesce(pg_catalog.pg_column_size({}.{}), 0)").format(self._name, sql.Identifier(column))
            for column in self._source.columns
            if column not in self._source.virtual
        )
        statement = _raw(_EDGE).format(
            keys=sql.SQL(", ").join(keys),
            texts=self._texts(keys),
            columns=sql.SQL(", ").join(
                sql.SQL("{} AS {}").format(column, key) for column, key in zip(self._columns, keys, strict=True)
            ),
            stored=stored,
            table=self._from,
            condition=self._condition,
            range=self._range(since, after, until),
            order=sql.SQL(", ").join(self._columns),
            examine=sql.Literal(size.examine),
            write=sql.Literal(size.write),
            bytes=sql.Literal(_BYTES),
        )
        with self._on_user_path():
            row = self._execute(statement).fetchone()
        return None if row is None else (list(row[0]), row[1])

    def write(
        self,
        backfill: int,
        since: Sequence[str] | None,
        after: Sequence[str] | None,
        last: Sequence[str],
        subscription: int | None = None,
    ) -> Written:
        """Lock the rows behind ``after`` up to ``last``, and write them as changes, for one subscription or for all.

        Raises LockNotAvailable, RefusedError where the table is not tracked any more, or where another function would
        be called in place of ours.
        """
        self._refuse_overloads()
        entity_type, options = self._as_tracked()
        if subscription is not None:
            options = json.dumps({**json.loads(options), "subscription": subscription})
        statement = _raw(_WRITE).format(
            row=self._row,
            table=self._from,
            name=self._name,
            range=self._range(since, after, last),
            condition=self._condition,
            order=sql.SQL(", ").join(self._columns),
            capture=sql.Identifier(self._schema, "capture_rows"),
            type=sql.Literal(entity_type),
            options=sql.Literal(options),
            backfill=sql.Literal(backfill),
        )
        with self._on_user_path():
            rows = self._execute(statement).fetchall()
        return Written([seq for seq, _ in rows], [shard for _, shard in rows])

    def _refuse_overloads(self) -> None:
        """Of a function for arrays of just these rows, which who may create in the outbox's schema can make."""
        given = {"schema": sql.Identifier(self._schema).as_string()}
        if found := self._connection.execute(self._statements["overloads"], given).fetchone():
            signature, owner = found
            raise RefusedError(
                f"{owner} has made a function {signature}, which may be called in place of cdc's with your rights",
                hint=f"DROP FUNCTION {signature}, and REVOKE CREATE ON SCHEMA {self._schema} from who does not need it",
            )

    def _as_tracked(self) -> tuple[str, str]:
        """The arguments of its trigger as they are now: what was excluded since the last page is left out."""
        # The page has locked the table of this name: which it is, and how it is tracked, stays so until the commit.
        given = {"table": self._source.oid, "name": self._qualified.as_string(), "capture": self._capture.oid}
        triggers = self._connection.execute(self._statements["triggers"], given).fetchall()
        if not triggers:
            self._arguments = the_arguments(self._source, ())
        elif triggers[0][-1] != self.key_order:
            raise key_is_another(self._source)
        elif triggers != self._triggers:
            # A function that was made for this table meanwhile counts, too.
            self._capture = capture_catalog.capture_function(self._connection, self._schema)
            found = capture_catalog.triggers(
                self._connection, self._capture, self._schema, [self._source.oid], spell=capture_catalog.spell
            )
            self._arguments = the_arguments(self._source, found)
            self._triggers = triggers
        return self._arguments

    def _execute(self, statement: sql.Composed) -> psycopg.Cursor[Any]:
        # Without parameters, so that a % in a name or in the condition stays what it is.
        return self._connection.execute(statement)

    def _texts(self, columns: Sequence[sql.Composable]) -> sql.Composed:
        each = [sql.SQL("pg_catalog.format('%s', {})").format(column) for column in columns]
        return sql.SQL("ARRAY[{}]").format(sql.SQL(", ").join(each))

    def _range(
        self, since: Sequence[str] | None, after: Sequence[str] | None, until: Sequence[str] | None
    ) -> sql.Composable:
        parts: list[sql.Composable] = []
        if after is not None:
            parts.append(self._compared(">", after))
        elif since is not None:
            parts.append(self._compared(">=", since))
        if until is not None:
            parts.append(self._compared("<=", until))
        return sql.SQL(" AND ").join(parts) if parts else sql.SQL("true")

    def _compared(self, operator: str, values: Sequence[str]) -> sql.Composable:
        """The key with these values. Compared as rows, where one schema has all operators: an index serves that."""
        literals = [
            sql.SQL("{}::{}").format(sql.Literal(value), sql.Identifier(column.type_schema, column.type_name))
            for column, value in zip(self.key, values, strict=True)
        ]
        # Of the type below a domain: a domain over an enum has no operators of its own.
        columns = [
            sql.SQL("{}::{}").format(column, sql.Identifier(of.type_schema, of.type_name))
            for column, of in zip(self._columns, self.key, strict=True)
        ]
        if len({column.operators for column in self.key}) == 1:
            return sql.SQL("ROW({}) {} ROW({})").format(
                sql.SQL(", ").join(columns),
                _operator(self.key[0].operators, operator),
                sql.SQL(", ").join(literals),
            )
        condition: sql.Composable = sql.SQL("true" if "=" in operator else "false")
        for column, name, literal in reversed(list(zip(columns, self.key, literals, strict=True))):
            condition = sql.SQL("({0} {1} {2} OR {0} {3} {2} AND {4})").format(
                column, _operator(name.operators, operator[0]), literal, _operator(name.operators, "="), condition
            )
        return condition

    @contextmanager
    def _on_user_path(self) -> Iterator[None]:
        """For a condition; nothing else has a name that does not say its schema."""
        if self._conditional:
            self._connection.execute(_SET_PATH, [self._path])
        yield
        if self._conditional:
            self._connection.execute(_SET_PATH, ["pg_catalog"])


_SET_PATH = "SELECT pg_catalog.set_config('search_path', %s, true)"
# Without LIMIT on what is written, a condition that few rows meet would make it read the whole table.
_EDGE = """
SELECT {texts}, p.place FROM (
  SELECT {keys}, pg_catalog.row_number() OVER so_far AS place,
    pg_catalog.count(*) FILTER (WHERE e.wanted) OVER so_far AS wanted,
    pg_catalog.sum(e.stored) FILTER (WHERE e.wanted) OVER so_far AS stored
  FROM (
    SELECT {columns}, coalesce({condition}, false) AS wanted, ({stored})::pg_catalog.int8 AS stored
    FROM {table} WHERE {range} ORDER BY {order} LIMIT {examine}
  ) AS e
  WINDOW so_far AS (ORDER BY {keys} ROWS UNBOUNDED PRECEDING)
) AS p
WHERE p.place OPERATOR(pg_catalog.=) 1
  OR p.wanted OPERATOR(pg_catalog.<=) {write} AND coalesce(p.stored, 0) OPERATOR(pg_catalog.<=) {bytes}
ORDER BY p.place DESC LIMIT 1
"""
_WRITE = """
SELECT made.written_seq, made.written_shard
FROM (
  SELECT pg_catalog.array_agg(locked.captured) AS rows FROM (
    SELECT {row} AS captured FROM {table} WHERE {range} AND {condition} ORDER BY {order} FOR NO KEY UPDATE OF {name}
  ) AS locked
) AS page
CROSS JOIN LATERAL {capture}(
  page.rows, {type}::pg_catalog.text, {options}::pg_catalog.jsonb, {backfill}::pg_catalog.int4) AS made
"""


def the_arguments(source: SourceTable, triggers: Sequence[Tracked]) -> tuple[str, str]:
    """The entity type, "" for that by the table's name, and the options of the triggers that capture a table, as JSON.

    Raises RefusedError where there is none, or several that differ.
    """
    if not triggers:
        raise RefusedError(
            f"{source.spelt} is not tracked, so nothing says how its rows are captured",
            hint=f"first: cdc track {source.spelt}",
        )
    for each in triggers:
        why = each.broken or ("" if each.enabled else "it is disabled") or _gone(each)
        if why:
            raise RefusedError(
                f"{source.spelt} is not captured as its trigger {each.trigger} says: {why}",
                hint=f"cdc track {source.spelt}",
            )
    found = {arguments(each) if each.key else (each.entity_type or "", _without_key(each)) for each in triggers}
    if len(found) > 1:
        raise RefusedError(
            f"{source.spelt} is captured by {' and '.join(each.trigger for each in triggers)}, which differ",
            hint=f"make it one trigger: cdc track {source.spelt} --replace",
        )
    return found.pop()


def _gone(tracked: Tracked) -> str:
    return f"there is no column {', '.join(tracked.missing)}" if tracked.missing else ""


def _without_key(tracked: Tracked) -> str:
    """A trigger made by hand may leave its key to capture_rows()."""
    options = json.loads(arguments(tracked)[1])
    del options["key"]
    return json.dumps(options)


def _operator(schema: str, name: str) -> sql.Composed:
    return sql.SQL("OPERATOR({}.{})").format(sql.Identifier(schema), _raw(name))


def _raw(text: str) -> sql.SQL:
    return sql.SQL(text)


def _refuse_unreadable(source: SourceTable, facts: dict[str, Any]) -> None:
    role = facts["role"]
    if facts["filtered"]:
        raise RefusedError(
            f"row level security shows {role} only some rows of {source.spelt}, and a backfill without the others would"
            " look complete",
            hint="run it as the owner of the table, or as a role with BYPASSRLS",
        )
    if not facts["allowed"]:
        names = sql.SQL("GRANT SELECT, UPDATE ON {} TO {}").format(
            sql.Identifier(source.namespace, source.name), sql.Identifier(role)
        )
        raise RefusedError(
            f"{role} may not read and lock the rows of {source.spelt}", hint=f"as its owner: {names.as_string()}"
        )


def key_is_another(source: SourceTable, hint: str = "") -> RefusedError:
    """Read on in another order, rows would be left out."""
    return RefusedError(
        f"the primary key of {source.spelt}, its type or its collation is another than when the backfill was started",
        hint=hint or "cdc backfill cancel, and begin again",
    )


def _refuse_keyless(source: SourceTable, key: Sequence[KeyColumn]) -> None:
    if not key:
        raise RefusedError(
            f"{source.spelt} has no primary key, so a backfill could not say how far it is",
            hint="ALTER TABLE ... ADD PRIMARY KEY; or publish its rows yourself, by publish_change()",
        )
    for column in key:
        if not column.simple:
            raise RefusedError(
                f"the key of {source.spelt} has the column {column.name} of type {column.type_name}, which a backfill"
                " cannot go through",
                hint=f"it can where each column is {_KEY_TYPES}",
            )
