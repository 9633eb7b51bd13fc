"""What the server's catalogs say about the objects of an outbox, and how that differs from what they should say."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import psycopg
from psycopg import sql

_ADDED = ("trigger ", "rule ", "policy ")
"""Parts that run code or hide rows, whichever role has added them."""
_SHORT = 120
"""Characters of a definition that a finding shows."""

_NAMESPACE = """
SELECT oid, pg_catalog.quote_ident(%(schema)s) || '.' FROM pg_catalog.pg_namespace
WHERE CASE %(schema)s WHEN 'pg_temp' THEN oid = pg_catalog.pg_my_temp_schema() ELSE nspname = %(schema)s END
"""


@dataclass(frozen=True, slots=True)
class Difference:
    """One object that differs from this version's. ``expected`` or ``found`` is "" where the object is missing there.

    ``by_hand``: the statement that fixes it where ``cdc db upgrade`` does not; "" where that does, or none is known.
    """

    object: str
    problem: str
    expected: str = ""
    found: str = ""
    by_hand: str = ""

    def __str__(self) -> str:
        said = f"{self.object} is {self.problem}"
        if max(len(self.expected), len(self.found)) > _SHORT or "\n" in self.expected + self.found:
            return said
        if self.expected and self.found:
            return f"{said}: {self.found}, not {self.expected}"
        return f"{said}: {self.found}" if self.found else said


def picture(
    connection: psycopg.Connection, query: str, schema: str, expected: Mapping[str, str] | None = None
) -> dict[str, str]:
    """``schema``'s part of the catalogs, ``{"column seq of table entity_changes": its definition}``, wholes first.

    ``query`` is picture.sql; the search_path is pg_catalog. Names in definitions have no schema, as those of temporary
    tables never do; in the bodies of functions, where it counts, ``@schema@`` stands for it. Only names in ``expected``
    are replaced, if it is given: the schema may hold any number of other objects.
    """
    namespace, prefix = connection.execute(_NAMESPACE, {"schema": schema}).fetchone() or (0, "")
    rows = connection.execute(query.encode(), {"namespace": namespace}).fetchall()
    written = sql.Identifier(schema).as_string() + "."  # as in the migrations
    meant = [name for name in (expected or dict(rows)) if _whole(name) == name]
    ours = "|".join(re.escape(name.split("(")[0].split(" ", 1)[1]) for name in meant)
    # In the definition of a trigger PostgreSQL 14 has the number of the session's temporary schema.
    before = r"pg_temp(?:_\d+)?\." if prefix == "pg_temp." else re.escape(prefix)
    qualified = re.compile(f"(?<![.\\w]){before}(?=(?:{ours})\\b)")  # a schema's name may equal an alias
    return {
        name: text.replace(written, "@schema@.") if name.startswith("body of ") else qualified.sub("", text)
        for name, text in rows
    }


def compare(expected: Mapping[str, str], found: Mapping[str, str]) -> list[Difference]:
    """Findings of two pictures, ``{"table entity_changes": definition}``. Parts of a missing object are left out.

    Of unexpected objects, triggers, rules and policies on ours are findings.
    """
    findings: list[Difference] = []
    for name, definition in expected.items():
        if name not in found:
            if _whole(name) not in {finding.object for finding in findings}:
                findings.append(Difference(name, "missing", expected=definition))
        elif found[name] != definition:
            findings.append(Difference(name, "different", expected=definition, found=found[name]))
    added = (name for name in found if name.startswith(_ADDED) and name not in expected and _whole(name) in expected)
    return findings + [Difference(name, "not ours", found=found[name]) for name in added]


def _whole(name: str) -> str:
    """The object that ``name`` is a part of: ``table t`` for ``column t.c``, ``name`` itself for a whole one."""
    match = re.search(r" of ((?:table|view|function|sequence) .*)$", name)
    return match[1] if match else name
