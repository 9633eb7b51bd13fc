"""cdc track, untrack, tracked: which tables are captured."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from cdc.cli.options import database_options, json_option, open_database
from cdc.cli.output import print_json, print_table, say
from cdc.config import Settings
from cdc.errors import UsageError
from cdc.model import Operation

if TYPE_CHECKING:
    from cdc.tracking import Tracked


def _names(_ctx: click.Context, _option: click.Parameter, value: str | None) -> tuple[str, ...]:
    """``a,b`` as column names, exactly as the table has them."""
    return tuple(name.strip() for name in (value or "").split(",") if name.strip())


def _operations(ctx: click.Context, option: click.Parameter, value: str) -> tuple[Operation, ...]:
    try:
        return tuple(Operation(name.upper()) for name in _names(ctx, option, value))
    except ValueError:
        raise click.BadParameter(f"{value!r}; expected insert, update, delete, or some of them") from None


@click.command()
@click.argument("table")
@database_options
@click.option(
    "--type", "entity_type", metavar="TYPE", help="Entity type [reaction, message, task, or the table's name]."
)
@click.option(
    "--on", "operations", default="insert,update,delete", show_default=True, metavar="OPERATIONS", callback=_operations,
    help="What to capture.",
)  # fmt: skip
@click.option("--key", metavar="COLUMNS", callback=_names, help="What tells rows apart [id, or the primary key].")
@click.option("--exclude", metavar="COLUMNS", callback=_names, help="Columns that never leave the table.")
@click.option("--replace", is_flag=True, help="Drop a capturing trigger made by hand in favour of this one.")
@json_option
def track(
    *,
    settings: Settings,
    table: str,
    entity_type: str | None,
    operations: tuple[Operation, ...],
    key: tuple[str, ...],
    exclude: tuple[str, ...],
    replace: bool,
    as_json: bool,
) -> None:
    """Capture the changes of TABLE from now on; safe to repeat, also with other options.

    \b
        cdc track whatsapp_messages --type message --on insert
        cdc track 'shop."Order Line"' --key order_id,line --exclude card_number

    TABLE is read as in SQL: quote it if it has capitals. Changes of one key are handled in their order.
    """
    from cdc import tracking  # noqa: PLC0415 - --help does not wait for the driver to load

    if not operations:
        raise UsageError("--on names no operation", hint="insert, update, delete, or some of them")
    with open_database(settings, user_path=True) as connection:
        done = tracking.track(
            connection,
            settings.schema_,
            table,
            entity_type=entity_type,
            operations=operations,
            key=key,
            exclude=exclude,
            replace_others=replace,
        )
    for name in done.replaced:
        say(f"dropped trigger {name}")
    for warning in done.warnings:
        say(f"Warning: {warning}")
    if as_json:
        print_json({"tracked": done.tracked.as_json(), "changed": done.changed, "warnings": done.warnings})
    else:
        state = "is tracked now" if done.changed else "was tracked so already"
        say(f"{done.tracked.table} {state}: {_described(done.tracked)}")


@click.command()
@click.argument("table")
@database_options
def untrack(settings: Settings, table: str) -> None:
    """Stop capturing the changes of TABLE. What is captured already will still be handled."""
    from cdc import tracking  # noqa: PLC0415 - see track

    with open_database(settings, user_path=True) as connection:
        dropped = tracking.untrack(connection, settings.schema_, table)
    for trigger in dropped:
        say(f"dropped trigger {trigger.trigger} on {trigger.table}")


@click.command()
@database_options
@json_option
def tracked(settings: Settings, as_json: bool) -> None:
    """List the tables whose changes are captured, also by triggers made by hand."""
    from cdc import tracking  # noqa: PLC0415 - see track

    with open_database(settings, user_path=True) as connection:
        found = tracking.tracked(connection, settings.schema_)
    if as_json:
        print_json({"tracked": [each.as_json() for each in found]})
        return
    headers = ["table", "type", "on", "key", "excluded", "trigger", "enabled"]
    print_table(headers, (
        (each.table, each.entity_type or "(by table)", ",".join(each.operations).lower(),
         ",".join(each.key) or "(by table)", ",".join(each.exclude) or None, each.trigger, each.enabled)
        for each in found
    ))  # fmt: skip


def _described(tracked: Tracked) -> str:
    parts = [",".join(tracked.operations).lower(), f"key {','.join(tracked.key)}"]
    parts += [f"type {tracked.entity_type}"] if tracked.entity_type else []
    parts += [f"without {','.join(tracked.exclude)}"] if tracked.exclude else []
    return "; ".join(parts)
