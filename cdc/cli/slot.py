"""cdc slot: the replication slot that rings for new changes."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from cdc.cli.options import json_option, open_database, settings_options, yes_option
from cdc.cli.output import confirm, print_json, print_table, say
from cdc.config import Settings

if TYPE_CHECKING:
    from cdc.slots import Slot

_LISTED = (
    "name", "plugin", "database", "temporary", "active_pid", "application_name", "wal_status", "retained_wal_bytes",
    "confirmed_lag_bytes", "safe_wal_bytes", "catalog_xmin_age", "failover", "synced", "inactive_since", "ours",
)  # fmt: skip
"""What ``list`` prints; the JSON output and ``status`` have all."""

slot_options = settings_options("dsn", "slot.name")
name_argument = click.argument("name", required=False)


@click.group()
def slot() -> None:
    """Create, drop and inspect the replication slot.

    It is a doorbell: dropping it, losing it or making it anew loses no change. A slot that nobody reads keeps WAL on
    the server's disk.
    """


@slot.command()
@slot_options
@name_argument
@click.option("--if-not-exists", is_flag=True, help="Accept a slot of ours that is there already.")
@json_option
def create(settings: Settings, name: str | None, if_not_exists: bool, as_json: bool) -> None:
    """Create the slot NAME [the configured one].

    cdc run does so by itself. Waits for the transactions that are writing now, and names the one it cannot wait for.
    """
    from cdc import slots  # noqa: PLC0415 - --help does not wait for the driver to load

    with open_database(settings) as connection:
        made = slots.create(connection, name or settings.slot.name, if_not_exists=if_not_exists)
    if as_json:
        print_json({"slot": asdict(made)})
    else:
        say(f"slot {made.name} is there; it keeps WAL until a consumer reads it")


@slot.command()
@slot_options
@name_argument
@click.option("--force", is_flag=True, help="Also a slot of another plugin or database.")
@yes_option
@json_option
def drop(settings: Settings, name: str | None, force: bool, yes: bool, as_json: bool) -> None:
    """Drop the slot NAME [the configured one]; refused while it is being read. No change is lost."""
    from cdc import slots  # noqa: PLC0415 - see create

    chosen = name or settings.slot.name
    confirm(f"drop the replication slot {chosen}", yes)
    with open_database(settings) as connection:
        dropped = slots.drop(connection, chosen, force=force)
    if as_json:
        print_json({"slot": asdict(dropped)})
    else:
        say(f"dropped {dropped.name}; the server no longer keeps {dropped.retained_wal_bytes or 0} bytes of WAL for it")


@slot.command("list")
@slot_options
@json_option
def list_(settings: Settings, as_json: bool) -> None:
    """List all slots of the server; sizes in bytes."""
    from cdc import slots  # noqa: PLC0415 - see create

    with open_database(settings) as connection:
        found = [asdict(each) for each in slots.list_slots(connection)]
    if as_json:
        print_json({"slots": found})
    else:
        # A server that is too old for a column has it nowhere.
        columns = [column for column in _LISTED if not found or any(each[column] is not None for each in found)]
        print_table(columns, ([each[column] for column in columns] for each in found))


@slot.command()
@slot_options
@name_argument
@json_option
def status(settings: Settings, name: str | None, as_json: bool) -> None:
    """Show all about the slot NAME [the configured one]; exit 1 if something is to be done about it."""
    from cdc import slots  # noqa: PLC0415 - see create

    with open_database(settings) as connection:
        found = slots.status(connection, name or settings.slot.name)
    verdict = slots.judge(found)
    if as_json:
        print_json({"slot": asdict(found), "verdict": asdict(verdict)})
    else:
        print_table(["", found.name], _facts(found))
        say(f"{found.name}: {verdict.sentence}")
        if verdict.remedy:
            say(f"  {verdict.remedy}")
    click.get_current_context().exit(0 if verdict.fine else 1)


def _facts(found: Slot) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in asdict(found).items() if name != "name" and value is not None]
