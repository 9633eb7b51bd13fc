"""The named statements of ``.sql`` files, prepared for one schema."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.resources import files

from psycopg import sql

from cdc.postgres.grants import DESCRIPTION, PAYLOAD, STATE
from cdc.postgres.trigger_catalog import IS_TABLE_FUNCTION

_NAME = "-- name: "
_NAMED = re.compile(r"\{(\w+)\}")
NONE_STANDS = {
    "standing": "SELECT NULL::text AS entity_type, NULL::bigint AS seq, false AS clear, NULL::timestamptz AS changed_at"
                " WHERE false",
}  # fmt: skip
"""``instead`` of the block of that name, for who may not see the barriers."""


def load(file: str, schema: str, *, instead: Mapping[str, str] | None = None) -> dict[str, bytes]:
    """Name to statement of this file, with the names in braces filled in.

    ``file`` is in this folder, or with a slash in it a path below the package.

    These are ``{changes}``, the table, and ``{every_column}`` of it, or ``{described}``, those without payload;
    ``{regclass}``, its name as a literal;
    ``{backfills}``, the table of backfills; ``{due_changes}``, that of what is due later, and its function
    ``{publish_due}``; ``{barriers}``, that of changes of whole tables that are not settled,
    ``{barriers_regclass}``, ``{is_barred}``, a function, and ``{barred_regprocedure}``; ``{is_table_function}``, an
    expression; ``{shards_regclass}``, the same for the table of owners; ``{subscriptions}``, ``{positions}`` and
    ``{subscription_changes}``, the tables of subscriptions, and the last two with ``_regclass``; ``{numbers}``, the
    sequence of ``seq``, also with ``_regclass``; ``{controls}``, the table of what is paused; ``{limit_leases}``,
    that of what is leased of limits; ``{attempts}``, that of failed attempts, also with ``_regclass``;
    ``{actions}``, that of what operators have done; and blocks that are expressions, from the same file or from
    outbox.sql. ``instead``: in place of the blocks of
    these names.
    """
    names = {
        "changes": table(schema, "entity_changes"),
        "every_column": sql.SQL(", ").join(map(sql.Identifier, (*DESCRIPTION, *STATE, *PAYLOAD))),
        "described": sql.SQL(", ").join(map(sql.Identifier, (*DESCRIPTION, *STATE))),
        "regclass": _in_text(sql.Literal(sql.Identifier(schema, "entity_changes").as_string())),
        "backfills": table(schema, "cdc_backfills"),
        "due_changes": table(schema, "cdc_due_changes"),
        "barriers": table(schema, "cdc_barriers"),
        "is_barred": table(schema, "barred"),
        "barred_regprocedure": _in_text(sql.Literal(f"{sql.Identifier(schema, 'barred').as_string()}(text, bigint)")),
        "barriers_regclass": _in_text(sql.Literal(sql.Identifier(schema, "cdc_barriers").as_string())),
        "publish_due": table(schema, "publish_due"),
        "subscriptions": table(schema, "cdc_subscriptions"),
        "positions": table(schema, "cdc_positions"),
        "subscription_changes": table(schema, "cdc_subscription_changes"),
        "positions_regclass": _in_text(sql.Literal(sql.Identifier(schema, "cdc_positions").as_string())),
        "subscription_changes_regclass": _in_text(
            sql.Literal(sql.Identifier(schema, "cdc_subscription_changes").as_string())
        ),
        "numbers": table(schema, "entity_changes_seq_seq"),
        "numbers_regclass": _in_text(sql.Literal(sql.Identifier(schema, "entity_changes_seq_seq").as_string())),
        "controls": table(schema, "cdc_controls"),
        "limit_leases": table(schema, "cdc_limit_leases"),
        "attempts": table(schema, "change_attempts"),
        "attempts_regclass": _in_text(sql.Literal(sql.Identifier(schema, "change_attempts").as_string())),
        "actions": table(schema, "cdc_actions"),
        "is_table_function": sql.SQL(IS_TABLE_FUNCTION),
        "shards_regclass": _in_text(sql.Literal(sql.Identifier(schema, "cdc_shards").as_string())),
    }
    own = blocks(file)
    everything = {**blocks("outbox.sql"), **own, **(instead or {})}
    used = set(_NAMED.findall("\n".join(everything.values())))
    pieces = {name: text for name, text in everything.items() if name in used}
    while pieces:  # those first that name no other one
        ready = [name for name, text in pieces.items() if pieces.keys().isdisjoint(_NAMED.findall(text))]
        names |= {name: _compose(pieces.pop(name), names) for name in ready}
    return {name: _compose(text, names).as_string(None).encode() for name, text in own.items() if name not in names}


def table(schema: str, name: str) -> sql.Composable:
    """The table's name, for a statement with parameters."""
    return _in_text(sql.Identifier(schema, name))


def _in_text(name: sql.Composable) -> sql.Composable:
    """A % begins a placeholder in a statement with parameters, also within a name."""
    return sql.SQL(name.as_string().replace("%", "%%"))


def blocks(file: str) -> dict[str, str]:
    """Name to text of this file, with the names in braces."""
    found = (files("cdc") / file if "/" in file else files("cdc.postgres") / file).read_text("utf-8").split(_NAME)[1:]
    return dict(block.split("\n", 1) for block in found)


def _compose(text: str, names: dict[str, sql.Composable]) -> sql.Composed:
    statement = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("--"))
    return sql.SQL(statement).format(**names)
