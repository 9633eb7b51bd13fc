"""What is wrong or unexpected about captured tables: `cdc track` reports it for one, the doctor for all. Pure."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from cdc.core.model import Operation
from cdc.postgres.tracked_tables import Fires, SourceTable, Tracked, Truncate, matches, named

TRIGGERS, TWICE, ORDER, MISSED, TYPES, SCHEMAS, DDL, VIRTUAL, CASTS, HIDDEN, HANDLED = (
    "triggers", "captured-twice", "trigger-order", "missed-rows", "shared-types", "all-schemas", "ddl",
    "virtual-columns", "foreign-casts", "tables-with-row-security", "handled-by-writers",
)  # fmt: skip
"""The subject of a remark; the doctor has a check of that name."""
OF_TABLES = (ORDER, MISSED, TYPES, SCHEMAS, DDL, VIRTUAL, CASTS, HIDDEN, HANDLED)
"""Subjects of warnings."""

COARSE_KEY = (
    "the key {key} does not tell the rows of {table} apart: a key coarser than the source row has no one true order"
    " between concurrent transactions"
)


_PLAIN = re.compile(r"[a-z_][a-z0-9_]*")
"""A name that SQL reads as it is, but for a few reserved words."""


@dataclass(frozen=True, slots=True)
class Remark:
    """``sql``: statements that fix it. ``remedy``: another way to fix it, or what has to be decided.

    ``object``: what is at fault, where that is one object in the database.
    """

    about: str
    detail: str
    remedy: str = ""
    sql: tuple[str, ...] = ()
    object: str = field(default="", compare=False)

    def __str__(self) -> str:
        return f"{self.detail}; {self.remedy}" if self.remedy else self.detail


@dataclass(frozen=True, slots=True)
class SettingOwner:
    """A role or database, as a sentence names it, whose sessions set cdc.handled, and the entity types in the value."""

    who: str
    types: frozenset[str]


def faults(tracked: Tracked) -> Iterator[Remark]:
    """Faults by which writes fail, are not captured, or more is captured than was declared."""
    table, missing = tracked.table, tracked.missing
    if tracked.broken:
        yield Remark(
            TRIGGERS,
            f"every write to {table} fails that {tracked.trigger} should capture: {tracked.broken}",
            f"recreate it: cdc track {table} --replace",
        )
    if gone := [column for column in tracked.key if column in missing]:
        yield Remark(
            TRIGGERS,
            f"every write to {table} fails that {tracked.trigger} should capture: {table} has no column {named(gone)},"
            " its key",
            f"cdc track {table} --key COLUMNS",
        )
    if gone := [column for column in tracked.exclude if column in missing]:
        yield Remark(
            TRIGGERS,
            f"{table} has no column {named(gone)}, which is to be left out: if it was renamed, it is captured under its"
            " new name",
            f"name what is to be left out: cdc track {table} --exclude COLUMNS",
        )
    if gone := [column for column in tracked.columns if column in missing]:
        yield Remark(
            TRIGGERS,
            f"{table} has no column {named(gone)}, which is to be captured",
            f"name what is to be captured: cdc track {table} --columns COLUMNS",
        )
    yield from _truncates(tracked)
    if silent := [] if tracked.enabled else [tracked.table, *(copy.spelt for copy in tracked.copies)]:
        yield _silent(tracked, silent[:1])
    elif tracked.off:
        yield _silent(tracked, [copy.spelt for copy in tracked.off])


def _truncates(tracked: Tracked) -> Iterator[Remark]:
    """Triggers for TRUNCATE that do not go with the one for rows."""
    again = f"cdc track {tracked.table} --truncate " + (tracked.truncates[0].does if tracked.truncates else "")
    if len(tracked.truncates) > 1:
        names = " and ".join(each.trigger for each in tracked.truncates)
        yield Remark(TRIGGERS, f"a TRUNCATE of {tracked.table} fires {names}", again)
    for each in tracked.truncates:
        if each.entity_type != (tracked.entity_type or ""):
            yield Remark(
                TRIGGERS,
                f"{each.trigger} of {tracked.table} is about the type {each.entity_type or tracked.root}, and"
                f" {tracked.trigger} captures {tracked.effective_type}",
                again,
            )
        if tracked.enabled and each.fires != tracked.fires:
            yield Remark(
                TRIGGERS,
                f"{each.trigger} of {tracked.table} fires for other sessions than {tracked.trigger}: it is"
                f" {each.fires}, not {tracked.fires}",
                again,
            )


def outdated(tracked: Tracked) -> Remark:
    """Of a table whose own capture function is not, or no more, what would be made for it."""
    return Remark(
        TRIGGERS,
        f"{tracked.function}() was made for {tracked.table} as it was: capturing costs more now, and texts of a column"
        " of a new type may depend on the writer's settings",
        f"cdc track {tracked.table}, or cdc db upgrade where only its columns have changed",
        object=f"function {tracked.function}() of {tracked.table}",
    )


def owned_by(tracked: Tracked, owner: str, expected: str) -> Remark:
    """Of a table whose own capture function runs with the rights of another role than it should."""
    return Remark(
        TRIGGERS,
        f"{tracked.function}() of {tracked.table} runs with the rights of {owner}, not of {expected}, and so does what"
        " others have made that capturing calls",
        f"cdc db upgrade, as a superuser or the owner of the outbox; else cdc track {tracked.table}",
        object=f"function {tracked.function}() of {tracked.table}",
    )


def _silent(tracked: Tracked, places: Sequence[str]) -> Remark:
    why = "fires for replicated rows only" if tracked.fires == Fires.REPLICA else "is disabled"
    return Remark(
        TRIGGERS,
        f"nothing is captured from {', '.join(places)}: the trigger {why} there",
        "what was written meanwhile is not captured by that",
        tuple(_enabling(tracked)),
    )


def _enabling(tracked: Tracked) -> Iterator[str]:
    if not tracked.enabled:
        yield _enable(tracked.namespace, tracked.name, tracked.trigger)
    for copy in tracked.copies:
        if copy.fires in (Fires.DISABLED, Fires.REPLICA):
            yield _enable(copy.namespace, copy.name, copy.trigger)


def _enable(namespace: str, table: str, trigger: str, how: str = "ENABLE") -> str:
    return f"ALTER TABLE {_quoted(namespace)}.{_quoted(table)} {how} TRIGGER {_quoted(trigger)};"


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def doubled(tracked: Sequence[Tracked]) -> Iterator[Remark]:
    """Rows that two triggers write into one outbox, on a table or on one of its partitions."""
    for place, one in enumerate(tracked):
        for other in tracked[place + 1 :]:
            related = one.oid == other.oid or one.oid in other.above or other.oid in one.above
            if related and set(one.operations) & set(other.operations):
                yield Remark(
                    TWICE,
                    f"rows are captured twice: by {one.trigger} of {one.table} and by {other.trigger} of {other.table}",
                    f"keep one: cdc track {one.table if one.oid in other.above else other.table} --replace",
                )


def coarse(table: SourceTable, tracked: Tracked) -> Iterator[str]:
    if not any(unique <= set(tracked.key) for unique in table.unique_keys):
        yield COARSE_KEY.format(key=named(tracked.key), table=table.spelt)


def cautions(table: SourceTable, tracked: Tracked) -> Iterator[Remark]:
    """What is as configured, and may surprise."""
    yield from _order(tracked)
    yield from _missed(table, tracked)
    captured = [column for column in table.virtual if tracked.captures(column)]
    if captured and not tracked.virtual:
        yield Remark(
            VIRTUAL,
            f"{named(captured)} of {table.spelt} is a virtual generated column, which has no value when triggers fire:"
            f" {tracked.trigger} captures null in its place",
            f"cdc track {table.spelt} has it computed for each change" + ("" if tracked.ours else ", with --replace"),
        )
    if foreign := [cast for cast in table.casts if tracked.captures(cast.column)]:
        said = ", ".join(f"{cast.column} ({cast.type}: {cast.function} of {cast.owner})" for cast in foreign)
        yield Remark(
            CASTS,
            f"capturing {table.spelt} may run code of others with the rights of the role that captures: their casts to"
            f" JSON of {said}",
            "have a superuser own these functions (ALTER FUNCTION ... OWNER TO), or drop the casts (DROP CAST ...)",
        )
    if table.row_security:
        yield Remark(
            HIDDEN,
            f"{table.spelt} has row level security, and what is captured of it is not under it: who may read"
            " entity_changes sees all rows",
            "see who may: cdc doctor; or leave columns out: --exclude, --columns",
        )


def handled(tracked: Sequence[Tracked], sayings: Iterable[SettingOwner]) -> Iterator[Remark]:
    """Writers that may keep changes from the handlers, and roles or databases whose setting has no effect."""
    for each in tracked:
        if each.handled:
            yield Remark(
                HANDLED,
                f"whoever writes {each.table} may keep its changes of the type {each.effective_type} from the handlers,"
                " by the setting cdc.handled",
                f"when no writer handles them itself: cdc track {each.table} --no-handled",
            )
    for saying in sayings:
        unlistened = [each for each in tracked if not each.handled and each.effective_type in saying.types]
        if unlistened:
            types = sorted({each.effective_type for each in unlistened})
            yield Remark(
                HANDLED,
                f"{saying.who} sets cdc.handled for {', '.join(types)}, which does not count: handlers get these"
                " changes as well",
                "if its writers handle them: "
                + ", ".join(f"cdc track {table} --handled" for table in sorted({each.table for each in unlistened}))
                + "; else take the setting away",
            )


def _order(tracked: Tracked) -> Iterator[Remark]:
    if not tracked.earlier:
        return
    renamed = "" if not tracked.ours else f"cdc track {tracked.table}, if {tracked.trigger} is its former name; or "
    yield Remark(
        ORDER,
        f"{', '.join(tracked.earlier)} fires before {tracked.trigger} of {tracked.table}: what it writes is captured"
        " before the row that made it write",
        f"{renamed}ALTER TRIGGER ... RENAME TO a name that sorts after {tracked.trigger}",
    )


def _missed(table: SourceTable, tracked: Tracked) -> Iterator[Remark]:
    if table.children:
        yield Remark(
            MISSED,
            f"{', '.join(table.children)} inherits from {table.spelt}, and rows of it are not captured by that",
            f"cdc track {table.children[0]}",
        )
    if table.unlogged:
        yield Remark(
            MISSED,
            f"{table.spelt} is unlogged: after a crash its rows are gone, without a DELETE",
            f"ALTER TABLE {table.spelt} SET LOGGED, which rewrites it",
        )
    always = all(fires == Fires.ALWAYS for fires in (tracked.fires, *(copy.fires for copy in tracked.copies)))
    if table.subscribed and not always:
        yield Remark(
            MISSED,
            f"a subscription writes {table.spelt}, and what it writes is not captured",
            f"to capture that too: cdc track {table.spelt} --always",
        )
    if table.kind == "p" and tracked.truncate != Truncate.IGNORE:
        done = "captured" if tracked.truncate == Truncate.EVENT else "refused"
        yield Remark(
            MISSED,
            f"a TRUNCATE of {table.spelt} is {done}, and one of a partition of it is not",
            "DELETE captures each row",
        )
    moved = {Operation.INSERT, Operation.DELETE} - set(tracked.operations)
    if table.kind == "p" and Operation.UPDATE in tracked.operations and moved:
        yield Remark(
            MISSED,
            f"an UPDATE that moves a row of {table.spelt} to another partition is a DELETE and an INSERT, and of these"
            f" {' and '.join(sorted(operation for operation in moved))} is not captured",
            f"capture all three: cdc track {table.spelt} --on insert,update,delete"
            + ("" if tracked.ours else " --replace"),
        )


def shared(tracked: Sequence[Tracked]) -> Iterator[Remark]:
    """Tables of which rows may have the same type and key, at least one of them only because of its name."""
    for together in _sharing(tracked):
        if not all(each.entity_type for each in together):
            entity_type = together[0].effective_type
            yield Remark(
                TYPES,
                f"{' and '.join(sorted({each.table for each in together}))} share the type {entity_type}: rows with the"
                " same key are one entity, and wait for each other",
                "give each a type of its own: cdc track TABLE --type TYPE; or, if a key is one thing in all of them,"
                " for each: cdc track TABLE --shared-key",
            )


def namesakes(tracked: Sequence[Tracked]) -> Iterator[tuple[Tracked, ...]]:
    """Tables of one name in several schemas, of which rows may have the same type and key."""
    for together in _sharing(tracked):
        names: dict[str, list[Tracked]] = {}
        for each in together:
            names.setdefault(each.root, []).append(each)
        yield from (tuple(same) for same in names.values() if len(_tables(same)) > 1)


def _sharing(tracked: Iterable[Tracked]) -> Iterator[list[Tracked]]:
    """Of several tables each, by type; by schema, too, where the key of every one says it."""
    types: dict[str, list[Tracked]] = {}
    for each in tracked:
        types.setdefault(each.effective_type, []).append(each)
    for together in types.values():
        apart = all(each.schema_in_key for each in together)
        groups: dict[str, list[Tracked]] = {}
        for each in together:
            groups.setdefault(each.namespace if apart else "", []).append(each)
        yield from (group for group in groups.values() if len(_tables(group)) > 1)


def _tables(tracked: Iterable[Tracked]) -> set[int]:
    """By oid. A partition counts as the table it belongs to."""
    return {(each.oid, *each.above)[-1] for each in tracked}


def unmatched(tracked: Sequence[Tracked], named_so: Iterable[tuple[int, str, str]]) -> Iterator[Remark]:
    """Tables that match the pattern by which those of their name are tracked in each schema, and are not tracked.

    ``named_so``: oid, schema and name of the tables of these names.
    """
    captured = {each.oid for each in tracked}
    patterns: dict[str, list[str]] = {}
    for each in tracked:
        if each.all_schemas and each.all_schemas not in patterns.setdefault(each.name, []):
            patterns[each.name].append(each.all_schemas)
    for oid, namespace, name in named_so:
        pattern = next((one for one in patterns.get(name, ()) if matches(one, namespace)), None)
        if oid not in captured and pattern is not None:
            schema, table = (each if _PLAIN.fullmatch(each) else _quoted(each) for each in (namespace, name))
            yield Remark(
                SCHEMAS,
                f"{schema}.{table} is not tracked, and its schema matches {pattern}, by which others are tracked",
                f"cdc track {shlex.quote(table)} --all-schemas {shlex.quote(pattern)}",
            )


def about(remarks: Iterable[Remark], topic: str) -> list[Remark]:
    return [remark for remark in remarks if remark.about == topic]
