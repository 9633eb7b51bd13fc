"""What somebody may do who has CREATE on a schema of the search path: offer operators and functions that match better.

For each pair of the usual types for which the server has no operator of its own, and for each function that a
statement of this project calls with arguments that are coerced or polymorphic, one that fits exactly. All of them
raise, so that a statement which takes one fails, and the server's log says which one and for whom.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import psycopg
from psycopg import sql

MARK = "hijacked"
_ROOT = Path(__file__).parent.parent
_OPERATORS = ("=", "<>", "<", ">", "<=", ">=", "||", "-", "+", "&", "->", "->>", "~", "!~")
_TYPES = (
    "bool", "int2", "int4", "int8", "float8", "numeric", "oid", "text", "varchar", "name", '"char"', "uuid", "jsonb",
    "timestamptz", "interval", "xid", "xid8", "regclass", "regtype", "regproc", "pg_lsn", "int2[]", "int4[]", "int8[]",
    "text[]", "name[]", "uuid[]", "oid[]", "int2vector", "oidvector",
)  # fmt: skip
_ELEMENTS = ("bool", "int2", "int4", "int8", "float8", "text", "name", "uuid", "oid", "jsonb", "timestamptz")
_LIKE = {
    "oid": ("oid", "regclass", "regproc", "int8"),
    "text": ("text", "name", "varchar", '"char"'),
    "int8": ("int8", "int4", "int2"),
    "int4": ("int4", "int2"),
    "float8": ("float8", "int8", "int4", "numeric"),
    "anyelement": (*_ELEMENTS, "pg_catalog.pg_replication_slots"),
    "any": (*_ELEMENTS, "pg_catalog.pg_replication_slots"),
    "anynonarray": _ELEMENTS,
    "anycompatible": _ELEMENTS,
    "anyarray": tuple(f"{each}[]" for each in _ELEMENTS),
    "anycompatiblearray": tuple(f"{each}[]" for each in _ELEMENTS),
}
_VARIANTS_MAX = 60

_MISSING_OPERATORS = """
SELECT o.name, l.name, r.name
FROM unnest(%(operators)s::text[]) AS o(name), unnest(%(types)s::text[]) AS l(name),
     unnest(%(types)s::text[]) AS r(name)
WHERE NOT EXISTS (SELECT FROM pg_operator WHERE oprnamespace = 'pg_catalog'::regnamespace AND oprname = o.name
                    AND oprleft = l.name::regtype AND oprright = r.name::regtype)
"""
_FUNCTIONS = """
SELECT p.proname::text, p.prokind = 'a', p.provariadic <> 0,
       ARRAY(SELECT format_type(t, NULL) FROM unnest(p.proargtypes) WITH ORDINALITY AS a(t, n) ORDER BY n)
FROM pg_proc AS p
WHERE p.pronamespace = 'pg_catalog'::regnamespace AND p.prokind IN ('f', 'a') AND p.proname = ANY (%s)
  AND p.pronargs BETWEEN 1 AND 4
"""
_SHORT = {"bigint": "int8", "integer": "int4", "smallint": "int2", "double precision": "float8", "boolean": "bool",
          "timestamp with time zone": "timestamptz", '"any"': "any"}  # fmt: skip


def offer(db: psycopg.Connection, schema: str) -> int:
    """Make them all in ``schema``, as whoever ``db`` is; how many."""
    names = set(_called())
    found = db.execute(_FUNCTIONS, [sorted(names)]).fetchall()
    operators = db.execute(_MISSING_OPERATORS, {"operators": list(_OPERATORS), "types": list(_TYPES)}).fetchall()
    statements = list(dict.fromkeys(itertools.chain(_functions(schema, found), _of_operators(schema, operators))))
    for start in range(0, len(statements), 200):
        db.execute(";\n".join(statements[start : start + 200]).encode())
    return len(statements)


def _called() -> Iterator[str]:
    """Whatever looks like the call of a function in a statement of ours."""
    for path in [*_ROOT.glob("sql/**/*.sql"), *_ROOT.glob("cdc/**/*.sql"), *_ROOT.glob("cdc/**/*.py")]:
        yield from re.findall(r"\b([a-z_0-9]+)\(", path.read_text())


def _of_operators(schema: str, pairs: list[tuple[str, str, str]]) -> Iterator[str]:
    for operator, left, right in pairs:
        function = _quoted(f"op {operator} {left} {right}")
        yield create_function(schema, function, (left, right), "bool" if operator != "||" else left)
        arguments = f"LEFTARG = {left}, RIGHTARG = {right}, FUNCTION = {schema}.{function}"
        yield f"CREATE OPERATOR {schema}.{operator} ({arguments})"


def _functions(schema: str, found: list[tuple[str, bool, bool, list[str]]]) -> Iterator[str]:
    own = {(name, tuple(_SHORT.get(each, each) for each in arguments)) for name, _, _, arguments in found}
    for name, is_aggregate, is_variadic, arguments in found:
        given = [_SHORT.get(each, each) for each in arguments]
        lists = [given]
        if is_variadic:
            element = "text" if given[-1] in ("any", "anyarray") else given[-1].removesuffix("[]")
            lists = [[*given[:-1], *[element] * n] for n in (1, 2, 3)]
        for each in lists:
            choices = [_LIKE.get(argument, (argument,)) for argument in each]
            for chosen in itertools.islice(itertools.product(*choices), _VARIANTS_MAX):
                if (name, chosen) in own or len(chosen) > 4 or any("any" in one for one in chosen):
                    continue
                if is_aggregate:
                    state = _quoted(f"state of {name} {' '.join(chosen)}")
                    yield create_function(schema, state, ("int8", *chosen), "int8")
                    yield (
                        f"CREATE OR REPLACE AGGREGATE {schema}.{_quoted(name)} ({', '.join(chosen)})"
                        f" (SFUNC = {schema}.{state}, STYPE = int8)"
                    )
                else:
                    yield create_function(schema, _quoted(name), chosen, "text")


def create_function(schema: str, name: str, arguments: tuple[str, ...], returns: str) -> str:
    said = f"{MARK} {name} ({', '.join(arguments)})".replace("'", "''").replace("%", "%%")
    return (
        f"CREATE OR REPLACE FUNCTION {schema}.{name} ({', '.join(arguments)}) RETURNS {returns} LANGUAGE plpgsql AS"
        f" $body$ BEGIN RAISE EXCEPTION '{said} as %', current_user; END $body$"
    )


def _quoted(name: str) -> str:
    return sql.Identifier(name[:63]).as_string()
