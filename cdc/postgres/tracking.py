"""Which tables are captured: one row trigger on each, with its entity type, key and columns as arguments.

The triggers are the whole configuration: no table of tracked tables could contradict them. Triggers made by hand, as
the documented SQL does, count like our own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from dataclasses import replace as replace_fields
from typing import TypeVar

import psycopg
from psycopg import errors

from cdc.core.errors import NotFoundError, RefusedError, UsageError
from cdc.core.model import Operation, trigger_name
from cdc.postgres import (
    capture_catalog,
    ddl_triggers,
    former_triggers,
    remarks,
    source_tables,
    table_functions,
    truncate_triggers,
)
from cdc.postgres.capture_catalog import CaptureFunction
from cdc.postgres.remarks import Remark
from cdc.postgres.tracked_tables import (
    FLAGS,
    LISTS,
    SCHEMA,
    Asked,
    Ddl,
    Fires,
    SourceTable,
    Tracked,
    Truncate,
    all_arguments,
    decide,
    losses,
)
from cdc.postgres.trigger_statements import creating, dropping, enabling, statements

T = TypeVar("T")
_KINDS = {"v": "a view", "m": "a materialized view", "f": "a foreign table"}
_OURS = (
    "entity_changes", "cdc_migrations", "cdc_shards", "cdc_sets", "cdc_backfills", "cdc_due_changes", "cdc_barriers",
    "cdc_columns", "cdc_subscriptions", "cdc_positions", "cdc_subscription_changes", "cdc_controls", "change_attempts",
    "cdc_actions", "cdc_limit_leases",
)  # fmt: skip
"""Tables of the outbox itself."""
_REFUSALS = {"42", "22", "0A"}
"""Classes of errors by which the server refuses a condition: it cannot be read, a constant in it, what it uses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tracking:
    """What ``track`` did."""

    tracked: Tracked
    changed: bool
    """False when the trigger existed already, as asked for."""
    before: Tracked | None = None
    """Our trigger before the change."""
    replaced: tuple[str, ...] = ()
    """Triggers made by hand that were dropped and replaced by ours."""
    warnings: tuple[str, ...] = ()
    script: tuple[str, ...] = ()
    """The statements that do the same, if nothing was changed because these were asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What ``track`` makes of one table. ``others``: triggers that would go, because they capture the same rows."""

    source: SourceTable
    wanted: Tracked
    before: Tracked | None
    others: tuple[Tracked, ...]
    different: bool
    """Whether the trigger is another, as far as is known without the server, which alone can read a condition."""

    @property
    def may_differ(self) -> bool:
        """The same for a reader: a condition that is named may be the one that is there, in the server's words."""
        return self.different or (self.before is not None and self.before.when != self.wanted.when)

    @property
    def shares_more(self) -> bool:
        """Whether other tables may have its keys that had them not before."""
        before, wanted = self.before or next(iter(self.others), None), self.wanted
        return before is None or (before.effective_type, before.schema_in_key) != (
            wanted.effective_type, wanted.schema_in_key,
        )  # fmt: skip


def track(
    connection: psycopg.Connection,
    schema: str,
    table: str,
    *,
    entity_type: str | None = None,
    operations: Sequence[Operation] | None = None,
    update_of: Sequence[str] | None = None,
    when: str | None = None,
    truncate: Truncate | None = None,
    ddl: Ddl | None = None,
    key: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    always: bool | None = None,
    handled: bool | None = None,
    schema_in_key: bool | None = None,
    shared_key: bool = False,
    replace: bool = False,
    dry_run: bool = False,
) -> Tracking:
    """Capture the rows of ``table``, a name as PostgreSQL reads it, into the outbox in ``schema``.

    An option that is None stays as the table's trigger has it; a new one has all operations and columns, the type by
    the table's name, and as key the column id, else the primary key. In ``entity_type`` "{schema}" stands for the
    table's schema. ``update_of``, with ``operations``: only an UPDATE that sets one of these columns is captured.
    ``when``: a condition on OLD and NEW, as SQL; "" takes it away. ``truncate``: what a TRUNCATE of the table is, and
    ``ddl`` what DDL that changes its columns is; at first both are ignored. ``dry_run``: all of it is rolled back; what
    was done is in ``script``.

    Raises NotFoundError for a table that does not exist, UsageError for one that cannot be tracked, columns it does not
    have or a condition that the server refuses, RefusedError where the function could not write the outbox, where a
    table of this name in another schema would have the same keys, unless ``shared_key``, and, unless ``replace`` is
    set, when a trigger made by hand captures it already, or a type, a key, a condition, captured or excluded columns
    would be lost. Writers of the table wait while the trigger is made, up to 5 s.
    """
    asked = Asked(
        entity_type=entity_type, operations=_frozen(operations), update_of=_frozen(update_of), truncate=truncate,
        ddl=ddl, when=None if when is None else when.strip(), key=_frozen(key), exclude=_frozen(exclude),
        columns=_frozen(columns), always=always, handled=handled, schema_in_key=schema_in_key, shared_key=shared_key,
    )  # fmt: skip
    return track_as(connection, schema, table, asked, replace=replace, dry_run=dry_run)


def track_as(
    connection: psycopg.Connection,
    schema: str,
    table: str,
    asked: Asked,
    *,
    like: Sequence[Tracked] = (),
    judged: bool = False,
    replace: bool = False,
    dry_run: bool = False,
) -> Tracking:
    """``track`` with its options as one value. ``like``: see ``decide``. ``judged``: shared keys were looked for."""
    with source_tables.changing(connection, table):
        done, others = _track(
            connection, schema, table, asked, like=like, judged=judged, replace=replace, portable=dry_run
        )
        if not dry_run:
            return done
        drops = [dropping(other).as_string() for other in others]
        truncates = truncate_triggers.script(schema, done.tracked, done.before)
        done = replace_fields(done, script=(*drops, *statements(connection, done.tracked), *truncates))
        raise psycopg.Rollback
    return done


def untrack(connection: psycopg.Connection, schema: str, table: str) -> list[Tracked]:
    """Drop every trigger on ``table`` that captures into ``schema``, also those made by hand; returns them.

    Raises NotFoundError when there is none, RefusedError with the statements to run when the role does not own it.
    """
    with source_tables.changing(connection, table):
        capture = capture_catalog.capture_function(connection, schema)
        source = source_tables.resolve(connection, capture, schema, table)
        found = source_tables.triggers(connection, capture, schema, source.oid)
        if not found:
            raise NotFoundError(f"{source.spelt} is not tracked", hint="`cdc tracked` lists the tables that are")
        for trigger in found:
            source_tables.as_owner(connection, dropping(trigger))
        for each in found[0].truncates:
            source_tables.as_owner(connection, dropping(found[0], each.trigger))
        table_functions.drop_unused(connection, schema, capture)
        return found


def tracked(connection: psycopg.Connection, schema: str) -> list[Tracked]:
    """Every trigger that captures into ``schema``, by table; for a partitioned table the one of its root."""
    with connection.transaction():
        source_tables.use_server_names(connection)
        return source_tables.triggers(connection, capture_catalog.capture_function(connection, schema), schema)


def faults(connection: psycopg.Connection, schema: str, found: Sequence[Tracked]) -> list[Remark]:
    """What is wrong with the triggers ``found``, with tables' own functions, and with event triggers."""
    with connection.transaction():
        source_tables.use_server_names(connection)
        capture = capture_catalog.capture_function(connection, schema)
        said = [
            replace_fields(remark, object=f"trigger {each.trigger} of {each.table}")
            for each in found
            for remark in remarks.faults(each)
        ]
        said += table_functions.faults(connection, capture, schema, spell=source_tables.spell)
        return [*said, *ddl_triggers.remarks(connection, schema, found)]


def find(connection: psycopg.Connection, schema: str, table: str) -> tuple[SourceTable, list[Tracked]]:
    """The table of this name, and its triggers that capture into ``schema``. Raises as ``untrack`` does."""
    with connection.transaction():
        source_tables.use_server_names(connection)
        capture = capture_catalog.capture_function(connection, schema)
        source = source_tables.resolve(connection, capture, schema, table)
        return source, source_tables.triggers(connection, capture, schema, source.oid)


def judge(
    capture: CaptureFunction,
    schema: str,
    source: SourceTable,
    everywhere: Sequence[Tracked],
    asked: Asked,
    *,
    like: Sequence[Tracked],
    replace: bool,
) -> Decision:
    """What ``track`` would make of the table, where ``everywhere`` are the triggers of all. Raises as it does."""
    _refuse_incapable(capture, schema)
    _refuse_kind(source, schema)
    present = [each for each in everywhere if each.oid == source.oid]
    wanted = decide(source, present, asked, trigger_name(schema), like)
    before = next((each for each in present if each.ours), None)
    others = [each for each in everywhere if (not each.ours and each.oid == source.oid) or source.oid in each.above]
    _refuse_unknown(capture, wanted)
    if not replace:
        _refuse_doubled(source, others)
        # The server alone knows whether a condition that is named is another than before.
        _refuse_losses(source, before, replace_fields(wanted, when=before.when) if before and asked.when else wanted)
    different = _is_different(before, wanted, always=asked.always) or truncate_triggers.differ(schema, before, wanted)
    return Decision(source=source, wanted=wanted, before=before, others=tuple(others), different=different)


def refuse_shared_keys(decided: Sequence[Decision], everywhere: Sequence[Tracked]) -> None:
    """Raises RefusedError where tables of one name would have the same keys after this, and have not now."""
    oids = {each.source.oid for each in decided}
    after = [each for each in everywhere if each.oid not in oids and not oids.intersection(each.above)]
    becoming = {each.source.oid for each in decided if each.shares_more}
    for together in remarks.namesakes([*after, *(each.wanted for each in decided)]):
        if new := [each for each in together if each.oid in becoming]:
            first = new[0]
            # Of the others one without the schema, if there is one: it is why those with it collide.
            second = min((each for each in together if each.oid != first.oid), key=lambda each: each.schema_in_key)
            raise RefusedError(
                f"{first.table} and {second.table} would both have the type {first.effective_type}, and a row of each"
                " the same key; nothing was changed",
                hint=f"tell them apart in each: --schema-in-key, or --type '{SCHEMA}.{second.name}'; if a key is one"
                " thing in all schemas: --shared-key",
            )


def _track(
    connection: psycopg.Connection,
    schema: str,
    table: str,
    asked: Asked,
    *,
    like: Sequence[Tracked],
    judged: bool,
    replace: bool,
    portable: bool,
) -> tuple[Tracking, Sequence[Tracked]]:
    """Also the triggers that were dropped. ``portable``: by capture_entity_change(), which every outbox has."""
    capture = capture_catalog.capture_function(connection, schema)
    source = source_tables.resolve(connection, capture, schema, table)
    everywhere = source_tables.triggers(connection, capture, schema)
    decided = judge(capture, schema, source, everywhere, asked, like=like, replace=replace)
    if not judged and not asked.shared_key:
        refuse_shared_keys([decided], everywhere)
    wanted, before, others = decided.wanted, decided.before, decided.others
    if wanted.ddl == Ddl.EVENT and asked.ddl is not None and not portable:
        ddl_triggers.refuse_missing(connection, schema)
    for other in others:
        source_tables.as_owner(connection, dropping(other))
    function, rewritten = "", False
    if not portable:
        to_call = decided.different or bool(asked.when)
        function, rewritten = table_functions.provide(connection, capture, schema, source, wanted, to_call=to_call)
    if rewritten:
        capture = capture_catalog.capture_function(connection, schema)
    replaced = decided.different or (before is not None and before.function != function)
    if replaced or asked.when:
        _refuse_foreign(connection, capture, source, wanted.trigger)
        former_triggers.rename(connection, schema, [each for each in everywhere if each.oid == source.oid])
        _create(connection, schema, source, wanted, function, of_user=bool(asked.when))
        _set_firing(connection, capture, schema, source, before, always=asked.always)
        table_functions.drop_unused(connection, schema, capture)
    made = next(each for each in source_tables.triggers(connection, capture, schema, source.oid) if each.ours)
    if truncates := truncate_triggers.replacing(schema, made, wanted.truncate):
        for statement in truncates:
            source_tables.as_owner(connection, statement)
        made = next(each for each in source_tables.triggers(connection, capture, schema, source.oid) if each.ours)
    if not replace:
        _refuse_losses(source, before, made)
    changed = replaced or rewritten or before is None or made.when != before.when
    everywhere = [made, *(each for each in everywhere if each.oid != source.oid and each not in others)]
    done = Tracking(
        tracked=made,
        changed=changed,
        before=before,
        replaced=tuple(other.trigger for other in others),
        warnings=tuple(_warnings(source, made, everywhere)),
    )
    return done, others


def _frozen(given: Sequence[T] | None) -> tuple[T, ...] | None:
    return None if given is None else tuple(given)


def _is_different(before: Tracked | None, wanted: Tracked, *, always: bool | None) -> bool:
    """``before`` comes from the catalogs, with further facts, and with its copies on partitions."""
    if before is None or before.trigger != wanted.trigger or before.broken:
        return True
    # A partition's copy may fire ALWAYS where others do not, unless the option was named.
    unlike = always is not None and {copy.fires for copy in before.copies} - {wanted.fires}
    return bool(unlike or before.off or _as_asked(before) != _as_asked(wanted) or (before.when and not wanted.when))


def _as_asked(tracked: Tracked) -> tuple[object, ...]:
    """All but its condition, which the server writes in other words."""
    return all_arguments(tracked), tracked.operations, set(tracked.update_of), tracked.fires


def _refuse_losses(source: SourceTable, before: Tracked | None, wanted: Tracked) -> None:
    going = list(losses(source, before, wanted)) if before is not None else []
    if going:
        raise RefusedError(
            f"{source.spelt} is tracked, and {'; '.join(going)}; nothing was changed",
            hint="if that is meant, add --replace",
        )


def _warnings(source: SourceTable, made: Tracked, everywhere: Sequence[Tracked]) -> Iterator[str]:
    yield from remarks.coarse(source, made)
    yield from map(str, remarks.faults(made))
    yield from map(str, remarks.cautions(source, made))
    yield from map(str, remarks.handled([made], ()))
    yield from map(str, remarks.shared([each for each in everywhere if each.effective_type == made.effective_type]))


def _refuse_incapable(capture: CaptureFunction, schema: str) -> None:
    """A trigger whose function cannot write makes every write of the table fail."""
    if capture.security_definer and capture.lacks:
        raise RefusedError(
            f"every write to a tracked table would fail: {capture.owner}, with whose rights {capture.name} runs, lacks"
            f" {', '.join(capture.lacks)}",
            hint="cdc doctor says more; an outbox that is gone: cdc db install"
            + ("" if schema == "public" else f" --schema {schema}"),
        )


def _refuse_unknown(capture: CaptureFunction, wanted: Tracked) -> None:
    if unknown := capture.unknown(name for name in wanted.options if name in (*LISTS[1:], *FLAGS)):
        raise RefusedError(
            f"{capture.name} is of an older version, which does not know the option {', '.join(unknown)}",
            hint="run: cdc db upgrade",
        )


def _refuse_kind(source: SourceTable, schema: str) -> None:
    if source.kind not in ("r", "p"):
        raise UsageError(
            f"{source.spelt} is {_KINDS.get(source.kind, 'no table')}, and only a table's rows can be captured",
            hint="track the tables behind it; for events without a table there is publish_change()",
        )
    if source.root is not None:
        raise UsageError(f"{source.spelt} is a partition of {source.root}", hint=f"track {source.root}")
    if source.namespace == schema and source.name in _OURS:
        raise UsageError(f"{source.spelt} belongs to the outbox itself", hint="track the tables of your application")


def _refuse_doubled(source: SourceTable, others: Sequence[Tracked]) -> None:
    if others:
        named = ", ".join(
            other.trigger if other.oid == source.oid else f"{other.trigger} of its partition {other.table}"
            for other in others
        )
        raise RefusedError(
            f"{source.spelt} is captured by {named} already, and would be captured twice",
            hint="--replace drops that trigger in the same transaction, so that no change is missed",
        )


def _create(
    connection: psycopg.Connection,
    schema: str,
    source: SourceTable,
    wanted: Tracked,
    function: str,
    *,
    of_user: bool,
) -> None:
    """``function``: that of the table, or "". ``of_user``: the condition is as a user wrote it, for its search_path."""
    statement = creating(schema, source, wanted, function)
    # Prepared: one statement, whatever the condition says.
    if not of_user:
        connection.execute(statement, prepare=True)
        return
    try:
        with source_tables.as_user(connection):
            connection.execute(statement, prepare=True)
    except psycopg.Error as refused:
        if (refused.sqlstate or "")[:2] not in _REFUSALS or isinstance(refused, errors.InsufficientPrivilege):
            raise
        hint = "a condition on the columns of OLD and NEW"
        if isinstance(refused, errors.InvalidObjectDefinition):  # an operation without OLD, or without NEW
            hint += (
                ". It holds for all operations: an INSERT has no OLD and a DELETE no NEW, so name those it is for:"
                " --on update"
            )
        raise UsageError(
            f"the server refuses --when for {source.spelt}: {refused.diag.message_primary}",
            hint=hint,
        ) from refused


def _set_firing(
    connection: psycopg.Connection,
    capture: CaptureFunction,
    schema: str,
    source: SourceTable,
    before: Tracked | None,
    *,
    always: bool | None,
) -> None:
    """Make the trigger and its copies on partitions fire as before they were replaced, or as asked for."""
    [made] = [each for each in source_tables.triggers(connection, capture, schema, source.oid) if each.ours]
    was = {(copy.namespace, copy.name): copy.fires for copy in before.copies} if before else {}
    if before is not None:
        was[before.namespace, before.name] = before.fires
    places = [
        (made.namespace, made.name, made.fires),
        *((each.namespace, each.name, each.fires) for each in made.copies),
    ]
    for namespace, name, fires in places:
        kept = was.get((namespace, name), made.fires if before is None else before.fires)
        enabled = Fires.ORIGIN if kept == Fires.DISABLED else kept
        wanted = enabled if always is None else Fires.ALWAYS if always else Fires.ORIGIN
        if wanted != fires:
            source_tables.as_owner(connection, enabling(namespace, name, made.trigger, wanted))


def _refuse_foreign(
    connection: psycopg.Connection, capture: CaptureFunction, source: SourceTable, trigger: str
) -> None:
    """Refuse to replace another author's trigger under our name: that would switch off what it does."""
    taken = connection.execute(
        "SELECT FROM pg_catalog.pg_trigger WHERE tgrelid = %s::oid AND tgname = %s AND tgfoid <> ALL (%s::oid[])",
        [source.oid, trigger, list(capture.oids)],
    ).fetchone()
    if taken is not None:
        raise RefusedError(
            f"{source.spelt} has a trigger {trigger} that is not ours",
            hint="rename it: ALTER TRIGGER ... ON ... RENAME TO ...",
        )
