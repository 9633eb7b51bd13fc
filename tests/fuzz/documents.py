"""Rows of any values, through capture and handlers, in databases of three encodings.

The same statement goes to a table that is not tracked first: what that one takes, the tracked one takes. And whatever
was captured ends as processed or as a dead letter, and nothing else suffers.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psycopg
from psycopg import sql

from tests.fuzz.stage import ENCODINGS, Stage

_TABLE = """
CREATE TABLE {name} (
  id text, k2 int DEFAULT 0, t text, j json, jb jsonb, b bytea, n numeric, f float8, ts timestamptz, d date,
  r daterange, a text[], iv interval, m money, c char(8), x xml, PRIMARY KEY (id, k2)
)
"""
_COLUMNS = ("id", "t", "j", "jb", "b", "n", "f", "ts", "d", "r", "a", "iv", "m", "c", "x")
_ROWS = 40


@contextmanager
def stage() -> Iterator[Stage]:
    with Stage(*ENCODINGS) as made:
        for encoding, db in made.databases.items():
            for name in ("free", "one", "two"):
                db.execute(sql.SQL(_TABLE).format(name=sql.Identifier(name)))
            made.command(encoding, "track", "one", "--key", "id")
            made.command(encoding, "track", "two", "--key", "id,k2", "--exclude", "b")
        yield made


def attack(stage: Stage, dice: random.Random) -> int:
    """Returns how many statements were sent."""
    encoding = dice.choice(ENCODINGS)
    db = stage.databases[encoding]
    for _ in range(_ROWS):
        values = {
            column: _VALUES[column](dice, encoding) for column in _COLUMNS if column == "id" or dice.random() < 0.7
        }
        what = dice.choice(("INSERT", "INSERT", "UPDATE", "DELETE"))
        if _taken(db, "free", what, values):
            for table in ("one", "two"):
                refusal = _refusal(db, table, what, values)
                assert refusal is None, f"{encoding}: {what} of {sorted(values)} into a tracked table: {refusal}"
        if dice.random() < 0.2:
            _publish(db, dice, encoding)
    return _ROWS * 3


def check(stage: Stage) -> None:
    for encoding in ENCODINGS:
        stage.holds(encoding)
        db = stage.databases[encoding]
        db.execute("DELETE FROM entity_changes WHERE processed OR dead_at IS NOT NULL")


def _statement(table: str, what: str, values: dict[str, object]) -> sql.Composed:
    columns = [column for column in values if column != "id"]
    name = sql.Identifier(table)
    if what == "DELETE":
        return sql.SQL("DELETE FROM {} WHERE id = (SELECT min(id) FROM {})").format(name, name)
    if what == "UPDATE" and columns:
        assignments = sql.SQL(", ").join(
            sql.SQL("{} = {}").format(sql.Identifier(column), _value(column, values[column])) for column in columns
        )
        return sql.SQL("UPDATE {} SET {} WHERE id = (SELECT max(id) FROM {})").format(name, assignments, name)
    return sql.SQL("INSERT INTO {} ({}) VALUES ({}) ON CONFLICT DO NOTHING").format(
        name,
        sql.SQL(", ").join(map(sql.Identifier, values)),
        sql.SQL(", ").join(_value(column, value) for column, value in values.items()),
    )


def _value(column: str, value: object) -> sql.Composable:
    placeholder = sql.Placeholder(column)
    return sql.SQL(r"{}::text || E'\xfc\xff'").format(placeholder) if isinstance(value, _Broken) else placeholder


def _refusal(db: psycopg.Connection, table: str, what: str, values: dict[str, object]) -> str | None:
    try:
        db.execute(_statement(table, what, values), values)
    except (psycopg.Error, UnicodeError) as error:
        return f"{type(error).__name__} {error}"[:500]
    return None


def _taken(db: psycopg.Connection, table: str, what: str, values: dict[str, object]) -> bool:
    return _refusal(db, table, what, values) is None


def _publish(db: psycopg.Connection, dice: random.Random, encoding: str) -> None:
    """An event without a table; what it is refused for is its own sender's business."""
    try:
        db.execute(
            "SELECT publish_change(%s::text, %s::text, new_data => %s::jsonb)",
            [_text(dice, encoding), _text(dice, encoding), _json(dice, encoding)],
        )
    except (psycopg.Error, UnicodeError):
        return


def _text(dice: random.Random, encoding: str) -> str:
    alphabets = {
        "UTF8": "aZ09 \t\n\r\x01\x1b\x7f\x80\x9b\xa0äß\u2028\u202e\u2717\ufeff\U0001f600'\"\\{}[],;$%-",
        "LATIN1": "aZ09 \t\n\x01\x1b\x7f\x80\x9bäß'\"\\{}[],;$%",
        "SQL_ASCII": "aZ09 \t\n\x01\x1b\x7f'\"\\{}[],;$%",
    }
    length = dice.choice((0, 1, 3, 10, 100, 1_000, 2_700, 3_000, 9_000, 70_000))
    text = "".join(dice.choices(alphabets[encoding], k=min(length, 3_000))) * max(1, length // 3_000)
    return text if dice.random() < 0.9 else text + "".join(dice.choices("0123456789abcdef", k=4_000))


class _Broken(str):
    """A text that gets bytes at its end which are no text of any encoding."""


def _any_text(dice: random.Random, encoding: str) -> str:
    text = _text(dice, encoding)
    return _Broken(text) if encoding == "SQL_ASCII" and dice.random() < 0.5 else text


def _json(dice: random.Random, encoding: str, depth: int = 0) -> str:
    if depth < 4 and dice.random() < 0.4:
        inner = [_json(dice, encoding, depth + 1) for _ in range(dice.randrange(4))]
        if dice.random() < 0.5:
            return f"[{','.join(inner)}]"
        return "{" + ",".join(f'"k{n}":{each}' for n, each in enumerate(inner)) + "}"
    if dice.random() < 0.4:
        return '"' + "".join(each if each.isalnum() else "x" for each in _text(dice, encoding)) + '"'
    deep = dice.choice((10, 200, 1_200, 5_000))
    return dice.choice((*_ODD_JSON, "[" * deep + "]" * deep))


_ODD_JSON = (
    '"\\u0000"', '"\\ud800"', '"a\\u0000b"', '"\\udc00\\ud800"', '"\\uFFFF"', "1e200000", "-1e-200000", "1" * 5_000,
    "0." + "3" * 5_000, "-0", "1e308", "1E400", "null", "true", '""', "{}", "[]", '{"a":1,"a":2,"":{"":0}}',
)  # fmt: skip


def _one_of(*values: object) -> Callable[[random.Random, str], object]:
    return lambda dice, _: dice.choice(values)


_VALUES: dict[str, Callable[[random.Random, str], object]] = {
    "id": lambda dice, encoding: _any_text(dice, encoding) if dice.random() < 0.5 else str(dice.randrange(50)),
    "t": _any_text,
    "j": _json,
    "jb": _json,
    "b": lambda dice, _: dice.randbytes(dice.choice((0, 1, 100, 5_000, 300_000))),
    "n": _one_of(
        "NaN", "Infinity", "-Infinity", "0", "1e1000", "-1e-1000", "9" * 4_401, "12345678901234567890.123", None
    ),
    "f": _one_of("NaN", "Infinity", "-Infinity", "1e308", "5e-324", "-0", None),
    "ts": _one_of("infinity", "-infinity", "294276-12-31", "4713-01-01 BC", "epoch", None),
    "d": _one_of("infinity", "-infinity", "5874897-12-31", "4713-01-01 BC", None),
    "r": _one_of("empty", "(,)", "[2026-01-02,2026-02-03)", "[-infinity,infinity]", None),
    "a": _one_of("{}", '{"a,b","c\\"d",NULL,"null"}', "{{1,2},{3,4}}", "[0:1]={x,y}", None),
    "iv": _one_of("178000000 years", "-178000000 years", "1 day -1 second", "0", None),
    "m": _one_of("92233720368547758.07", "-92233720368547758.08", "0", None),
    "c": _one_of("", "        ", "abc", None),
    "x": _one_of("<a/>", "text <b>x</b>", "<!-- c -->", None),
}
