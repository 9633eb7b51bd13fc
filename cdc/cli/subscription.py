"""cdc subscription: further readers of the outbox, each with progress of its own."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC
from typing import TYPE_CHECKING, Any

import click

from cdc.app.config import Settings
from cdc.app.documents import subscription_document, subscription_state
from cdc.cli import controls
from cdc.cli.acting import actor
from cdc.cli.commands import Commands
from cdc.cli.options import database_options, json_option, open_database, yes_option
from cdc.cli.output import confirm, print_json, print_table, say
from cdc.core.subscription import parse_start
from cdc.core.units import format_duration

if TYPE_CHECKING:
    from cdc.postgres.subscriptions import Subscription, SubscriptionProgress

_TYPES_SHOWN = 3

name_argument = click.argument("name")


@click.group(cls=Commands)
def subscription() -> None:
    """Let further services read the outbox, each at its own pace.

    Each subscription has its own progress, retries, dead letters and consumers: cdc run --subscription NAME. What runs
    without that option is the default subscription; it needs no command, and is not listed here.
    """


@subscription.command()
@name_argument
@database_options
@click.option("--type", "types", metavar="TYPE", multiple=True, help="Take this entity type only. May be repeated.")
@click.option("--from", "start", metavar="WHERE", default="now", show_default=True,
              help="now, beginning, a TIME such as 2026-01-31T18:00Z or 2h ago, or a SEQ.")  # fmt: skip
@click.option("--if-not-exists", is_flag=True, help="Accept one of this name that takes the same types.")
@json_option
def create(
    *, settings: Settings, name: str, types: tuple[str, ...], start: str, if_not_exists: bool, as_json: bool
) -> None:
    """Create the subscription NAME: 1 to 63 lower-case letters, digits and underscores.

    \b
        cdc subscription create search
        cdc subscription create billing --type order --type refund --from beginning

    \b
    --from says what it takes:
        now        what commits after this command's snapshot, and nothing that had committed before it. A transaction
                   that is open at that moment is taken whole, whatever numbers it has drawn.
        beginning  every change that is in the outbox, also those that others have processed.
        TIME       of each shard the first change that began at this time or later (changed_at), and all behind it.
        SEQ        every change with this number or a higher one.

    now and TIME wait, up to a minute, until the transactions have ended that write when they begin, and name the oldest
    if it does not. The first subscription also builds an index. No writer and no consumer waits for any of it. Give it
    again if it was interrupted.
    """
    from cdc.postgres.subscriptions import Subscriptions  # noqa: PLC0415 - --help does not wait for the driver to load

    begin, subscriptions = parse_start(start), Subscriptions(settings.schema_, actor())
    with open_database(settings) as connection:
        made, is_new = subscriptions.create(
            connection, name, types=types or None, start=begin, if_not_exists=if_not_exists
        )
    if as_json:
        print_json({"subscription": asdict(made), "created": is_new})
    elif is_new:
        say(f"created {made.name}, which takes {made.taking}; to consume it: cdc run --subscription {made.name}")
    else:
        say(f"there is a subscription {made.name} already, which takes {made.taking}")


@subscription.command("list")
@database_options
@json_option
def list_(settings: Settings, as_json: bool) -> None:
    """List the subscriptions and how far each is.

    behind: changes that it has not handled yet, the oldest of them so old. holds back: those of them that the default
    subscription has processed, which retention keeps for this one. A + means more than were looked at.
    """
    from cdc.postgres.subscriptions import Subscriptions  # noqa: PLC0415 - see create

    with open_database(settings) as connection:
        found = Subscriptions(settings.schema_).progress(connection)
    if as_json:
        print_json({"subscriptions": [subscription_document(each) for each in found]})
        return
    headers = ["name", "state", "types", "behind", "oldest", "waiting", "dead", "holds back", "consumers"]
    print_table(headers, (
        (each.subscription.name, _state(each), _types(each.subscription), _count(each.behind, each.more), _age(each),
         each.waiting, each.dead, _count(each.held_back, each.more), each.consumers)
        for each in found
    ))  # fmt: skip
    if not found:
        say("there is none beside the default one")


@subscription.command()
@name_argument
@database_options
@json_option
def show(settings: Settings, name: str, as_json: bool) -> None:
    """Show one subscription: what it takes, where it began, and how far it is."""
    from cdc.postgres.subscriptions import Subscriptions  # noqa: PLC0415 - see create

    subscriptions = Subscriptions(settings.schema_)
    with open_database(settings) as connection:
        found = subscriptions.named(connection, name)
        progress = subscriptions.progress(connection, found.number)
    if as_json:
        print_json({"subscription": subscription_document(progress[0]) if progress else asdict(found)})
        return
    rows: list[tuple[str, Any]] = [
        ("types", ", ".join(found.types) if found.types else "all"),
        ("created", found.created_at),
        ("from", found.created_from),
    ]
    for each in progress:
        rows += [("state", _state(each)), ("consumers", each.consumers), ("behind", _count(each.behind, each.more)),
                 ("oldest", _age(each)), ("waiting", each.waiting), ("dead", each.dead),
                 ("holds back", _count(each.held_back, each.more))]  # fmt: skip
        rows += [("paused", f"{one.pause}, by {one.pause.set_by}: {one.pause.because}") for one in each.pauses]
    print_table(["", found.name], rows)


@subscription.command()
@name_argument
@database_options
@controls.for_option
@click.option("--because", metavar="TEXT", default="no reason was given", help="Why, for those who find it paused.")
@controls.by_option
@json_option
def pause(*, settings: Settings, name: str, duration: str | None, because: str, by: str | None, as_json: bool) -> None:
    """Let its consumers begin nothing more, also after a restart, until it is resumed.

    It is "cdc pause --subscription NAME": what runs is finished, consumers know it within a second, and "cdc controls"
    lists it. Retention keeps for it what it has not handled.
    """
    controls.begin(settings, controls.named(name), duration=duration, because=because, by=by, as_json=as_json)


@subscription.command()
@name_argument
@database_options
@json_option
def resume(settings: Settings, name: str, as_json: bool) -> None:
    """Go on where it was paused: "cdc resume --subscription NAME"."""
    with open_database(settings) as connection:
        controls.refuse_unknown(connection, settings, name)
        controls.end(connection, settings, controls.named(name), as_json=as_json)


@subscription.command()
@name_argument
@database_options
@yes_option
@json_option
def drop(*, settings: Settings, name: str, yes: bool, as_json: bool) -> None:
    """Drop the subscription NAME for good, with its progress and its dead letters. No change is lost to others.

    Its consumers end. Retention no longer keeps anything for it.
    """
    from cdc.postgres.subscriptions import Subscriptions  # noqa: PLC0415 - see create

    subscriptions = Subscriptions(settings.schema_, actor())
    with open_database(settings) as connection:
        found = subscriptions.named(connection, name)
        confirm(f"drop the subscription {name}{_what_is_lost(subscriptions.progress(connection, found.number))}", yes)
        dropped = subscriptions.drop(connection, name)
    if as_json:
        print_json({"subscription": asdict(dropped)})
    else:
        say(f"dropped {dropped.name}")


def _what_is_lost(found: list[SubscriptionProgress]) -> str:
    if not found:
        return ""
    [each] = found
    left = {"not handled": _count(each.behind, each.more), "waiting": each.waiting, "dead": each.dead}
    named = ", ".join(f"{count} {what}" for what, count in left.items() if count)
    return f", with what is left of it: {named}" if named else ""


def _state(each: SubscriptionProgress) -> str:
    if (paused := each.paused) is not None:
        return f"paused since {paused.set_at.astimezone(UTC):%Y-%m-%dT%H:%MZ}: {paused.pause.because}"
    return subscription_state(each)


def _types(each: Subscription) -> str:
    if each.types is None:
        return "all"
    more = f", {len(each.types) - _TYPES_SHOWN} more" if len(each.types) > _TYPES_SHOWN else ""
    return ", ".join(each.types[:_TYPES_SHOWN]) + more


def _age(each: SubscriptionProgress) -> str | None:
    return None if each.oldest_age_s is None else format_duration(each.oldest_age_s)


def _count(value: int, more: bool) -> Any:
    return f"{value}+" if more and value else value
