"""What the server's catalogs say about capturing: the function, the triggers that call it, and their tables.

Objects are looked up by oid, so the role needs no right on the application's schemas.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import psycopg
from psycopg import sql
from psycopg.rows import dict_row

from cdc.core.errors import NotFoundError
from cdc.core.model import CAPTURED, Operation, former_trigger_name, trigger_name
from cdc.postgres import truncate_triggers
from cdc.postgres.tracked_tables import (
    LISTS,
    Copy,
    Fires,
    ForeignCast,
    SourceTable,
    Tracked,
    Truncate,
    TruncateTrigger,
    read_options,
    read_remembered,
)
from cdc.postgres.trigger_catalog import GIVEN, IS_TABLE_FUNCTION, texts
from cdc.postgres.trigger_statements import FIRES

_TYPE_BITS = {Operation.INSERT: 4, Operation.DELETE: 8, Operation.UPDATE: 16}
"""Bits of pg_trigger.tgtype, catalog/pg_trigger.h."""
_ROW = 1
_QUOTED = re.compile(r"""'[^']*'|"[^"]*\"""")
"""In a trigger's definition. Names, constants and arguments are their author's, and may say anything in quotes; the
server doubles a quote within quotes."""
_WHEN, _END = " WHEN (", ") EXECUTE FUNCTION "
_NAME = "capture_entity_change"


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureFunction:
    """capture_entity_change(). ``lacks``: rights that its owner, as whom it runs, needs and does not have."""

    oid: int
    oids: tuple[int, ...]
    """Its own, and those of the functions that are made for one table each (``table_capture``)."""
    name: str
    owner: str
    owner_is_superuser: bool
    owns_outbox: bool
    others: tuple[str, ...]
    """Owners of a captured table, or of a type in one, that are neither superusers nor this function's owner."""
    security_definer: bool
    settings: tuple[str, ...]
    public_may_call: bool
    lacks: tuple[str, ...]
    source: str

    def unknown(self, options: Iterable[str]) -> list[str]:
        """The options that the function does not know, and so refuses. Its source lists those it knows."""
        return [name for name in options if not re.search(rf"[',{{]{re.escape(name)}[',}}]", self.source)]


# Every type that a column's value may hold, at any level of nesting: ``held`` of a WITH RECURSIVE.
_HELD = """
held (relation, attname, type) AS (
  SELECT a.attrelid, a.attname, a.atttypid FROM pg_catalog.pg_attribute AS a
  WHERE a.attrelid IN ({tables}) AND a.attnum > 0 AND NOT a.attisdropped
  UNION
  SELECT held.relation, held.attname, part.type
  FROM held JOIN pg_catalog.pg_type AS t ON t.oid = held.type
  CROSS JOIN LATERAL (
    SELECT t.typelem WHERE t.typelem <> 0::oid
    UNION ALL SELECT t.typbasetype WHERE t.typtype = 'd'
    UNION ALL SELECT r.rngsubtype FROM pg_catalog.pg_range AS r WHERE t.oid IN (r.rngtypid, r.rngmultitypid)
    UNION ALL SELECT a.atttypid FROM pg_catalog.pg_attribute AS a
              WHERE t.typtype = 'c' AND a.attrelid = t.typrelid AND a.attnum > 0 AND NOT a.attisdropped
  ) AS part (type)
)"""
# Whether row level security would keep the function's owner from writing a table; of a superuser it does not.
_NO_POLICY = """
{table}.relrowsecurity AND NOT r.rolsuper AND NOT r.rolbypassrls
        AND ({table}.relforcerowsecurity OR NOT pg_catalog.pg_has_role(p.proowner, {table}.relowner, 'USAGE'))
        AND NOT EXISTS (SELECT FROM pg_catalog.pg_policy AS l
          WHERE l.polrelid = {table}.oid AND l.polcmd = '*' AND l.polroles && ARRAY[0::oid, p.proowner])"""
# The rights that the function uses: it writes these columns, returns those, and sends a message.
_FUNCTION = f"""
WITH RECURSIVE general AS (
  SELECT p.* FROM pg_catalog.pg_proc AS p JOIN pg_catalog.pg_namespace AS n ON n.oid = p.pronamespace
  WHERE n.nspname = %(schema)s AND p.proname = 'capture_entity_change' AND p.pronargs = 0
), capturing AS (
  SELECT p.oid FROM general AS g JOIN pg_catalog.pg_proc AS p
    ON p.oid = g.oid OR p.pronamespace = g.pronamespace AND {IS_TABLE_FUNCTION}
), {_HELD.format(tables="SELECT t.tgrelid FROM pg_catalog.pg_trigger AS t JOIN capturing AS f ON f.oid = t.tgfoid")}
SELECT p.oid, ARRAY(SELECT f.oid FROM capturing AS f) AS oids,
  pg_catalog.format('%%I.%%I()', n.nspname, p.proname) AS name,
  r.rolname::text AS owner, r.rolsuper AS owner_is_superuser,
  coalesce(c.relowner = p.proowner, false) AS owns_outbox,
  ARRAY(
    SELECT DISTINCT o.rolname::text
    FROM held JOIN pg_catalog.pg_class AS s ON s.oid = held.relation JOIN pg_catalog.pg_type AS y ON y.oid = held.type
    JOIN pg_catalog.pg_roles AS o ON o.oid IN (s.relowner, y.typowner)
    WHERE NOT o.rolsuper AND o.oid <> p.proowner ORDER BY 1
  ) AS others, p.prosecdef AS security_definer,
  coalesce(p.proconfig, '{{}}') AS settings, p.prosrc AS source,
  EXISTS (SELECT FROM pg_catalog.aclexplode(coalesce(p.proacl, pg_catalog.acldefault('f', p.proowner))) AS a
          WHERE a.grantee = 0::oid AND a.privilege_type = 'EXECUTE') AS public_may_call,
  pg_catalog.array_remove(ARRAY[
    CASE WHEN NOT pg_catalog.has_schema_privilege(p.proowner, n.oid, 'USAGE') THEN 'USAGE on the schema' END,
    CASE WHEN c.oid IS NULL THEN 'the table entity_changes, which is not there' END,
    CASE WHEN NOT pg_catalog.has_table_privilege(p.proowner, c.oid, 'INSERT') AND EXISTS (
      SELECT FROM pg_catalog.pg_attribute AS a
      WHERE a.attrelid = c.oid AND a.attname = ANY (%(written)s::name[])
        AND NOT pg_catalog.has_column_privilege(p.proowner, c.oid, a.attnum, 'INSERT')
    ) THEN 'INSERT on entity_changes' END,
    CASE WHEN EXISTS (
      SELECT FROM pg_catalog.pg_attribute AS a
      WHERE a.attrelid = c.oid AND a.attname = ANY ('{{seq,shard}}'::name[])
        AND NOT pg_catalog.has_column_privilege(p.proowner, c.oid, a.attnum, 'SELECT')
    ) THEN 'SELECT (seq, shard) on entity_changes' END,
    (SELECT 'EXECUTE on ' || m.oid::regprocedure::text FROM pg_catalog.pg_proc AS m
     WHERE m.pronamespace = 'pg_catalog'::regnamespace AND m.proname = 'pg_logical_emit_message'
       AND m.proargtypes[2] = 'pg_catalog.text'::regtype
       AND NOT pg_catalog.has_function_privilege(p.proowner, m.oid, 'EXECUTE')),
    CASE WHEN {_NO_POLICY.format(table="c")}
      THEN 'a policy of its own, since row level security is on' END,
    CASE WHEN EXISTS (
      SELECT FROM pg_catalog.pg_attribute AS a
      WHERE a.attrelid = d.oid AND a.attname = ANY (%(later)s::name[])
        AND NOT pg_catalog.has_column_privilege(p.proowner, d.oid, a.attnum, 'INSERT')
    ) THEN 'INSERT on cdc_due_changes' END,
    CASE WHEN EXISTS (
      SELECT FROM pg_catalog.pg_attribute AS a
      WHERE a.attrelid = b.oid AND a.attname = ANY ('{{entity_type,seq,id}}'::name[])
        AND NOT pg_catalog.has_column_privilege(p.proowner, b.oid, a.attnum, 'INSERT')
    ) THEN 'INSERT on cdc_barriers' END,
    CASE WHEN {_NO_POLICY.format(table="d")}
      THEN 'a policy of its own on cdc_due_changes, since row level security is on' END,
    CASE WHEN {_NO_POLICY.format(table="b")}
      THEN 'a policy of its own on cdc_barriers, since row level security is on' END
  ], NULL) AS lacks
FROM general AS p
JOIN pg_catalog.pg_namespace AS n ON n.oid = p.pronamespace
JOIN pg_catalog.pg_roles AS r ON r.oid = p.proowner
LEFT JOIN pg_catalog.pg_class AS c
  ON c.relnamespace = n.oid AND c.relname = 'entity_changes' AND c.relkind IN ('r', 'p')
LEFT JOIN pg_catalog.pg_class AS d
  ON d.relnamespace = n.oid AND d.relname = 'cdc_due_changes' AND d.relkind IN ('r', 'p')
LEFT JOIN pg_catalog.pg_class AS b
  ON b.relnamespace = n.oid AND b.relname = 'cdc_barriers' AND b.relkind IN ('r', 'p')
"""  # noqa: S608 - of pieces of our own
_WRITTEN = (
    "table_schema", "table_name", "operation", "entity_id", "entity_type", "old_data", "new_data", "metadata",
    "caused_by", "depth", "processed", "processed_at", "last_error", "shard", "subscription",
)  # fmt: skip
_WRITTEN_LATER = (
    "due", "entity_type", "entity_id", "operation", "old_data", "new_data", "metadata", "caused_by", "depth",
)  # fmt: skip

_TRIGGERS = f"""
WITH RECURSIVE whole AS (
  SELECT t.oid AS trigger, t.* FROM pg_catalog.pg_trigger AS t
  WHERE t.tgfoid = ANY (%(capture)s::oid[]) AND t.tgparentid = 0::oid
    AND (%(tables)s::oid[] IS NULL OR t.tgrelid = ANY (%(tables)s::oid[]))
), copy (top, trigger, tgrelid, tgname, tgenabled) AS (
  SELECT trigger, trigger, tgrelid, tgname, tgenabled FROM whole
  UNION ALL
  SELECT copy.top, t.oid, t.tgrelid, t.tgname, t.tgenabled
  FROM pg_catalog.pg_trigger AS t JOIN copy ON t.tgparentid = copy.trigger
)
SELECT t.tgrelid AS oid, t.tgname::text AS trigger, t.tgtype AS type, p.proname::text AS function,
  t.tgenabled::text AS fires, n.nspname::text AS namespace, c.relname::text AS name,
  coalesce((SELECT r.relname FROM pg_catalog.pg_class AS r WHERE r.oid = pg_catalog.pg_partition_root(t.tgrelid)),
    c.relname)::text AS root,
  ARRAY(SELECT relid::oid FROM pg_catalog.pg_partition_ancestors(t.tgrelid) AS a (relid)
        WHERE relid <> t.tgrelid) AS above,  -- the root is the last
  ARRAY(SELECT a.attname::text FROM pg_catalog.pg_attribute AS a
        WHERE a.attrelid = t.tgrelid AND a.attnum > 0 AND NOT a.attisdropped) AS columns,
  given.arguments,
  ARRAY(SELECT a.attname::text FROM pg_catalog.unnest(t.tgattr::int2[]) AS u (attnum)
        JOIN pg_catalog.pg_attribute AS a ON a.attrelid = t.tgrelid AND a.attnum = u.attnum) AS update_of,
  CASE WHEN t.tgqual IS NOT NULL THEN pg_catalog.pg_get_triggerdef(t.trigger, true) END AS definition,
  ARRAY(
    SELECT CASE WHEN o.tgrelid = t.tgrelid THEN o.tgname::text
      ELSE pg_catalog.format('%%s on %%s', o.tgname, o.tgrelid::pg_catalog.regclass) END
    FROM copy JOIN pg_catalog.pg_trigger AS o ON o.tgrelid = copy.tgrelid AND o.tgname < copy.tgname
    WHERE copy.top = t.trigger AND NOT o.tgisinternal AND o.tgparentid = 0::oid
      AND o.tgenabled <> 'D' AND NOT o.tginitdeferred AND o.tgtype::int4 & 3 = 1
      AND o.tgtype::int4 & t.tgtype::int4 & 28 <> 0
      AND NOT EXISTS (  -- one that captures, for whichever outbox, writes nothing else
        SELECT FROM pg_catalog.pg_proc AS p
        JOIN pg_catalog.pg_class AS e ON e.relnamespace = p.pronamespace AND e.relname = 'entity_changes'
        WHERE p.oid = o.tgfoid AND (p.proname = 'capture_entity_change' OR {IS_TABLE_FUNCTION}))
    ORDER BY 1
  ) AS earlier,
  ARRAY(
    SELECT pg_catalog.jsonb_build_array(
      copy.tgrelid::int8, pn.nspname, pc.relname, copy.tgname, copy.tgenabled)
    FROM copy JOIN pg_catalog.pg_class AS pc ON pc.oid = copy.tgrelid
    JOIN pg_catalog.pg_namespace AS pn ON pn.oid = pc.relnamespace
    WHERE copy.top = t.trigger AND copy.trigger <> t.trigger ORDER BY pn.nspname, pc.relname
  ) AS copies
FROM whole AS t
JOIN pg_catalog.pg_proc AS p ON p.oid = t.tgfoid
JOIN pg_catalog.pg_class AS c ON c.oid = t.tgrelid
JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
{GIVEN}
ORDER BY n.nspname, c.relname, t.tgname
"""  # noqa: S608 - of pieces of our own

_TABLES = """
SELECT c.oid, n.nspname::text AS namespace, c.relname::text AS name,
  c.relkind::text AS kind,
  CASE WHEN c.relispartition THEN pg_catalog.pg_partition_root(c.oid)::oid END AS root,
  ARRAY(SELECT a.attname::text FROM pg_catalog.pg_attribute AS a
        WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum) AS columns,
  ARRAY(SELECT DISTINCT CASE WHEN t.typnamespace = 'pg_catalog'::regnamespace THEN t.typname::text ELSE '' END
        FROM pg_catalog.pg_attribute AS a JOIN pg_catalog.pg_type AS v ON v.oid = a.atttypid
        JOIN pg_catalog.pg_type AS t ON t.oid = CASE WHEN v.typcategory = 'A' AND v.typelem <> 0::oid
          THEN v.typelem ELSE v.oid END
        WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped ORDER BY 1) AS types,
  ARRAY(SELECT a.attname::text FROM pg_catalog.pg_attribute AS a
        WHERE a.attrelid = c.oid AND a.attnum > 0 AND a.attgenerated = 'v' ORDER BY a.attnum) AS virtual,
  ARRAY(
    WITH RECURSIVE child (oid) AS (
      SELECT i.inhrelid FROM pg_catalog.pg_inherits AS i WHERE i.inhparent = c.oid
      UNION
      SELECT i.inhrelid FROM pg_catalog.pg_inherits AS i JOIN child ON i.inhparent = child.oid
    )
    SELECT child.oid FROM child JOIN pg_catalog.pg_class AS ch ON ch.oid = child.oid
    WHERE NOT ch.relispartition
      AND NOT EXISTS (SELECT FROM pg_catalog.pg_trigger AS t WHERE t.tgrelid = ch.oid
                      AND t.tgfoid = ANY (%(capture)s::oid[]))
    ORDER BY ch.relname
  ) AS children,
  c.relrowsecurity AS row_security,
  EXISTS (SELECT FROM part JOIN pg_catalog.pg_class AS p ON p.oid = part.oid
          WHERE part.top = c.oid AND p.relpersistence = 'u') AS unlogged,
  EXISTS (SELECT FROM part JOIN pg_catalog.pg_subscription_rel AS s ON s.srrelid = part.oid
          WHERE part.top = c.oid) AS subscribed
FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
WHERE c.oid = ANY (%(tables)s::oid[])
"""
_NAMED = """
SELECT c.oid, n.nspname::text, c.relname::text
FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
WHERE c.relname = ANY (%s::name[]) AND c.relkind IN ('r', 'p') AND NOT c.relispartition
  AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
ORDER BY 2, 3
"""
_SPELL = """
SELECT table_oid, table_oid::pg_catalog.regclass::pg_catalog.text
FROM pg_catalog.unnest(%s::pg_catalog.oid[]) AS named (table_oid)
"""
_PARTS = """
WITH part (top, oid) AS (
  SELECT c.oid, c.oid FROM pg_catalog.pg_class AS c WHERE c.oid = ANY (%(tables)s::oid[])
  UNION
  SELECT c.oid, tree.relid::oid
  FROM pg_catalog.pg_class AS c CROSS JOIN LATERAL pg_catalog.pg_partition_tree(c.oid) AS tree
  WHERE c.oid = ANY (%(tables)s::oid[])
)
"""

# Immediate, unconditional and without expressions: only such an index keeps any two rows distinct at every moment. A
# primary key is listed in any case, since it is the default key.
_UNIQUE_KEYS = """
SELECT i.indrelid, i.indisprimary, pg_catalog.array_agg(a.attname::text ORDER BY k.place)
FROM pg_catalog.pg_index AS i
CROSS JOIN LATERAL pg_catalog.unnest(i.indkey::int2[]) WITH ORDINALITY AS k (attnum, place)
LEFT JOIN pg_catalog.pg_attribute AS a ON a.attrelid = i.indrelid AND a.attnum = k.attnum
WHERE i.indrelid = ANY (%(tables)s::oid[]) AND i.indisunique AND i.indisvalid AND i.indpred IS NULL
  AND k.place <= i.indnkeyatts
GROUP BY i.indrelid, i.indexrelid, i.indisprimary, i.indimmediate
HAVING pg_catalog.bool_and(coalesce(a.attnotnull, false)) AND (i.indimmediate OR i.indisprimary)
"""

# to_jsonb() calls such a cast for a value of the type, also within an array, a composite, a domain or a range.
_CASTS = f"""
WITH RECURSIVE {_HELD.format(tables="SELECT pg_catalog.unnest(%(tables)s::oid[])")}
SELECT held.relation, held.attname::text AS column, pg_catalog.format_type(held.type, NULL) AS type,
  p.oid::regprocedure::text AS function, r.rolname::text AS owner
FROM held
JOIN pg_catalog.pg_cast AS k ON k.castsource = held.type
JOIN pg_catalog.pg_proc AS p ON p.oid = k.castfunc
JOIN pg_catalog.pg_roles AS r ON r.oid = p.proowner
WHERE k.casttarget IN ('pg_catalog.json'::regtype, 'pg_catalog.jsonb'::regtype) AND NOT r.rolsuper
  AND p.proowner IS DISTINCT FROM (
    SELECT o.relowner FROM pg_catalog.pg_class AS o JOIN pg_catalog.pg_namespace AS n ON n.oid = o.relnamespace
    WHERE n.nspname = %(schema)s AND o.relname = 'entity_changes')
ORDER BY 1, 2, 3
"""  # noqa: S608 - see above


def grants(capture: CaptureFunction, schema: str) -> tuple[str, ...]:
    """The GRANT statements for the rights that its owner lacks, as far as a GRANT gives them."""
    table, owner = sql.Identifier(schema, "entity_changes"), sql.Identifier(capture.owner)
    later = sql.Identifier(schema, "cdc_due_changes")
    by_right = {
        "USAGE on the schema": sql.SQL("USAGE ON SCHEMA {}").format(sql.Identifier(schema)),
        "INSERT on entity_changes": _inserting(_WRITTEN, table),
        "INSERT on cdc_due_changes": _inserting(_WRITTEN_LATER, later),
        "INSERT on cdc_barriers": _inserting(("entity_type", "seq", "id"), sql.Identifier(schema, "cdc_barriers")),
        "SELECT (seq, shard) on entity_changes": sql.SQL("SELECT (seq, shard) ON {}").format(table),
    }
    given = []
    for lacking in capture.lacks:
        right, _, rest = lacking.partition(" ")
        if right == "EXECUTE":
            given.append(sql.SQL("EXECUTE ON FUNCTION {}").format(sql.SQL(rest.removeprefix("on "))))
        elif lacking in by_right:
            given.append(by_right[lacking])
    return tuple(sql.SQL("GRANT {} TO {};").format(each, owner).as_string() for each in given)


def _inserting(columns: Sequence[str], table: sql.Identifier) -> sql.Composed:
    return sql.SQL("INSERT ({}) ON {}").format(sql.SQL(", ").join(map(sql.Identifier, columns)), table)


def capture_function(connection: psycopg.Connection, schema: str) -> CaptureFunction:
    """Raises NotFoundError where the function is missing."""
    rows = _rows(connection, _FUNCTION, {"schema": schema, "written": list(_WRITTEN), "later": list(_WRITTEN_LATER)})
    if not rows:
        raise NotFoundError(
            f"schema {schema} has no capture_entity_change()", hint="run `cdc db install`, or look into --schema"
        )
    [row] = rows
    lists = {name: tuple(row[name]) for name in ("oids", "settings", "lacks", "others")}
    return CaptureFunction(**{**row, **lists})


class NamedTable(NamedTuple):
    oid: int
    namespace: str
    name: str


def named_so(connection: psycopg.Connection, names: Collection[str]) -> list[NamedTable]:
    """The tables of these names in all schemas but the server's own; partitions are none."""
    return [NamedTable(*row) for row in connection.execute(_NAMED.encode(), [list(names)]).fetchall()]


Spell = Callable[[psycopg.Connection, Collection[int]], Mapping[int, str]]
"""Returns the names of tables by oid, in the spelling that its reader needs."""


def spell(connection: psycopg.Connection, oids: Collection[int]) -> dict[int, str]:
    """The spelling for SQL in this session. Safe on any search_path."""
    return dict(connection.execute(_SPELL.encode(), [list(oids)]).fetchall())


def triggers(
    connection: psycopg.Connection,
    capture: CaptureFunction,
    schema: str,
    tables: Sequence[int] | None = None,
    *,
    spell: Spell = spell,
) -> list[Tracked]:
    """Every trigger that calls the function ``capture``, on these ``tables`` or all; without copies on partitions."""
    parameters = {"capture": list(capture.oids), "tables": None if tables is None else list(tables)}
    rows = _rows(connection, _TRIGGERS, parameters)
    spelt = spell(connection, {row["oid"] for row in rows} | {copy[0] for row in rows for copy in row["copies"]})
    ours = {trigger_name(schema), former_trigger_name(schema)}
    truncates = truncate_triggers.find(connection, schema, tables)
    return [_trigger(row, ours, spelt, capture, truncates.get(row["oid"], ())) for row in rows]


def _trigger(
    row: dict[str, Any],
    ours: set[str],
    spelt: Mapping[int, str],
    capture: CaptureFunction,
    truncates: Sequence[TruncateTrigger],
) -> Tracked:
    entity_type, named_options, remembered = texts(row["arguments"], 3)
    options = read_options(named_options) | read_remembered(remembered)
    if not row["type"] & _ROW:
        options["broken"] = "it is not FOR EACH ROW"
    named = [column for option in LISTS for column in options.get(option, ())]
    found = Tracked(
        table=spelt[row["oid"]],
        trigger=row["trigger"],
        function="" if row["function"] == _NAME else row["function"],
        operations=tuple(operation for operation in CAPTURED if row["type"] & _TYPE_BITS[operation]),
        entity_type=entity_type or None,
        fires=FIRES[row["fires"]],
        ours=row["trigger"] in ours,
        truncate=next((each.does for each in truncates if each.fires != Fires.DISABLED), Truncate.IGNORE),
        truncates=tuple(truncates),
        update_of=tuple(row["update_of"]),
        when=_condition(row["definition"]),
        missing=tuple(dict.fromkeys(column for column in named if column not in row["columns"])),
        oid=row["oid"],
        namespace=row["namespace"],
        name=row["name"],
        root=row["root"],
        above=tuple(row["above"]),
        earlier=tuple(row["earlier"]),
        copies=tuple(_copy(each, spelt) for each in row["copies"]),
        **options,
    )
    # A function that reads no arguments, such as the documented one, refuses none.
    unknown = capture.unknown(found.options) if "TG_ARGV" in capture.source else []
    if unknown and not found.broken:
        return replace(found, broken=f"{_NAME}() knows no option {', '.join(unknown)}")
    return found


def _condition(definition: str | None) -> str:
    """The condition in a definition of pg_get_triggerdef(); "" for none."""
    written = definition or ""
    unquoted = _QUOTED.sub(lambda quoted: "." * len(quoted[0]), written)
    before, _, rest = unquoted.partition(_WHEN)
    begin = len(before) + len(_WHEN)
    return written[begin : begin + rest.index(_END)] if rest else ""


def _copy(row: Sequence[Any], spelt: Mapping[int, str]) -> Copy:
    oid, namespace, name, trigger, fires = row
    return Copy(namespace=namespace, name=name, spelt=spelt[oid], trigger=trigger, fires=FIRES[fires])


def tables(
    connection: psycopg.Connection,
    capture: CaptureFunction,
    schema: str,
    oids: Sequence[int],
    *,
    spell: Spell = spell,
) -> dict[int, SourceTable]:
    """Those tables, by oid."""
    parameters = {"tables": list(oids), "capture": list(capture.oids), "schema": schema}
    casts: dict[int, list[ForeignCast]] = {}
    for row in _rows(connection, _CASTS, parameters):
        casts.setdefault(row.pop("relation"), []).append(ForeignCast(**row))
    keys = connection.execute(_UNIQUE_KEYS.encode(), parameters).fetchall()
    rows = _rows(connection, _PARTS + _TABLES, parameters)
    others = {oid for row in rows for oid in (row["root"], *row["children"]) if oid is not None}
    spelt = spell(connection, {row["oid"] for row in rows} | others)
    return {row["oid"]: _table(row, spelt, keys, casts) for row in rows}


def _table(
    row: dict[str, Any],
    spelt: Mapping[int, str],
    keys: Sequence[tuple[Any, ...]],
    casts: Mapping[int, Sequence[ForeignCast]],
) -> SourceTable:
    oid = row["oid"]
    facts: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}
    facts |= {"root": spelt.get(row["root"]), "children": tuple(spelt[child] for child in row["children"])}
    return SourceTable(
        **facts,
        spelt=spelt[oid],
        primary_key=next((tuple(names) for of, primary, names in keys if primary and of == oid), ()),
        unique_keys=tuple(frozenset(names) for of, _, names in keys if of == oid),
        casts=tuple(casts.get(oid, ())),
    )


def _rows(connection: psycopg.Connection, statement: str, parameters: dict[str, Any]) -> list[dict[str, Any]]:
    with connection.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(statement.encode(), parameters).fetchall()
