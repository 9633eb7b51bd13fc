"""cdc pause, resume, controls: what consumers leave alone for a while, decided while they run."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC
from typing import TYPE_CHECKING, Any

import click

from cdc.app.config import Settings
from cdc.app.documents import control_document, limit_document
from cdc.cli.acting import actor, because_option, checked, user
from cdc.cli.options import database_options, json_option, open_database
from cdc.cli.output import print_json, print_table, say
from cdc.core.errors import UsageError
from cdc.core.pauses import Pause
from cdc.core.subscription import DEFAULT
from cdc.core.units import format_duration, parse_duration

if TYPE_CHECKING:
    from collections.abc import Callable

    from cdc.postgres.connect import Connection
    from cdc.postgres.controls import Control

_TARGET = (
    click.option("--subscription", metavar="NAME", help="In this subscription only; without it in all of them."),
    click.option("--type", "entity_type", metavar="TYPE", help="Changes of this entity type."),
    click.option("--handler", metavar="NAME", help="Every type that this handler gets changes of."),
    click.option("--key", metavar="KEY", help="With --type: one key of it, an entity_id."),
)


for_option = click.option("--for", "duration", metavar="TIME", help="End by itself after this time, such as 30m.")
by_option = click.option("--by", metavar="NAME", help="Who decides it; without it the user of this machine.")


def _target_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_TARGET):
        command = option(command)
    return command


@click.command()
@database_options
@_target_options
@for_option
@click.option("--because", metavar="TEXT", required=True, help="Why, for those who find it paused.")
@by_option
@json_option
def pause(
    *,
    settings: Settings,
    subscription: str | None,
    entity_type: str | None,
    handler: str | None,
    key: str | None,
    duration: str | None,
    because: str,
    by: str | None,
    as_json: bool,
) -> None:
    """Let consumers start nothing of a type, a handler, a key, or at all, until it is resumed.

    \b
        cdc pause --handler send_mail --for 30m --because "the provider is down"
        cdc pause --type order --key 4711 --because "looking into it"
        cdc pause --because "the disk is full"

    It holds for all consumers within a second, those that start later too. What runs already ends as usual. What is
    paused stays as it is, fresh or waiting, is in nobody's way, and no attempt is counted; on "cdc resume" it goes on
    in order. Changes are captured all the time. A pause of the same thing replaces the one before.
    """
    begin(
        settings, named(subscription, entity_type, handler, key), duration=duration, because=because, by=by,
        as_json=as_json,
    )  # fmt: skip


def begin(
    settings: Settings, target: Pause, *, duration: str | None, because: str, by: str | None, as_json: bool
) -> None:
    """Pause this, and say so."""
    from cdc.postgres.controls import Controls  # noqa: PLC0415 - --help does not wait for the driver to load

    for_s = None if duration is None else parse_duration(duration)
    target = replace(target, because=checked(because), set_by=by or user())
    with open_database(settings) as connection:
        refuse_unknown(connection, settings, target.subscription)
        made = Controls(settings.schema_, actor()).pause(connection, target, for_s)
    if as_json:
        print_json({"paused": control_document(made)})
        return
    end = "until it is resumed" if made.until is None else f"until {made.until.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"
    say(f"paused {made.pause} {end}; to go on: cdc resume{_options(target)}")


@click.command()
@database_options
@_target_options
@click.option("--all", "everything", is_flag=True, help="End every pause.")
@because_option
@json_option
def resume(
    *,
    settings: Settings,
    subscription: str | None,
    entity_type: str | None,
    handler: str | None,
    key: str | None,
    everything: bool,
    because: str | None,
    as_json: bool,
) -> None:
    """End a pause, named as it was to "cdc pause"; without options the pause of everything."""
    target = named(subscription, entity_type, handler, key)
    if everything and target != named(None, None, None, None):
        raise UsageError("--all ends every pause, so it names none")
    with open_database(settings) as connection:
        end(connection, settings, None if everything else target, because=because, as_json=as_json)


def end(
    connection: Connection, settings: Settings, target: Pause | None, *, because: str | None = None, as_json: bool
) -> None:
    """End this pause, None: every pause, and say what is still paused."""
    from cdc.postgres.controls import Controls  # noqa: PLC0415 - see begin

    controls = Controls(settings.schema_, actor(because))
    ended = controls.resume(connection, target)
    left = controls.all(connection)
    if as_json:
        documents = {"resumed": ended, "left": left}
        print_json({name: [control_document(each) for each in found] for name, found in documents.items()})
        return
    for each in ended:
        say(f"resumed {each.pause}")
    if not ended:
        say("nothing was paused")
    if left:
        say(f"still paused: {', '.join(str(each.pause) for each in left[:5])} (cdc controls)")


@click.command()
@database_options
@json_option
def controls(settings: Settings, as_json: bool) -> None:
    """List what is paused and limited: who decided it, when, until when and why."""
    from cdc.cli.limits import print_limits  # noqa: PLC0415 - it names this module
    from cdc.postgres.controls import Controls  # noqa: PLC0415 - see begin
    from cdc.postgres.limit_admin import LimitAdmin  # noqa: PLC0415 - see begin

    with open_database(settings) as connection:
        found = Controls(settings.schema_).all(connection)
        limits = LimitAdmin(settings.schema_).all(connection)
    if as_json:
        print_json(
            {
                "controls": [control_document(each) for each in found],
                "limits": [limit_document(each) for each in limits],
            }
        )
        return
    print_table(
        ["paused", "key", "since", "for", "until", "by", "because"],
        (
            [str(each.pause), each.pause.entity_id, each.set_at.replace(microsecond=0),
             format_duration(each.pause.age_s), each.until and each.until.replace(microsecond=0), _who(each),
             each.pause.because]
            for each in found
        ),
    )  # fmt: skip
    if not found:
        say("nothing is paused")
    if limits:
        print_limits(limits)


def named(
    subscription: str | None, entity_type: str | None = None, handler: str | None = None, key: str | None = None
) -> Pause:
    """What these options name."""
    if key is not None and (entity_type is None or handler is not None):
        raise UsageError("--key names a key of a type", hint="--type TYPE --key KEY, without --handler")
    if entity_type == "*" or handler == "*":
        raise UsageError("* is no name here", hint="without --type, --handler and --key everything is paused")
    for name, value in (("--type", entity_type), ("--handler", handler), ("--key", key)):
        if value is not None and (not value or "\0" in value):
            raise UsageError(f"{name} is empty, or has a zero byte in it")
    return Pause(0, subscription, entity_type, handler, key)


def refuse_unknown(connection: Connection, settings: Settings, subscription: str | None) -> None:
    """Raises NotFoundError where this names a subscription that is not there."""
    from cdc.postgres.subscriptions import Subscriptions  # noqa: PLC0415 - see begin

    if subscription is not None and subscription != DEFAULT:
        Subscriptions(settings.schema_).named(connection, subscription)


def _who(control: Control) -> str:
    return f"{control.pause.set_by} as {control.role}"


def _options(pause: Pause) -> str:
    """The options that name it, but for the key: it may be anything."""
    named = {"--subscription": pause.subscription, "--type": pause.entity_type, "--handler": pause.handler}
    options = "".join(f" {name} {value}" for name, value in named.items() if value is not None)
    return options + (" --key ..." if pause.entity_id is not None else "")
