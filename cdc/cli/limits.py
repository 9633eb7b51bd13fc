"""cdc limits: how often handlers may be called, decided while they run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from cdc.app.config import Settings
from cdc.app.documents import limit_document
from cdc.cli.acting import actor, because_option, checked, user
from cdc.cli.commands import Commands
from cdc.cli.controls import refuse_unknown
from cdc.cli.options import database_options, json_option, open_database
from cdc.cli.output import print_json, print_table, say
from cdc.core.errors import UsageError
from cdc.core.limits import Limit, LimitSetting, check_handler, check_path

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cdc.postgres.limit_admin import SetLimit

_in = click.option("--subscription", metavar="NAME", help="In this subscription only; without it in all of them.")


@click.group(cls=Commands)
def limits() -> None:
    """How often handlers may be called, over all consumers: set, list, clear."""


@limits.command("set")
@database_options
@click.argument("handler")
@click.option("--rate", metavar="RATE", help="Calls for a time, over all consumers: 14/s, 100/m, 1000/h.")
@click.option("--burst", type=int, metavar="N", help="How many of them may come together. [as many as the rate names]")
@click.option("--concurrency", "at_once", type=int, metavar="N", help="How many calls may run at a time.")
@click.option("--by", "path", metavar="PATH", help="For each value of this by itself, such as new.tenant.")
@_in
@click.option("--because", metavar="TEXT", required=True, help="Why, for those who wonder what it waits for.")
@click.option("--as", "who", metavar="NAME", help="Who decides it; without it the user of this machine.")
@json_option
def set_(
    *,
    settings: Settings,
    handler: str,
    rate: str | None,
    burst: int | None,
    at_once: int | None,
    path: str | None,
    subscription: str | None,
    because: str,
    who: str | None,
    as_json: bool,
) -> None:
    """Limit a handler, in place of the limit in its code, if it has one.

    \b
        cdc limits set send_mail --rate 14/s --concurrency 50 --because "what the provider allows"
        cdc limits set send_mail --rate 2/s --by new.tenant --because "one tenant floods the others"

    It holds for all consumers within a second or two, those that start later too. What is over it waits in the table:
    no attempt is counted, and other handlers and keys go on. Another limit of the same handler is replaced.
    """
    from cdc.postgres.limit_admin import LimitAdmin  # noqa: PLC0415 - --help does not wait for the driver to load

    limit = Limit(rate, burst, at_once, check_path(path) if path is not None else None)
    setting = LimitSetting(0, check_handler(handler), limit, subscription, checked(because), who or user())
    with open_database(settings) as connection:
        refuse_unknown(connection, settings, subscription)
        made = LimitAdmin(settings.schema_, actor()).set(connection, setting)
    if as_json:
        print_json({"limit": limit_document(made)})
        return
    say(f"{handler} is limited to {limit}; to end it: cdc limits clear {handler}")


@limits.command("list")
@database_options
@json_option
def list_(*, settings: Settings, as_json: bool) -> None:
    """List the limits that are set: who set them, when and why. Those in the code of handlers are not among them."""
    from cdc.postgres.limit_admin import LimitAdmin  # noqa: PLC0415 - see set

    with open_database(settings) as connection:
        found = LimitAdmin(settings.schema_).all(connection)
    if as_json:
        print_json({"limits": [limit_document(each) for each in found]})
        return
    print_limits(found)
    if not found:
        say("no limit is set")


@limits.command()
@database_options
@click.argument("handler", required=False)
@click.option("--all", "everything", is_flag=True, help="All that are set.")
@_in
@because_option
@json_option
def clear(
    *,
    settings: Settings,
    handler: str | None,
    everything: bool,
    subscription: str | None,
    because: str | None,
    as_json: bool,
) -> None:
    """End a limit that was set. One in the handler's code holds again, if there is one."""
    from cdc.postgres.limit_admin import LimitAdmin  # noqa: PLC0415 - see set

    if (handler is None) != everything or (everything and subscription):
        raise UsageError("which limit?", hint="the name of a handler, or --all")
    with open_database(settings) as connection:
        ended = LimitAdmin(settings.schema_, actor(because)).clear(connection, handler, subscription)
    if as_json:
        print_json({"cleared": [limit_document(each) for each in ended]})
        return
    for each in ended:
        say(f"{each.setting.handler} is limited no more to {each.setting.limit}")
    if not ended:
        say("no limit was set")


def print_limits(found: Sequence[SetLimit]) -> None:
    print_table(
        ["handler", "limit", "subscription", "since", "by", "because"],
        (
            [each.setting.handler, str(each.setting.limit), each.setting.subscription,
             each.set_at.replace(microsecond=0), f"{each.setting.set_by} as {each.role}", each.setting.because]
            for each in found
        ),
    )  # fmt: skip
