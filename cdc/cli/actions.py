"""cdc actions: what operators have done."""

from __future__ import annotations

import click

from cdc.app.config import Settings
from cdc.cli.options import database_options, json_option, open_database
from cdc.cli.output import print_json, print_table, say

_TARGET_LENGTH = 60


@click.command()
@database_options
@click.option("--limit", type=click.IntRange(1, 1_000), default=50, show_default=True, help="Actions to list.")
@click.option("--before", type=click.IntRange(1), metavar="ID", help="Those before this one: the next page.")
@json_option
def actions(settings: Settings, limit: int, before: int | None, as_json: bool) -> None:
    """List what operators have done, the latest first: who, to what, why and when.

    Whatever decides about changes, pauses, backfills and subscriptions is recorded with it, by the commands, the web
    interface and its API. role: whose rights were used. person: what the program says of who used it.
    """
    from cdc.app.documents import action_document  # noqa: PLC0415 - --help does not wait for the driver to load
    from cdc.postgres.actions import ActionLog  # noqa: PLC0415 - see above

    with open_database(settings) as connection:
        found = ActionLog(settings.schema_).latest(connection, limit, before=before)
    if as_json:
        print_json({"actions": [action_document(each) for each in found]})
        return
    headers = ["id", "at", "person", "role", "via", "action", "count", "of", "because"]
    print_table(headers, (
        (each.id, each.at.replace(microsecond=0), each.person, each.role, each.via, each.action, each.count,
         _shortened(each.described), each.because)
        for each in found
    ))  # fmt: skip
    if not found:
        say("nobody has done anything yet")


def _shortened(text: str) -> str:
    return text if len(text) <= _TARGET_LENGTH else f"{text[: _TARGET_LENGTH - 1]}…"
