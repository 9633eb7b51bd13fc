"""cdc slot: the replication slot that wakes consumers for new changes."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from cdc.app.config import Settings
from cdc.cli.commands import Commands
from cdc.cli.options import json_option, open_database, settings_options, yes_option
from cdc.cli.output import confirm, print_json, print_table, put, say
from cdc.cli.watch import watch
from cdc.core.model import PLUGINS
from cdc.core.units import format_bytes, format_duration
from cdc.replication.slot_health import Outlook, SlotHealth, SlotReport, assess, outlook

if TYPE_CHECKING:
    from cdc.postgres.connect import Connection

_LISTED = (
    "name", "plugin", "database", "temporary", "active_pid", "application_name", "wal_status", "retained_wal_bytes",
    "confirmed_lag_bytes", "safe_wal_bytes", "catalog_xmin_age", "failover", "synced", "inactive_since", "ours",
)  # fmt: skip
"""What ``list`` prints; the JSON output and ``status`` have all."""
_MEASURED_S = 1.0
"""Between the two looks that say how fast WAL is written."""

slot_options = settings_options("dsn", "schema", "slot.name", "slot.plugin")
name_argument = click.argument("name", required=False)
plugin_option = click.option(
    "--plugin", type=click.Choice(PLUGINS), help="Decode with this plugin [the configured one; else the first allowed]."
)
force_option = click.option("--force", is_flag=True, help="Also a slot of another plugin or database.")
terminate_option = click.option("--terminate", is_flag=True, help="Also one that is being read: end its reader first.")


@click.group(cls=Commands)
def slot() -> None:
    """Create, drop and inspect the replication slot.

    It carries wake-ups only: dropping, losing, moving or recreating it loses no change. A slot that no consumer reads
    keeps WAL on the server's disk.
    """


@slot.command()
@slot_options
@name_argument
@plugin_option
@click.option("--if-not-exists", is_flag=True, help="Accept a slot of ours that is there already.")
@click.option("--temporary", is_flag=True, help="Only see whether it can be made: it is gone with this command.")
@click.option("--failover", is_flag=True, help="Have it copied to standbys (PostgreSQL 17 and later).")
@json_option
def create(
    *,
    settings: Settings,
    name: str | None,
    plugin: str | None,
    if_not_exists: bool,
    temporary: bool,
    failover: bool,
    as_json: bool,
) -> None:
    """Create the slot NAME [the configured one].

    cdc run does so by itself. Waits for the transactions that are writing now, and names the one it cannot wait for.
    """
    from cdc.replication import slots  # noqa: PLC0415 - --help does not wait for the driver to load

    with open_database(settings) as connection:
        made = slots.create(
            connection,
            name or settings.slot.name,
            plugin=plugin or settings.slot.plugin,
            schema=settings.schema_,
            if_not_exists=if_not_exists,
            temporary=temporary,
            failover=failover,
        )
    kept = "could be made, and is gone again" if temporary else "is there; it keeps WAL until a consumer reads it"
    _print_one(made, f"slot {made.name} ({made.plugin}) {kept}", as_json)


@slot.command()
@slot_options
@name_argument
@force_option
@terminate_option
@yes_option
@json_option
def drop(*, settings: Settings, name: str | None, force: bool, terminate: bool, yes: bool, as_json: bool) -> None:
    """Drop the slot NAME [the configured one]. No change is lost.

    Refused while it is being read, and for one that is not ours. A consumer that is running recreates it.
    """
    from cdc.replication import slots  # noqa: PLC0415 - see create

    chosen = name or settings.slot.name
    with open_database(settings) as connection:
        confirm(f"drop the replication slot {chosen}{_what_it_frees(connection, chosen)}", yes)
        dropped = slots.drop(connection, chosen, force=force, terminate=terminate)
    _print_one(dropped, f"dropped {dropped.name}{_freed(dropped)}", as_json)


@slot.command()
@slot_options
@name_argument
@plugin_option
@force_option
@terminate_option
@yes_option
@json_option
def recreate(
    *,
    settings: Settings,
    name: str | None,
    plugin: str | None,
    force: bool,
    terminate: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Drop the slot NAME [the configured one] and recreate it, as for a lost one or for another plugin.

    No change is lost: the next sweep finds what the old one would have announced. Refused as for drop.
    """
    from cdc.replication import slots  # noqa: PLC0415 - see create

    chosen = name or settings.slot.name
    with open_database(settings) as connection:
        confirm(f"drop the replication slot {chosen} and recreate it", yes)
        dropped = slots.drop(connection, chosen, force=force, terminate=terminate)
        # Printed before the next step, which may have to be repeated alone.
        say(f"dropped {dropped.name}{_freed(dropped)}")
        made = slots.create(
            connection,
            chosen,
            plugin=plugin or settings.slot.plugin,
            schema=settings.schema_,
            if_not_exists=terminate,  # the consumer that was reading it may create it first
            failover=bool(dropped.failover),
        )
    _print_one(made, f"slot {made.name} ({made.plugin}) is there; it keeps WAL until a consumer reads it", as_json)


@slot.command()
@slot_options
@name_argument
@json_option
def advance(settings: Settings, name: str | None, as_json: bool) -> None:
    """Move the slot NAME [the configured one] to the end of the WAL, without reading what it skips.

    No change is lost: the slot carries wake-ups only, and the next sweep finds the rest. Refused while it is being
    read. Works while the server refuses the plugin.
    """
    from cdc.replication import slots  # noqa: PLC0415 - see create

    with open_database(settings) as connection:
        before, after = slots.advance(connection, name or settings.slot.name)
    skipped = format_bytes(max(0, before.confirmed_lag_bytes or 0))
    left = format_bytes(after.retained_wal_bytes or 0)
    _print_one(after, f"{after.name} skipped {skipped} of WAL, and still keeps {left}; no change is lost", as_json)


@slot.command("list")
@slot_options
@json_option
def list_(settings: Settings, as_json: bool) -> None:
    """List all slots of the server; sizes in bytes."""
    from cdc.replication import slots  # noqa: PLC0415 - see create

    with open_database(settings) as connection:
        found = [asdict(each) for each in slots.list_slots(connection)]
    if as_json:
        print_json({"slots": found})
    else:
        # A column that the server's version lacks is None in every row.
        columns = [column for column in _LISTED if not found or any(each[column] is not None for each in found)]
        print_table(columns, ([each[column] for column in columns] for each in found))


@slot.command()
@slot_options
@name_argument
@click.option("--watch", "watching", is_flag=True, help="Again and again, until Ctrl-C; always ends with 0.")
@click.option("--every", type=click.FloatRange(min=0.1), default=2.0, show_default=True, metavar="SECONDS",
              help="Between two readings, with --watch.")  # fmt: skip
@click.option("--times", type=click.IntRange(min=1), hidden=True)
@json_option
def status(
    *, settings: Settings, name: str | None, watching: bool, every: float, times: int | None, as_json: bool
) -> None:
    """Show all about the slot NAME [the configured one]; exit 1 if something is to be done about it.

    Where what it may keep is limited, it takes a second: to see how fast WAL is written, and when the slot is lost if
    no consumer reads it. With --watch, off a terminal, one line for each look.
    """
    from cdc.replication import slots  # noqa: PLC0415 - see create

    chosen = name or settings.slot.name
    with open_database(settings) as connection:
        if watching:
            watch(_shows_in_turn(lambda: slots.status(connection, chosen), as_json), every_s=every, times=times)
            return
        found, earlier = slots.status(connection, chosen), None
        if found.safe_wal_bytes is not None:
            threading.Event().wait(_MEASURED_S)
            found, earlier = slots.status(connection, chosen), found
    health = _show(found, outlook(earlier, found) if earlier else None, as_json)
    click.get_current_context().exit(0 if health.fine else 1)


def _shows_in_turn(look: Callable[[], SlotReport], as_json: bool) -> Callable[[], None]:
    """Each call shows the slot as it is, and how fast WAL was written since the call before."""
    before: list[SlotReport] = []

    def show() -> None:
        found = look()
        expected = outlook(before[0], found) if before else None
        before[:] = [found]
        if as_json or sys.stdout.isatty():
            _show(found, expected, as_json)
        else:
            _print_line(found, expected, assess(found, expected))

    return show


def _show(found: SlotReport, expected: Outlook | None, as_json: bool) -> SlotHealth:
    health = assess(found, expected)
    if as_json:
        known = asdict(expected) if expected else None
        print_json({"slot": asdict(found), "outlook": known, "health": asdict(health)})
        return health
    print_table(["", found.name], _facts(found, expected))
    say(f"{found.name}: {health.sentence}")
    if health.remedy:
        say(f"  {health.remedy}")
    return health


def _print_line(found: SlotReport, expected: Outlook | None, health: SlotHealth) -> None:
    sizes = {"retained": found.retained_wal_bytes, "lag": found.confirmed_lag_bytes, "safe": found.safe_wal_bytes}
    words = [found.seen_at.isoformat(timespec="seconds"), found.name, found.wal_status or "-"]
    words += [f"{name}={value}" for name, value in sizes.items() if value is not None]
    words += [f"wal_per_s={expected.wal_bytes_per_s:.0f}"] if expected else []
    words += [f"lost_in_s={expected.lost_in_s:.0f}"] if expected and expected.lost_in_s is not None else []
    put(f"{' '.join(words)} {health.sentence}")


def _facts(found: SlotReport, expected: Outlook | None) -> list[tuple[str, Any]]:
    facts = [(name, value) for name, value in asdict(found).items() if name != "name" and value is not None]
    if expected is not None:
        facts.append(("wal_written", f"{format_bytes(round(expected.wal_bytes_per_s))} a second"))
    if expected is not None and expected.lost_in_s is not None:
        facts.append(("lost_in", f"{format_duration(expected.lost_in_s)}, if no consumer reads it"))
    return facts


def _print_one(found: SlotReport, sentence: str, as_json: bool) -> None:
    if as_json:
        print_json({"slot": asdict(found)})
    else:
        say(sentence)


def _what_it_frees(connection: Connection, name: str) -> str:
    """For the question; what is not there is said by the drop itself."""
    from cdc.replication import slots  # noqa: PLC0415 - see create

    found = slots.snapshot(connection, slots.check_name(name))
    return _freed(found) if found else ""


def _freed(found: SlotReport) -> str:
    kept = found.retained_wal_bytes or 0
    return f", which frees {format_bytes(kept)} of WAL" if kept else ""
