"""The capture function that is made for one table: what it saves, and its text. Pure.

capture_entity_change() looks its options up for each row, and pins every setting that a value's text may depend on. A
function of the table's own has its name, type, key and columns as constants, and pins what the types of its columns
need. It is the general function with two shorter ways at its front. The shortest is open while the server has proved,
when it planned the condition, that the table is as the function was made for, and that converting a row cannot fail and
calls nobody's code (sql/0019_tracked_so.sql, 0027). The second converts in a subtransaction that may not write, and
compares for each row. A row that neither fits goes through all the rest. So it never captures less, and whatever
changes under it (the table's name, the trigger's arguments, a key column that is gone) makes it slower, not wrong. One
thing the second cannot see: a column of a new type, whose text depends on a setting that it does not pin. Then the
function's text is no longer the one that is expected here: the doctor says so, and ``cdc track`` and ``cdc db upgrade``
rewrite it. A table with a column of a type that somebody has made gets none.

It belongs to the role that captures, as the general function does, and has the same rights. Nothing in its text comes
from anybody but the catalogs, and all of it is quoted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from psycopg import sql

from cdc.core.model import message_prefix
from cdc.postgres.tracked_tables import SourceTable, Tracked, all_arguments

_PREFIX = "capture_table_"
CAPTURE_ROLE = "cdc_capture_"
"""Of the names of the roles that capture: capture_role.sql."""
_HASH_DIGITS = 8
"""As IS_TABLE_FUNCTION has them."""
_NAME_BYTES = 40
_TEXT_BYTES = 1000
"""Longest type and id together that the short way takes; bounded_text() cuts at the same length."""
_METADATA = ("user_id", "chat_id", "room_id")
"""Columns that capture_entity_change() copies into the metadata."""
_ALWAYS = {"search_path": "pg_catalog, pg_temp", "row_security": "on", "timezone": "UTC"}
"""The metadata tell a time."""
_PINNED = {
    "datestyle": "ISO, YMD",
    "bytea_output": "hex",
    "intervalstyle": "postgres",
    "extra_float_digits": "1",
    "lc_monetary": "C",
    "quote_all_identifiers": "off",
}
"""As capture_entity_change() has them, the others as well."""
_INDEPENDENT = {
    "bool", "int2", "int4", "int8", "oid", "numeric", "text", "varchar", "bpchar", "name", "uuid", "json", "jsonb",
    "date", "timestamp", "timestamptz", "inet", "cidr", "macaddr",
}  # fmt: skip
"""Types whose JSON is the same under every other setting. JSON has dates in ISO 8601, whatever DateStyle says."""
_DEPENDENT = {
    "float4": "extra_float_digits",
    "float8": "extra_float_digits",
    "bytea": "bytea_output",
    "interval": "intervalstyle",
}
"""Types whose JSON depends on one setting. That of any type in neither table may depend on all."""

_SAFE = {
    "bool": "BOOLEAN",
    "int2": "SMALLINT",
    "int4": "INTEGER",
    "int8": "BIGINT",
    "numeric": "NUMERIC",
    "varchar": "VARCHAR",
    "bpchar": "CHAR",
    "date": "DATE",
    "timestamp": "TIMESTAMP",
    "timestamptz": "TIMESTAMP_WTZ",
    "float4": "REAL",
    "float8": "DOUBLE",
}
"""Types of which every value has its JSON, and how table_to_xmlschema() calls them."""
_SAFE_BY_NAME = ("text", "name", "uuid", "oid", "inet", "cidr", "macaddr", "bytea", "interval")
"""The same, for those that it calls by their schema and name. No json or jsonb: one may be nested too deeply."""
_SAFE_BYTES = 16_384
"""Largest row of such types, as it is stored. Decompressed it is smaller than what JSON can hold."""

_ANOTHERS = ""
"""Stands for every type that is not the server's own. Its owner may have a cast to JSON, which could leave settings in
the session of whoever writes: the short way does not undo them, capture_entity_change() undoes what they do to names.
"""

MADE = "-- Made by cdc for one table and its trigger's arguments."
"""In the text of each."""
_PROVED_WAY = """\
  {made} Why the proof is not asked for each row, but for each
  -- plan, is said in sql/0019_tracked_so.sql. Each transaction sets up again the whole of each expression that it comes
  -- to, so each operation has its own.
  DECLARE
    v_old jsonb;
    v_new jsonb;
    v_entity_id text;
    v_sent pg_lsn;
    v_nothing record;
  BEGIN
    IF TG_OP OPERATOR(pg_catalog.=) 'INSERT' THEN
      IF {proof}
        AND {of_table}
        AND pg_catalog.pg_column_size(NEW) OPERATOR(pg_catalog.<=) {bytes}
        AND {no_cause}
      THEN
        v_new := {new};
        v_entity_id := {new_key};
        IF {new_fits} THEN
          {insert}
          RETURN v_nothing;
        END IF;
      END IF;
    ELSIF TG_OP OPERATOR(pg_catalog.=) 'UPDATE' THEN
      IF {proof}
        AND {of_table}
        AND greatest(pg_catalog.pg_column_size(OLD), pg_catalog.pg_column_size(NEW)) OPERATOR(pg_catalog.<=) {bytes}
        AND {no_cause}
      THEN
        v_old := {old};
        v_new := {new};
        v_entity_id := {new_key};
        IF {new_fits} AND {old_key} OPERATOR(pg_catalog.=) v_entity_id THEN
          {update}
          RETURN v_nothing;
        END IF;
      END IF;
    ELSIF {proof}
      AND {of_table}
      AND pg_catalog.pg_column_size(OLD) OPERATOR(pg_catalog.<=) {bytes}
      AND {no_cause}
    THEN
      v_old := {old};
      v_entity_id := {old_key};
      IF {old_fits} THEN
        {delete}
        RETURN v_nothing;
      END IF;
    END IF;
  END;
"""
_SHORT_WAY = """\
  {made} A row for which one of these conditions does not hold goes
  -- through what follows, which is capture_entity_change(); why all is read only is said there. A cast may have changed
  -- the search_path, so every name has its schema until the path is pinned again.
  DECLARE
    v_old jsonb;
    v_new jsonb;
    v_entity_id text;
    v_sent pg_lsn;
    v_read_only text;
    v_converted boolean;
  BEGIN
    BEGIN
      {conversion}
      IF pg_catalog.pg_my_temp_schema() OPERATOR(pg_catalog.<>) 0 THEN
        RAISE assert_failure;
      END IF;
      v_converted := true;
    EXCEPTION WHEN OTHERS OR assert_failure THEN
      NULL;
    END;
    v_entity_id := {key};
    IF v_converted
      AND TG_ARGV OPERATOR(pg_catalog.=) {arguments}
      AND TG_TABLE_NAME OPERATOR(pg_catalog.=) {name}
      AND TG_TABLE_SCHEMA OPERATOR(pg_catalog.=) {namespace}
      AND {conditions}
    THEN
      {insert}
      RETURN NULL;
    END IF;
    v_read_only := pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
  END;
"""
_INSERT = """INSERT INTO {outbox}
          (table_schema, table_name, operation, entity_id, entity_type, {columns}, shard)
        VALUES ({namespace}, {name}, {operation}, v_entity_id, {entity_type}, {values},
          (pg_catalog.hashtext(v_entity_id) OPERATOR(pg_catalog.&) 63)::smallint)
        RETURNING pg_catalog.pg_logical_emit_message(true, {prefix}, pg_catalog.concat_ws(',', seq, shard))
        INTO v_sent;"""
_BOTH = "old_data, new_data, metadata"
_OF_ANY = {
    "operation": "TG_OP",
    "columns": _BOTH,
    "values": "v_old, v_new, CASE WHEN v_new IS NOT NULL THEN {metadata} END",
}
_OF_INSERT = {"operation": "'INSERT'", "columns": "new_data, metadata", "values": "v_new, {metadata}"}
_OF_UPDATE = {"operation": "'UPDATE'", "columns": _BOTH, "values": "v_old, v_new, {metadata}"}
_OF_DELETE = {"operation": "'DELETE'", "columns": "old_data", "values": "v_old"}
"""What the change of each operation has in _INSERT."""
_CHAT_OR_ROOM = """CASE WHEN v_new OPERATOR(pg_catalog.->) 'chat_id' OPERATOR(pg_catalog.<>) 'null'
            THEN v_new OPERATOR(pg_catalog.->) 'chat_id' ELSE v_new OPERATOR(pg_catalog.->) 'room_id' END"""
_OF_TABLE = "TG_RELID OPERATOR(pg_catalog.=) {}"
_NO_CAUSE = "(pg_catalog.current_setting('cdc.cause', true) OPERATOR(pg_catalog.=) '') IS NOT FALSE"
_PROOF = "{function}({table}, {namespace}, {name}, {own}, {arguments}, {types}, {metadata}::pg_catalog.text[])"
_WHOLE = """v_old := CASE pg_catalog.set_config('transaction_read_only', 'on', true)
        WHEN 'on' THEN pg_catalog.to_jsonb(OLD) END;
      v_new := pg_catalog.to_jsonb(NEW);"""
_PART = """v_read_only := pg_catalog.set_config('transaction_read_only', 'on', true);
      IF TG_OP OPERATOR(pg_catalog.<>) 'INSERT' THEN
        v_old := pg_catalog.to_jsonb(pg_catalog.jsonb_populate_record(OLD, {nulls}))
          OPERATOR(pg_catalog.-) {excluded}::pg_catalog.text[];
      END IF;
      IF TG_OP OPERATOR(pg_catalog.<>) 'DELETE' THEN
        v_new := pg_catalog.to_jsonb(pg_catalog.jsonb_populate_record(NEW, {nulls}))
          OPERATOR(pg_catalog.-) {excluded}::pg_catalog.text[];
      END IF;"""


@dataclass(frozen=True, slots=True)
class TableCapture:
    """One such function. ``settings``: as pg_proc.proconfig has them, with names in small letters."""

    name: str
    owner: str
    settings: frozenset[str]
    source: str
    security_definer: bool = True

    def serves_as(self, expected: TableCapture) -> bool:
        """Where the general function was given away, which is another finding, this one may still have the role."""
        kept = self.owner.startswith(CAPTURE_ROLE) and not expected.owner.startswith(CAPTURE_ROLE)
        return (replace(self, owner=expected.owner) if kept else self) == expected


def made_for(schema: str, table: SourceTable, tracked: Tracked, general: str, owner: str) -> TableCapture | None:
    """The function for ``table`` as ``tracked`` captures it, into the outbox in ``schema``; None where none is made.

    ``general`` and ``owner``: the source of capture_entity_change(), and whose it is. None is made where the short way
    would not be taken, or a function of another version is installed.
    """
    usual = (
        table.kind == "r"
        and tracked.key
        and not (
            tracked.columns
            or tracked.virtual
            or tracked.handled
            or tracked.schema_in_key
            or tracked.more
            or tracked.missing
        )
        and not tracked.broken
        and _ANOTHERS not in table.types
        and len(tracked.effective_type.encode()) < _TEXT_BYTES // 2
    )
    if not usual or not general.startswith("\nDECLARE\n") or not general.endswith("\nEND\n"):
        return None
    ways = _proved_way(schema, table, tracked) + _short_way(schema, table, tracked)
    return TableCapture(
        name=function_name(table.namespace, table.name),
        owner=owner,
        settings=frozenset(f"{name}={value}" for name, value in _settings(table.types)),
        # What it declares is set up only where a row comes so far.
        source=f"\nBEGIN\n{ways.as_string()}{general.rstrip()};\nEND\n",
    )


def function_name(namespace: str, table: str) -> str:
    """Of at most 63 bytes, and another one for each table."""
    digest = hashlib.sha256(f"{namespace}\0{table}".encode()).hexdigest()[:_HASH_DIGITS]
    return f"{_PREFIX}{table.encode()[:_NAME_BYTES].decode(errors='ignore')}_{digest}"


def settings(config: Iterable[str]) -> frozenset[str]:
    """pg_proc.proconfig, as ``TableCapture.settings`` has it."""
    return frozenset(f"{name.lower()}={value}" for name, _, value in (each.partition("=") for each in config))


def create(schema: str, made: TableCapture) -> list[sql.Composed]:
    """The statements that create or replace it."""
    named = sql.Identifier(schema, made.name)
    pinned = sql.SQL("\n").join(
        sql.SQL("SET {} = {}").format(sql.Identifier(name), _value(name, value))
        for name, _, value in (setting.partition("=") for setting in sorted(made.settings))
    )
    return [
        sql.SQL("CREATE OR REPLACE FUNCTION {}() RETURNS trigger\nLANGUAGE plpgsql SECURITY DEFINER\n{}\nAS {}").format(
            named, pinned, sql.Literal(made.source)
        ),
        sql.SQL("REVOKE ALL ON FUNCTION {}() FROM PUBLIC").format(named),
        sql.SQL("ALTER FUNCTION {}() OWNER TO {}").format(named, sql.Identifier(made.owner)),
    ]


def _value(name: str, value: str) -> sql.Composable:
    if name in ("search_path", "datestyle"):  # lists
        return sql.SQL(", ").join(map(sql.Literal, value.split(", ")))
    return sql.Literal(value)


def _settings(types: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    yield from _ALWAYS.items()
    unknown = set(types) - _INDEPENDENT - _DEPENDENT.keys()
    needed = _PINNED.keys() if unknown else {_DEPENDENT[each] for each in types if each in _DEPENDENT}
    yield from ((name, value) for name, value in _PINNED.items() if name in needed)


def _proved_way(schema: str, table: SourceTable, tracked: Tracked) -> sql.Composed:
    """Nothing where a type is not among the safe ones."""
    if not set(table.types) <= {*_SAFE, *_SAFE_BY_NAME}:
        return sql.Composed([])
    oid = sql.SQL("{}::pg_catalog.oid").format(sql.Literal(str(table.oid)))
    quoted = ", ".join("'" + given.replace("'", "''") + "'" for given in all_arguments(tracked))
    proof = sql.SQL(_PROOF).format(
        function=sql.Identifier(schema, "is_tracked_so"),
        table=oid,
        namespace=sql.Literal(table.namespace),
        name=sql.Literal(table.name),
        own=sql.Literal(function_name(table.namespace, table.name)),
        arguments=sql.Literal(f"({quoted})"),
        types=sql.Literal(_safe_types(table.types)),
        metadata=sql.Literal(_array([each for each in _METADATA if each in table.columns])),
    )
    return sql.SQL(_PROVED_WAY).format(
        made=sql.SQL(MADE),
        proof=proof,
        of_table=sql.SQL(_OF_TABLE).format(oid),
        bytes=sql.Literal(_SAFE_BYTES),
        no_cause=sql.SQL(_NO_CAUSE),
        old=_converted("OLD", tracked),
        new=_converted("NEW", tracked),
        old_key=_key_of("v_old", tracked),
        new_key=_key_of("v_new", tracked),
        old_fits=sql.SQL(" AND ").join(_key_conditions("v_old", tracked)),
        new_fits=sql.SQL(" AND ").join(_key_conditions("v_new", tracked)),
        insert=_insert(schema, table, tracked, _OF_INSERT),
        update=_insert(schema, table, tracked, _OF_UPDATE),
        delete=_insert(schema, table, tracked, _OF_DELETE),
    )


def _safe_types(types: Iterable[str]) -> str:
    """A pattern for the types that the function's settings, and what is safe, allow for a column."""
    pinned = dict(_settings(tuple(types)))
    dependent = {each for each, setting in _DEPENDENT.items() if setting not in pinned}
    known = [called for each, called in _SAFE.items() if each not in dependent]
    named = [each for each in _SAFE_BY_NAME if each not in dependent]
    return rf"^({'|'.join(known)}|UDT\.[^.]*\.pg_catalog\.({'|'.join(named)}))$"


def _converted(row: str, tracked: Tracked) -> sql.Composable:
    whole = sql.SQL("pg_catalog.to_jsonb({})").format(sql.SQL(row))
    if not tracked.exclude:
        return whole
    excluded = sql.Literal(_array(tracked.exclude))
    return sql.SQL("{} OPERATOR(pg_catalog.-) {}::pg_catalog.text[]").format(whole, excluded)


def _short_way(schema: str, table: SourceTable, tracked: Tracked) -> sql.Composed:
    given = all_arguments(tracked)
    return sql.SQL(_SHORT_WAY).format(
        made=sql.SQL(MADE),
        arguments=sql.Literal(f"[0:{len(given) - 1}]={_array(given)}"),
        name=sql.Literal(table.name),
        namespace=sql.Literal(table.namespace),
        conversion=_conversion(tracked),
        key=_key("coalesce(v_new, v_old)", tracked),
        conditions=sql.SQL("\n      AND ").join(_conditions(table, tracked)),
        insert=_insert(schema, table, tracked, _OF_ANY),
    )


def _insert(schema: str, table: SourceTable, tracked: Tracked, parts: Mapping[str, str]) -> sql.Composed:
    return sql.SQL(_INSERT).format(
        outbox=sql.Identifier(schema, "entity_changes"),
        namespace=sql.Literal(table.namespace),
        name=sql.Literal(table.name),
        entity_type=sql.Literal(tracked.effective_type),
        prefix=sql.Literal(message_prefix(schema)),
        **{part: sql.SQL(text).format(metadata=_metadata(table, tracked)) for part, text in parts.items()},
    )


def _metadata(table: SourceTable, tracked: Tracked) -> sql.Composed:
    """The metadata of what is captured with a new row, as capture_entity_change() has them."""
    values = {column: f"v_new OPERATOR(pg_catalog.->) '{column}'" for column in _in_metadata(table, tracked)}
    if "room_id" in values:
        of_room = values.pop("room_id")
        values["chat_id"] = _CHAT_OR_ROOM if "chat_id" in values else of_room
    named = sql.SQL(", ").join(sql.SQL(f"'{name}', {value}") for name, value in values.items())
    return sql.SQL("pg_catalog.jsonb_build_object('timestamp', CURRENT_TIMESTAMP{}{})").format(
        sql.SQL(", " if values else ""), named
    )


def _in_metadata(table: SourceTable, tracked: Tracked) -> list[str]:
    return [each for each in _METADATA if each in table.columns and each not in tracked.exclude]


def _conversion(tracked: Tracked) -> sql.Composable:
    if not tracked.exclude:
        return sql.SQL(_WHOLE)
    nulls = json.dumps(dict.fromkeys(tracked.exclude), ensure_ascii=False)
    return sql.SQL(_PART).format(nulls=sql.Literal(nulls), excluded=sql.Literal(_array(tracked.exclude)))


def _conditions(table: SourceTable, tracked: Tracked) -> Iterator[sql.Composable]:
    yield from _key_conditions("coalesce(v_new, v_old)", tracked)
    yield sql.SQL("coalesce(v_entity_id OPERATOR(pg_catalog.=) {}, v_old IS NULL)").format(_key("v_old", tracked))
    yield sql.SQL("coalesce(pg_catalog.current_setting('cdc.cause', true), '') OPERATOR(pg_catalog.=) ''")
    yield sql.SQL("pg_catalog.pg_partition_root(TG_RELID) IS NULL")
    yield sql.SQL("TG_WHEN OPERATOR(pg_catalog.=) 'AFTER'")
    named = _in_metadata(table, tracked)
    others = _array([each for each in _METADATA if each not in named])
    yield sql.SQL("(v_new OPERATOR(pg_catalog.?|) {}::pg_catalog.text[]) IS NOT TRUE").format(sql.Literal(others))
    if named:
        yield sql.SQL("(v_new OPERATOR(pg_catalog.?&) {}::pg_catalog.text[]) IS NOT FALSE").format(
            sql.Literal(_array(named))
        )


def _key_conditions(row: str, tracked: Tracked) -> Iterator[sql.Composable]:
    """The key is there and short."""
    room = _TEXT_BYTES - len(tracked.effective_type.encode())
    yield sql.SQL("pg_catalog.octet_length(v_entity_id) OPERATOR(pg_catalog.<=) {}").format(sql.Literal(room))
    if len(tracked.key) > 1:
        keys = sql.Literal(_array(tracked.key))
        yield sql.SQL("{} OPERATOR(pg_catalog.?&) {}::pg_catalog.text[]").format(sql.SQL(row), keys)


def _key(row: str, tracked: Tracked) -> sql.Composable:
    """The text of a row's key, as capture_entity_change() has it. NULL where the row, or its one column, is NULL."""
    key = _key_of(row, tracked)
    return key if len(tracked.key) == 1 else sql.SQL("CASE WHEN {} IS NOT NULL THEN {} END").format(sql.SQL(row), key)


def _key_of(row: str, tracked: Tracked) -> sql.Composed:
    """The same, of a row that is not NULL."""
    columns = [sql.Literal(column) for column in tracked.key]
    if len(columns) == 1:
        return sql.SQL("({} OPERATOR(pg_catalog.->>) {})").format(sql.SQL(row), *columns)
    values = [sql.SQL("{} OPERATOR(pg_catalog.->) {}").format(sql.SQL(row), column) for column in columns]
    return sql.SQL("pg_catalog.jsonb_build_array({})::pg_catalog.text").format(sql.SQL(", ").join(values))


def _array(names: Sequence[str]) -> str:
    """The text of an array of these."""
    quoted = ('"' + name.replace("\\", "\\\\").replace('"', '\\"') + '"' for name in names)
    return "{" + ",".join(quoted) + "}"
