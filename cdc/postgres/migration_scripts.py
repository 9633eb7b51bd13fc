"""What makes the objects in the database, as text: the scripts of ``sql/``, for a schema, one by one or in one piece.

``sql/NNNN_name.sql`` are the migrations, ``sql/NAME/NNNN_name.sql`` those of an optional set: ``migrations`` says how
they are run.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from psycopg import sql

from cdc.core.errors import UsageError
from cdc.core.model import message_prefix, publication_name, trigger_name
from cdc.postgres.trigger_catalog import GIVEN, IS_TABLE_FUNCTION

LOCK_TIMEOUT = "5s"
"""How long DDL waits for a table's lock. Writers queue behind it: longer would be an outage for the application."""

ADVISORY_LOCK = 0x63646301
"""First key of the lock held while migrations run; the second is a hash of the schema's name."""

_DOLLAR_QUOTE = "$cdc$"
_IDENTIFIER_BYTES = 63

OWNERSHIP = "ownership.sql"
CAPTURE_ROLE = "capture_role.sql"
_CONSUMER_OF_SET = "consumer.sql"
REMOVE_SET = "remove.sql"
PICTURE = "picture.sql"

_BEGIN = """\
\\set ON_ERROR_STOP on
BEGIN;
"""
_COMMIT = "COMMIT;\n"
# In a transaction that goes on afterwards, as a migration tool's does. set_config() by its full name, and no operator:
# the path is not pinned yet.
_KEEP_SETTINGS = """\
SELECT
  pg_catalog.set_config('cdc.kept_lock_timeout', pg_catalog.current_setting('lock_timeout'), true),
  pg_catalog.set_config('cdc.kept_client_min_messages', pg_catalog.current_setting('client_min_messages'), true),
  pg_catalog.set_config('cdc.kept_search_path', pg_catalog.current_setting('search_path'), true);
"""
_RESTORE_SETTINGS = """\
SELECT
  pg_catalog.set_config('lock_timeout', pg_catalog.current_setting('cdc.kept_lock_timeout'), true),
  pg_catalog.set_config('client_min_messages', pg_catalog.current_setting('cdc.kept_client_min_messages'), true),
  pg_catalog.set_config('search_path', pg_catalog.current_setting('cdc.kept_search_path'), true);
"""
_OPEN_SCRIPT = """\
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
    ``@publication_literal@``, ``@prefix_literal@`` and ``@trigger_literal@`` for literals, and
    ``@is_table_function@`` and ``@given@`` for pieces of ``trigger_catalog``."""
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
    assert len({migration.version for migration in found}) == len(found), "a number is used twice"
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
    return render(read_of_set(name, _CONSUMER_OF_SET), schema, role=role)


def folder() -> Path:
    """``cdc/sql`` in a wheel; an editable install leaves ``sql`` next to the package."""
    package = Path(__file__).parents[1]
    return next(path for path in (package / "sql", package.parent / "sql") if path.is_dir())


def read(name: str) -> str:
    return (folder() / name).read_text("utf-8")


def read_of_set(name: str, file: str) -> str:
    """Empty where the set has no such file."""
    path = folder() / name / file
    return path.read_text("utf-8") if path.exists() else ""


def print_sql(
    schema: str,
    steps: Sequence[Migration] | None = None,
    *,
    sets: Sequence[str] = (),
    owner: str | None = None,
    transaction: bool = True,
) -> str:
    """One script for psql, safe to repeat, that does what ``install`` does, for operators who run DDL by hand.

    ``steps`` are the migrations to print, by default all, and those of the optional ``sets``. ``owner`` is the role
    that owns the outbox already: the script runs as that role. Without ``transaction`` it is plain SQL, to be run
    within a transaction, whose settings are afterwards as they were.
    """
    check_name(schema)
    check_sets(sets)
    if steps is None:
        steps = [migration for name in dict.fromkeys(("", *sets)) for migration in migrations(name)]
    identifier = sql.Identifier(schema).as_string()
    opening = _OPEN_SCRIPT.format(
        lock=ADVISORY_LOCK,
        timeout=LOCK_TIMEOUT,
        name=_literal(schema),
        identifier=identifier,
        identifier_literal=_literal(identifier),
    )
    act_as = [f"SET LOCAL ROLE {sql.Identifier(owner).as_string()};\n"] if owner else []
    before, after = (_BEGIN, _COMMIT) if transaction else (_KEEP_SETTINGS, _RESTORE_SETTINGS)
    parts = [before + opening, *act_as, render(read(OWNERSHIP), schema), render(CREATE_LEDGER, schema)]
    for migration in steps:
        parts += [f"\n-- {migration}\n", render(migration.template + migration.record, schema)]
    parts += ["", render(read(CAPTURE_ROLE), schema)]
    return "\n".join([*parts, after])


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
        "@is_table_function@": IS_TABLE_FUNCTION,
        "@given@": GIVEN.strip(),
    }
    # In one pass: a schema's name may be @schema_literal@.
    return re.sub("|".join(values), lambda match: values[match[0]], template)


def _literal(text: str) -> str:
    return sql.Literal(text).as_string()


def check_name(schema: str) -> None:
    too_long = not 0 < len(schema.encode()) <= _IDENTIFIER_BYTES
    if too_long or "\0" in schema or _DOLLAR_QUOTE in schema or schema.startswith("pg_"):
        raise UsageError(
            f"{schema!r} cannot be the schema of the outbox",
            hint=f"1 to {_IDENTIFIER_BYTES} bytes, not beginning with pg_, without {_DOLLAR_QUOTE} in it",
        )
