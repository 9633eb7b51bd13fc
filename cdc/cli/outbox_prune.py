"""cdc outbox prune: remove what is processed, and name who keeps the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from cdc.app.config import Settings
from cdc.cli.acting import actor
from cdc.cli.bulk import add_up
from cdc.cli.options import database_options, json_option, open_database
from cdc.cli.output import print_json, say
from cdc.core.units import parse_duration

if TYPE_CHECKING:
    from cdc.postgres.connect import Connection


@click.command()
@database_options
@click.option("--older-than", required=True, metavar="AGE", help="Processed longer ago than 30d, 12h, 90m.")
@click.option("--dry-run", is_flag=True, help="Count them, up to a million, and remove none.")
@json_option
def prune(settings: Settings, older_than: str, dry_run: bool, as_json: bool) -> None:
    """Remove processed changes for good, in small batches.

    Dead letters and whatever is not processed stay, and what a subscription is not done with: that one is named. It may
    be stopped and started at any time.
    """
    from cdc.postgres.retention import Retention  # noqa: PLC0415 - --help does not wait for the driver to load

    older_than_s, retention, more = parse_duration(older_than), Retention(settings.schema_, actor()), False
    with open_database(settings) as connection:
        if dry_run:
            count, more = retention.prunable(connection, older_than_s)
        else:
            count = add_up(retention.prune(connection, older_than_s), lambda so_far: f"removed {so_far:,} so far")
        held_back = _held_back(connection, settings) if retention.shared(connection) else {}
    if as_json:
        figures = {"prunable": count, "complete": not more} if dry_run else {"pruned": count}
        print_json({**figures, **({"held_back": held_back} if held_back else {})})
    else:
        done = "would be removed" if dry_run else "removed"
        say(f"processed more than {older_than} ago: {count:,}{' or more' if more else ''} {done}")
        for name, kept in held_back.items():
            say(f"the subscription {name} is not done with {kept:,} that are processed; cdc subscription show {name}")


def _held_back(connection: Connection, settings: Settings) -> dict[str, int]:
    """Of each subscription that keeps something, how much; a lower bound."""
    from cdc.postgres.subscriptions import Subscriptions  # noqa: PLC0415 - --help does not wait for the driver to load

    found = Subscriptions(settings.schema_).progress(connection)
    return {each.subscription.name: each.held_back for each in found if each.held_back}
