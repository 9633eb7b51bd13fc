"""cdc track, untrack, tracked: which tables are captured."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import click

from cdc.app.config import Settings
from cdc.cli.options import Command, database_options, json_option, open_database
from cdc.cli.output import print_json, print_table, put_script, say
from cdc.core.errors import UsageError
from cdc.core.model import CAPTURED, Operation
from cdc.postgres import remarks
from cdc.postgres.tracked_tables import Fires, Tracked, described, named

if TYPE_CHECKING:
    from cdc.postgres.tracking import Tracking

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
                f"{value!r}; expected insert, update, delete, or some of them; update:COLUMNS narrows it", param=option
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
    "--type", "entity_type", metavar="TYPE", help="Entity type [reaction, message, task, or the table's name]."
)
@click.option(
    "--on",
    metavar="OPERATIONS",
    callback=_on_option,
    help="What to capture [insert,update,delete]; update:COLUMNS: an UPDATE that sets one of these.",
)
@click.option("--when", metavar="SQL", help="Capture a row only where this condition on OLD and NEW holds.")
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
    on: _On | None,
    when: str | None,
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

    TABLE is read as in SQL: quote it if it has capitals. Columns are named exactly; one with a comma or a blank at an
    end is put in double quotes. Changes of one key are handled in their order.

    Options that are not named stay as they are. A type, a key, an exclusion or a condition that would go is refused
    without --replace; '' takes an option away.
    """
    from cdc.postgres import tracking  # noqa: PLC0415 - --help does not wait for the driver to load

    if print_only and as_json:
        raise UsageError("--print and --json are two kinds of output", hint="leave one of them out")
    with open_database(settings, user_path=True) as connection:
        done = tracking.track(
            connection,
            settings.schema_,
            table,
            entity_type=entity_type,
            operations=None if on is None else on.operations,
            update_of=None if on is None else on.update_of,
            when=when,
            key=key,
            exclude=exclude,
            columns=columns,
            always=always,
            handled=handled,
            replace=replace,
            dry_run=print_only,
        )
    if print_only:
        _warn(done)
        put_script("".join(f"{statement};\n" for statement in done.script))
        return
    for name in done.replaced:
        say(f"dropped trigger {name}")
    _warn(done)
    _show(done, as_json=as_json)


def _warn(done: Tracking) -> None:
    for warning in done.warnings:
        say(f"Warning: {warning}")


def _show(done: Tracking, *, as_json: bool) -> None:
    if as_json:
        before = None if done.before is None else done.before.as_json()
        print_json({
            "tracked": done.tracked.as_json(), "changed": done.changed, "before": before, "warnings": done.warnings,
        })  # fmt: skip
        return
    if done.changed and done.before is not None:
        say(f"{done.before.table} was tracked: {described(done.before)}")
    state = "is tracked now" if done.changed else "was tracked so already"
    say(f"{done.tracked.table} {state}: {described(done.tracked)}")


@click.command()
@click.argument("table")
@database_options
def untrack(settings: Settings, table: str) -> None:
    """Stop capturing the changes of TABLE. What is captured already will still be handled."""
    from cdc.postgres import tracking  # noqa: PLC0415 - see track

    with open_database(settings, user_path=True) as connection:
        dropped = tracking.untrack(connection, settings.schema_, table)
    for trigger in dropped:
        say(f"dropped trigger {trigger.trigger} on {trigger.table}")


@click.command()
@database_options
@json_option
def tracked(settings: Settings, as_json: bool) -> None:
    """List the tables whose changes are captured, also by triggers made by hand."""
    from cdc.postgres import tracking  # noqa: PLC0415 - see track

    with open_database(settings, user_path=True) as connection:
        found = tracking.tracked(connection, settings.schema_)
    if as_json:
        print_json({"tracked": [each.as_json() for each in found]})
        return
    headers = ["table", "type", "on", "key", "columns", "trigger", "enabled", "handled"]
    print_table(headers, (
        (each.table, each.entity_type or f"{each.effective_type} (by table)", _on(each),
         named(each.key) or "(by table)", _shown(each), each.trigger, _enabled(each),
         "by writers too" if each.handled else "")
        for each in found
    ))  # fmt: skip
    for each in found:
        for fault in remarks.faults(each):
            say(f"Warning: {fault}")


def _on(tracked: Tracked) -> str:
    return " ".join([",".join(tracked.operations).lower(), *([tracked.only] if tracked.only else [])])


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
