"""cdc status: the state of things on one screen."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from cdc.app.config import Settings
from cdc.app.documents import status_document
from cdc.cli.options import json_option, open_database, settings_options
from cdc.cli.output import paint, print_json, print_table, put
from cdc.cli.watch import watch
from cdc.core.model import SHARDS
from cdc.core.subscription import DEFAULT
from cdc.core.units import format_bytes, format_duration
from cdc.replication.slot_health import Outlook, SlotHealth, SlotReport, assess, outlook

if TYPE_CHECKING:
    from cdc.diagnostics.status import DeadLetter, Status
    from cdc.postgres.shard_locks import Member
    from cdc.postgres.subscriptions import SubscriptionProgress

_LABEL = 11
_MEMBERS_MAX = 4
_PAUSES_MAX = 5
_TYPES_MAX = 10
_SUBSCRIPTIONS_MAX = 5
_DEAD_LETTERS_MAX = 5
"""So that it fits on one screen; --json has all of them."""


@click.command()
@settings_options("dsn", "schema", "slot.name", "subscription")
@click.option("--watch", "watching", is_flag=True, help="Again and again, until Ctrl-C.")
@click.option("--every", type=click.FloatRange(min=0.1), default=2.0, show_default=True, metavar="SECONDS",
              help="Between two readings, with --watch.")  # fmt: skip
@click.option("--times", type=click.IntRange(min=1), hidden=True)
@json_option
def status(*, settings: Settings, watching: bool, every: float, times: int | None, as_json: bool) -> None:
    """Show who works, how fast, what is not processed, and the slot.

    Read from the database, so that it needs no consumer to answer; of every consumer, where the page of one shows its
    own pace. Shows nothing of what is in a row. Ends with 0 whatever it sees: cdc doctor judges.
    """
    from cdc.diagnostics.status import read  # noqa: PLC0415 - --help does not wait for the driver to load

    before: list[SlotReport] = []

    def show() -> None:
        seen = read(connection, settings.schema_, settings.slot.name, settings.subscription)
        expected = outlook(before[0], seen.slot) if before and seen.slot else None
        before[:] = [seen.slot] if seen.slot else []
        _show(seen, settings, expected, as_json)

    with open_database(settings) as connection:
        watch(show, every_s=every, times=times if watching else 1)


def _show(seen: Status, settings: Settings, expected: Outlook | None, as_json: bool) -> None:
    health = assess(seen.slot, expected) if seen.slot else None
    if as_json:
        print_json(status_document(seen, settings.schema_, expected))
        return
    for label, sentence in _lines(seen, settings, health):
        put(paint(label.ljust(_LABEL), bold=True), *([sentence] if isinstance(sentence, str) else sentence))
    _print_types(seen)
    _print_dead_letters(seen.outbox.dead_letters)


def _lines(seen: Status, settings: Settings, health: SlotHealth | None) -> Iterable[tuple[str, str | tuple[str, ...]]]:
    yield "outbox", f"{settings.schema_} in {seen.database}, at {seen.seen_at.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"
    if seen.subscription != DEFAULT:
        yield "of", f"the subscription {seen.subscription}"
    yield "consumers", _members(seen)
    if seen.observers:
        each = ", ".join(f"process {_where(member)}" for member in seen.observers)
        yield "observers", f"{len(seen.observers)}, which run and mark nothing: {each}"
    for control in (seen.paused or ())[:_PAUSES_MAX]:
        since, ends_in_s, why = format_duration(control.pause.age_s), control.pause.ends_in_s, control.pause.because
        ends = "" if ends_in_s is None else f", {format_duration(ends_in_s)} left"
        yield "paused", paint(f"{control.pause}, for {since} now{ends}, by {control.pause.set_by}: {why}", "yellow")
    if (more := len(seen.paused or ()) - _PAUSES_MAX) > 0:
        yield "", f"and {more} more: cdc controls"
    yield "pace", _pace(seen)
    if (due := seen.outbox.due_later) and due.count:
        yield "due later", str(due)
    if barrier := seen.barrier:
        held_s = format_duration(barrier.age_s)
        yield "truncate", f"{barrier.seq} of {barrier.entity_type} holds back what comes after it, for {held_s} now"
    if seen.subscriptions:
        yield "besides" if seen.subscription == DEFAULT else "progress", _subscriptions(seen.subscriptions)
    yield "slot", _slot(seen.slot, settings.slot.name)
    if health:
        yield "", paint(health.sentence, None if health.fine else "red")
    if health and health.remedy:
        yield "", health.remedy


def _members(seen: Status) -> str | tuple[str, ...]:
    if not seen.members:
        return paint("none: nothing is being handled", "red")
    owned = sum(member.shards for member in seen.members)
    shards = f"{owned} of {SHARDS} shards owned"
    each = [f"{member.shards} by process {_where(member)}" for member in seen.members[:_MEMBERS_MAX]]
    each += [f"{len(seen.members) - _MEMBERS_MAX} more"] if len(seen.members) > _MEMBERS_MAX else []
    return f"{len(seen.members)}; ", shards if owned == SHARDS else paint(shards, "yellow"), f": {', '.join(each)}"


def _subscriptions(those: list[SubscriptionProgress]) -> tuple[str, ...]:
    """The furthest behind first."""
    most = sorted(those, key=lambda each: (each.behind, each.dead, each.waiting), reverse=True)
    more = (f", and {len(those) - _SUBSCRIPTIONS_MAX} more",) if len(those) > _SUBSCRIPTIONS_MAX else ()
    each = ", ".join(_subscription(one) for one in most[:_SUBSCRIPTIONS_MAX])
    return f"{len(those)} {'subscription' if len(those) == 1 else 'subscriptions'}: {each}", *more


def _subscription(each: SubscriptionProgress) -> str:
    state = "paused" if each.paused else "" if each.consumers else "no consumer"
    left = f"{_count(each.behind, each.more)} behind, {each.waiting} waiting, {each.dead} dead"
    return f"{each.subscription.name} ({state + ', ' if state else ''}{left})"


def _where(member: Member) -> str:
    return f"{member.pid} from {member.address}" if member.address else str(member.pid)


def _pace(seen: Status) -> str:
    pace = seen.pace
    if pace is None:
        return "not known: a subscription keeps no list of what is processed; its metrics have it"
    if pace.latency_p50_s is None or pace.latency_p99_s is None:
        return "nothing processed in the last minute"
    within = f"half within {_brief(pace.latency_p50_s)}, 99 % within {_brief(pace.latency_p99_s)} of the write"
    return f"{pace.per_s:,.1f} a second processed in the last minute; {within}"


def _brief(seconds: float) -> str:
    return (
        f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s" if seconds < 10 else format_duration(seconds)
    )


def _slot(slot: SlotReport | None, name: str) -> str:
    if slot is None:
        return f"there is none named {name}: changes are found by sweeping"
    read_by = f"read by {slot.reader}" if slot.active else "read by no consumer"
    kept = f"keeps {format_bytes(slot.retained_wal_bytes)}" if slot.retained_wal_bytes is not None else "keeps nothing"
    lag = f"; {format_bytes(slot.confirmed_lag_bytes)} not confirmed" if slot.confirmed_lag_bytes is not None else ""
    return f"{slot.name} ({slot.plugin}), {read_by}; {kept} of WAL{lag}"


def _print_types(seen: Status) -> None:
    stats = seen.outbox.stats
    if not stats.types:
        put()
        put("every change is processed")
        return
    put()
    print_table(
        ["type", "fresh", "blocked", "waiting", "dead", "oldest ready"],
        (
            [each.entity_type, _count(each.fresh, stats.more_fresh), each.blocked,
             _count(each.waiting, stats.more_waiting), _count(each.dead, stats.more_dead),
             None if each.oldest_ready_age_s is None else _brief(each.oldest_ready_age_s)]
            for each in stats.types[:_TYPES_MAX]
        ),
    )  # fmt: skip
    if len(stats.types) > _TYPES_MAX:
        put(f"and {len(stats.types) - _TYPES_MAX} types more: cdc outbox stats")


def _print_dead_letters(dead_letters: list[DeadLetter]) -> None:
    """The first of the dead, then of those that wait."""
    if not dead_letters:
        return
    dead = [dead_letter for dead_letter in dead_letters if dead_letter.state == "dead"][:_DEAD_LETTERS_MAX]
    waiting = [dead_letter for dead_letter in dead_letters if dead_letter.state == "waiting"][:_DEAD_LETTERS_MAX]
    put()
    print_table(
        ["seq", "state", "type", "since, or due", "attempts", "error"],
        (
            [each.seq, each.state, each.entity_type, _whole(each.at), each.attempts, each.error]
            for each in dead + waiting
        ),
    )


def _whole(at: datetime | None) -> datetime | None:
    return at and at.replace(microsecond=0)


def _count(value: int, more: bool) -> Any:
    return f"{value}+" if more and value else value
