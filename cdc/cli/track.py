"""cdc track, untrack, tracked: which tables are captured."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import click

from cdc.app.config import Settings
from cdc.cli.options import Command, database_options, json_option, open_database
from cdc.cli.output import print_json, print_table, put_script, say
from cdc.core.errors import CdcError, UsageError
from cdc.core.model import CAPTURED, Operation
from cdc.postgres.tracked_tables import Asked, Ddl, Fires, Tracked, Truncate, described, named

if TYPE_CHECKING:
    from cdc.postgres.all_schemas import Plan, Untouched
    from cdc.postgres.connect import Connection
    from cdc.postgres.tracking import Tracking

_SHOWN = 20
"""Tables of a plan, line by line."""

_NAME = re.compile(r'\s*+(?:"(?P<quoted>(?:[^"]|"")++)"\s*+|(?P<plain>[^,"][^,]*+)|)(?:,|$)')

_EVENT = re.compile(
    r'\s*+(?P<of>update:)?+\s*+(?:"(?P<quoted>(?:[^"]|"")++)"\s*+|(?P<plain>[^,"]*+))(?:,|$)', re.IGNORECASE
)


def _names(_ctx: click.Context, option: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...] | None:
    """``a,b`` as column names, exactly as the table has them; one with a comma or outer blanks in double quotes.

    None: the option is not given.
    """
    if not values:
        return None
    return tuple(name for value in values for name in split_names(option, value))


def split_names(option: click.Parameter, value: str) -> Iterator[str]:
    """The parts of ``a,"b,c"``, without the quotes."""
    place = 0
    while place < len(value):
        found = _NAME.match(value, place)
        if found is None:
            raise click.BadParameter(f"{value!r}: a quote is not closed", param=option)
        if found["quoted"] or found["plain"]:
            yield (found["quoted"] or "").replace('""', '"') or found["plain"].rstrip()
        place = found.end()


class _On(NamedTuple):
    operations: tuple[Operation, ...]
    update_of: tuple[str, ...]


def _on_option(ctx: click.Context, option: click.Parameter, value: str | None) -> _On | None:
    """``insert,update:status,total``: after ``update:`` what is no operation is a column; one in quotes always is."""
    if value is None:
        return None
    operations, columns, place, whole = list[Operation](), list[str](), 0, False
    while place < len(value):
        found = _EVENT.match(value, place)
        word = (found["quoted"] or "").replace('""', '"') or found["plain"].strip() if found else ""
        if found and found["of"] and word:
            operations.append(Operation.UPDATE)
            columns.append(word)
        elif found and found["plain"] and word.upper() in CAPTURED:
            operations.append(Operation(word.upper()))
            whole |= operations[-1] is Operation.UPDATE
        elif columns and word:
            columns.append(word)
        else:
            raise click.BadParameter(
                f"{value!r}; expected insert, update, delete, or some of them; update:COLUMNS narrows it, and"
                " --truncate says what a TRUNCATE is",
                param=option,
            )
        place = found.end() if found else len(value)
    if whole and columns:
        raise click.BadParameter(f"{value!r}; either any update, or update:COLUMNS", param=option)
    if not operations:
        raise UsageError("--on names no operation", hint="insert, update, delete, or some of them")
    return _On(tuple(operations), tuple(columns))


def _columns(name: str, help_text: str) -> Callable[[Command], Command]:
    return click.option(name, metavar="COLUMNS", multiple=True, callback=_names, help=f"{help_text} May be repeated.")


@click.command()
@click.argument("table")
@database_options
@click.option(
    "--type",
    "entity_type",
    metavar="TYPE",
    help="Entity type [reaction, message, task, or the table's name]; {schema} in it is the table's schema.",
)
@click.option(
    "--all-schemas", metavar="PATTERN", help="The table of this name in each schema that matches, such as 'tenant_*'."
)
@click.option(
    "--schema-in-key/--no-schema-in-key",
    default=None,
    help="Say the schema in the key, tenant_1/42, so that a key is one row of all schemas [no].",
)
@click.option(
    "--shared-key", is_flag=True, help="A key is one thing in all schemas: tables of this name may share their type."
)
@click.option(
    "--on",
    metavar="OPERATIONS",
    callback=_on_option,
    help="What to capture [insert,update,delete]; update:COLUMNS: an UPDATE that sets one of these.",
)
@click.option("--when", metavar="SQL", help="Capture a row only where this condition on OLD and NEW holds.")
@click.option(
    "--truncate",
    type=click.Choice([each.value for each in Truncate]),
    help="What a TRUNCATE is: a change of its own, an error, or not captured [ignore].",
)
@click.option(
    "--ddl",
    type=click.Choice([each.value for each in Ddl]),
    help="What DDL that changes its columns is: a change of its own, or not captured [ignore]; see: cdc db ddl --help.",
)
@_columns("--key", "What tells rows apart [id, or the primary key].")
@_columns("--exclude", "Columns that never leave the table.")
@_columns("--columns", "Instead: the only columns that leave the table; new ones do not.")
@click.option("--always/--no-always", default=None, help="Also capture what a subscription or a restore writes [no].")
@click.option(
    "--handled/--no-handled",
    default=None,
    help="Writers may say by the setting cdc.handled that they handle a change themselves, during a move [no].",
)
@click.option("--replace", is_flag=True, help="Replace what is there: other options, or a trigger made by hand.")
@click.option("--print", "print_only", is_flag=True, help="Print the SQL instead, for a migration; nothing is changed.")
@json_option
def track(
    *,
    settings: Settings,
    table: str,
    entity_type: str | None,
    all_schemas: str | None,
    schema_in_key: bool | None,
    shared_key: bool,
    on: _On | None,
    when: str | None,
    truncate: str | None,
    ddl: str | None,
    key: tuple[str, ...] | None,
    exclude: tuple[str, ...] | None,
    columns: tuple[str, ...] | None,
    always: bool | None,
    handled: bool | None,
    replace: bool,
    print_only: bool,
    as_json: bool,
) -> None:
    """Capture the changes of TABLE from now on; safe to repeat, also with other options.

    \b
        cdc track whatsapp_messages --type message --on insert
        cdc track orders --on insert,update:status,total --when 'NEW.total > 0'
        cdc track 'shop."Order Line"' --key order_id,line --exclude card_number
        cdc track orders --all-schemas 'tenant_*' --schema-in-key

    TABLE is read as in SQL: quote it if it has capitals. Columns are named exactly; one with a comma or a blank at an
    end is put in double quotes. Changes of one key are handled in their order.

    Options that are not named stay as they are. A type, a key, an exclusion or a condition that would go is refused
    without --replace; '' takes an option away.
    """
    from cdc.postgres import tracking  # noqa: PLC0415 - --help does not wait for the driver to load

    if print_only and as_json:
        raise UsageError("--print and --json are two kinds of output", hint="leave one of them out")
    asked = Asked(
        truncate=None if truncate is None else Truncate(truncate), ddl=None if ddl is None else Ddl(ddl),
        entity_type=entity_type, operations=on and on.operations, update_of=on and on.update_of,
        when=when and when.strip(), key=key, exclude=exclude, columns=columns, always=always, handled=handled,
        schema_in_key=schema_in_key, all_schemas=all_schemas, shared_key=shared_key,
    )  # fmt: skip
    with open_database(settings, user_path=True) as connection:
        if all_schemas is not None:
            _track_all(connection, settings.schema_, table, asked, replace, print_only=print_only, as_json=as_json)
            return
        done = tracking.track_as(connection, settings.schema_, table, asked, replace=replace, dry_run=print_only)
    _warn(done)
    if print_only:
        _print(done)
    elif as_json:
        print_json(_as_json(done))
    else:
        _show(done)


def _track_all(
    connection: Connection, schema: str, table: str, asked: Asked, replace: bool, *, print_only: bool, as_json: bool
) -> None:
    from cdc.postgres import all_schemas  # noqa: PLC0415 - see track

    planned = all_schemas.plan(connection, schema, table, asked, replace=replace)
    _show_plan(planned)
    done: list[Tracking] = []
    left: list[Untouched] = []
    for each in all_schemas.carry_out(connection, schema, planned, dry_run=print_only):
        if isinstance(each, all_schemas.Untouched):
            left.append(each)
            continue
        done.append(each)
        _warn(each)
        if print_only:
            _print(each)
        elif each.changed and not as_json:
            _show(each)
    if as_json:
        print_json({"tables": [_as_json(each) for each in done], "failed": _failures(left)})
    elif not print_only:
        say(_counted("new" if each.before is None else "changed" if each.changed else "the same" for each in done))
    _raise_left(left, "tracked so")


def _show_plan(planned: Plan) -> None:
    """On one line how many there are, then what becomes of those that are not as they shall be."""
    different = [each for each in planned.decided if each.may_differ]
    said = _counted("changed" if each.before and each.may_differ else "the same" if each.before else "new"
                    for each in planned.decided)  # fmt: skip
    say(f"plan: {said}")
    for each in different[:_SHOWN]:
        state = f"was {described(each.before)}; becomes" if each.before else "new:"
        say(f"  {each.wanted.table} {state} {described(each.wanted)}")
    if len(different) > _SHOWN:
        say(f"  and {len(different) - _SHOWN} more")


def _counted(states: Iterable[str]) -> str:
    counts = Counter(states)
    total = sum(counts.values())
    each = ", ".join(f"{counts[state]} {state}" for state in ("new", "changed", "the same") if counts[state])
    return f"{total} table{'s' if total != 1 else ''}: {each}" if total else "no table"


def _failures(left: Sequence[Untouched]) -> list[dict[str, str]]:
    return [{"table": each.table, "error": str(each.error)} for each in left]


def _raise_left(left: Sequence[Untouched], done: str) -> None:
    """Say what was left, table by table. Raises CdcError if anything was."""
    for each in left:
        say(f"left as it was: {each.table}: {each.error}" + (f"; {each.error.hint}" if each.error.hint else ""))
    if left:
        tables = "1 table is" if len(left) == 1 else f"{len(left)} tables are"
        raise CdcError(f"{tables} not {done}; the others are", hint="run the same command again: it does the rest")


def _warn(done: Tracking) -> None:
    for warning in done.warnings:
        say(f"Warning: {warning}")


def _print(done: Tracking) -> None:
    put_script("".join(f"{statement};\n" for statement in done.script))


def _as_json(done: Tracking) -> dict[str, object]:
    return {
        "tracked": done.tracked.as_json(), "changed": done.changed,
        "before": None if done.before is None else done.before.as_json(), "warnings": done.warnings,
    }  # fmt: skip


def _show(done: Tracking) -> None:
    for name in done.replaced:
        say(f"dropped trigger {name}")
    if done.changed and done.before is not None:
        say(f"{done.before.table} was tracked: {described(done.before)}")
    state = "is tracked now" if done.changed else "was tracked so already"
    say(f"{done.tracked.table} {state}: {described(done.tracked)}")


@click.command()
@click.argument("table")
@database_options
@click.option("--all-schemas", metavar="PATTERN", help="The table of this name in each schema that matches.")
def untrack(settings: Settings, table: str, all_schemas: str | None) -> None:
    """Stop capturing the changes of TABLE. What is captured already will still be handled."""
    from cdc.postgres import tracking  # noqa: PLC0415 - see track

    left: list[Untouched] = []
    with open_database(settings, user_path=True) as connection:
        if all_schemas is None:
            _say_dropped(tracking.untrack(connection, settings.schema_, table))
        else:
            left = _untrack_all(connection, settings.schema_, table, all_schemas)
    _raise_left(left, "untracked")


def _untrack_all(connection: Connection, schema: str, table: str, pattern: str) -> list[Untouched]:
    from cdc.postgres import all_schemas  # noqa: PLC0415 - see track

    left: list[Untouched] = []
    for each in all_schemas.untrack(connection, schema, table, pattern):
        if isinstance(each, all_schemas.Untouched):
            left.append(each)
        else:
            _say_dropped(each)
    return left


def _say_dropped(triggers: Sequence[Tracked]) -> None:
    for trigger in triggers:
        say(f"dropped trigger {trigger.trigger} on {trigger.table}")
    for truncate in triggers[0].truncates:
        say(f"dropped trigger {truncate.trigger} on {triggers[0].table}")


@click.command()
@database_options
@json_option
def tracked(settings: Settings, as_json: bool) -> None:
    """List the tables whose changes are captured, also by triggers made by hand."""
    from cdc.postgres import tracking  # noqa: PLC0415 - see track

    with open_database(settings, user_path=True) as connection:
        found = tracking.tracked(connection, settings.schema_)
        faults = [] if as_json else tracking.faults(connection, settings.schema_, found)
    if as_json:
        print_json({"tracked": [each.as_json() for each in found]})
        return
    headers = ["table", "type", "on", "key", "columns", "trigger", "enabled", "handled"]
    print_table(headers, (
        (each.table, each.entity_type or f"{each.effective_type} (by table)", _on(each),
         each.key_text or "(by table)", _shown(each), each.trigger, _enabled(each),
         "by writers too" if each.handled else "")
        for each in found
    ))  # fmt: skip
    for fault in faults:
        say(f"Warning: {fault}")


def _on(tracked: Tracked) -> str:
    captured = [*tracked.operations, *(["truncate"] if tracked.truncate == Truncate.EVENT else [])]
    captured += ["schema"] if tracked.ddl == Ddl.EVENT else []
    refused = ["(truncate refused)"] if tracked.truncate == Truncate.REFUSE else []
    return " ".join([",".join(captured).lower(), *([tracked.only] if tracked.only else []), *refused])


def _shown(tracked: Tracked) -> str:
    """Which columns are captured; those that are gone with a mark."""
    if tracked.columns:
        return "only " + _marked(tracked.columns, tracked)
    return "all but " + _marked(tracked.exclude, tracked) if tracked.exclude else "all"


def _marked(columns: Sequence[str], tracked: Tracked) -> str:
    return ",".join(named([column]) + (" (gone)" if column in tracked.missing else "") for column in columns)


def _enabled(tracked: Tracked) -> str:
    if tracked.off:
        return f"not in {', '.join(copy.spelt for copy in tracked.off)}"
    return {Fires.ORIGIN: "yes", Fires.ALWAYS: "always", Fires.REPLICA: "replica only"}.get(tracked.fires, "no")
