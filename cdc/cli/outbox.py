"""cdc outbox: what is in it, and what an operator decides about it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from cdc.app.config import Resolved, Settings
from cdc.app.documents import change_document
from cdc.cli.acting import actor, because_option
from cdc.cli.bulk import (
    FilterOptions,
    described,
    filter_options,
    refuse_unless_clear,
    report_count,
    report_done,
    work_off,
)
from cdc.cli.commands import Commands
from cdc.cli.options import json_option, open_database, resolved_options, settings_options, yes_option
from cdc.cli.outbox_prune import prune
from cdc.cli.output import confirm, print_json, print_table, put, say
from cdc.cli.wanted import WANTED_SETTINGS, handled_types
from cdc.core.errors import CdcError, UsageError
from cdc.core.fast_change import Json
from cdc.core.model import ChangeState
from cdc.core.subscription import DEFAULT
from cdc.core.units import parse_duration, parse_moment

if TYPE_CHECKING:
    from cdc.core.type_filter import TypeFilter
    from cdc.postgres.actions import Actor
    from cdc.postgres.admin import Attempt, CauseLink, ChangeSummary, Decision, OutboxAdmin, SearchResult, Stats
    from cdc.postgres.connect import Connection

_STATES = ("fresh", "blocked", "waiting", "dead", "processed")
_LISTED = (
    "seq",
    "state",
    "entity_type",
    "entity_id",
    "operation",
    "changed_at",
    "attempts",
    "blocked_by",
    "last_error",
)
_LINE_LENGTH = 60
"""Of an error in a table; ``show`` and --json have all of it."""

type_option = click.option("--type", "entity_type", metavar="TYPE", help="Of this entity type only.")
names_argument = click.argument("names", metavar="ID...", nargs=-1)
state_option = click.option(
    "--state", type=click.Choice(("dead", "waiting")), help="What filters find: dead letters, or what waits. [dead]"
)
_NAMED = {ChangeState.DEAD: "dead letters", ChangeState.WAITING: "waiting changes"}


@click.group(cls=Commands)
def outbox() -> None:
    """Look at changes, decide about dead letters, remove old ones.

    A change is named by its seq or by its id. What is listed and decided is that of the default subscription, unless
    --subscription names another one.
    """


@outbox.command()
@resolved_options("dsn", "schema", "subscription", *WANTED_SETTINGS)
@json_option
def stats(resolved: Resolved, as_json: bool) -> None:
    """Count by entity type what is not processed.

    Fresh changes include the blocked ones, which an earlier change of their key holds back. A + means more than were
    looked at. Ages in seconds. Events that are due later are not changes yet, and are counted apart. With the settings
    of the consumer, or --handlers, it names the types that wait because no handler wants them.
    """
    from cdc.postgres.due import DueChanges  # noqa: PLC0415 - --help does not wait for the driver to load

    settings, scope = resolved.settings, _scope(resolved)
    with _opened(settings) as connection:
        found = _admin(connection, settings).stats(connection)
        due = DueChanges(settings.schema_).count(connection)
    unhandled = scope and [each.entity_type for each in found.types if each.fresh and not scope.has(each.entity_type)]
    if as_json:
        figures = {**asdict(found), "unhandled": unhandled, "due_later": due and asdict(due)}
        print_json({"schema_name": settings.schema_, **figures})
        return
    _print_stats(found)
    if due and due.count:
        say(f"due later: {due}")
    if unhandled:
        say(f"no handler wants: {', '.join(unhandled)}")


def _scope(resolved: Resolved) -> TypeFilter | None:
    """None: nobody knows. What is wrong with the handlers must not hide the figures."""
    try:
        asked = handled_types(resolved)
    except CdcError as error:
        say(f"Warning: the handlers cannot be loaded, so what they want is not known: {error}")
        return None
    return asked.scope if asked else None


@outbox.command("list")
@settings_options("dsn", "schema", "subscription")
@click.option("--state", type=click.Choice(_STATES), help="Of this state only [dead, then waiting].")
@type_option
@click.option("--key", "entity_id", metavar="ENTITY_ID", help="Of this entity only.")
@click.option("--since", metavar="AGE", help="Changed within the last 30d, 12h, 90m.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True, help="Changes of a state.")
@json_option
def list_(
    *,
    settings: Settings,
    state: str | None,
    entity_type: str | None,
    entity_id: str | None,
    since: str | None,
    limit: int,
    as_json: bool,
) -> None:
    """List changes, without their payload.

    Fresh and blocked ones the oldest first, waiting ones as they are due, dead and processed ones the youngest first.
    """
    from cdc.postgres.admin import Filter  # noqa: PLC0415 - see stats

    asked = Filter(entity_type, entity_id, parse_duration(since) if since else None)
    with _opened(settings) as connection:
        admin = _admin(connection, settings)
        found = [admin.find(connection, each, asked, limit) for each in ([state] if state else ["dead", "waiting"])]
    entries = [entry for each in found for entry in each.entries]
    if as_json:
        complete = not any(each.more or each.cut for each in found)
        print_json({"changes": [change_document(entry) for entry in entries], "complete": complete})
    else:
        print_table(_LISTED, (_row(entry) for entry in entries))
        _say_what_is_missing(found, limit)


@outbox.command()
@settings_options("dsn", "schema", "subscription")
@click.argument("name", metavar="ID")
@click.option("--show-payload", is_flag=True, help="Also old, new and metadata: the application's data.")
@json_option
def show(*, settings: Settings, name: str, show_payload: bool, as_json: bool) -> None:
    """Show all about one change, its failed attempts, and the changes that led to it."""
    from cdc.postgres.admin import parse_reference  # noqa: PLC0415 - see stats

    reference = parse_reference(name)
    with _opened(settings) as connection:
        admin = _admin(connection, settings)
        entry = admin.show(connection, reference)
        chain = admin.chain(connection, entry)
        attempts = admin.attempts(connection, entry)
        fields = change_document(entry) | (admin.payload(connection, entry) if show_payload else {})
    if as_json:
        others = {"chain": [asdict(link) for link in chain], "attempts": [asdict(each) for each in attempts]}
        print_json({"change": fields | others})
    else:
        rows = [line for name, value in fields.items() if name != "seq" for line in _lines(name, value)]
        print_table(["", str(entry.seq)], rows)
        _print_attempts(attempts)
        _print_chain(chain)


@outbox.command()
@resolved_options("dsn", "schema", "subscription", "handlers")
@names_argument
@filter_options
@state_option
@because_option
@yes_option
@json_option
def retry(
    *,
    resolved: Resolved,
    names: tuple[str, ...],
    filters: FilterOptions,
    state: str | None,
    because: str | None,
    yes: bool,
    as_json: bool,
) -> None:
    """Try changes again now that wait or are dead.

    A dead letter gets its attempts again. They run before the later changes of their key that have not run yet. By
    filters, dead letters only, unless --state says otherwise: it says how many before it begins, and works in rounds of
    some thousand. It may be stopped and given again at any time.
    """
    _decide(resolved, names, filters, "retry", who=actor(because), state=state, yes=yes, as_json=as_json)


@outbox.command()
@resolved_options("dsn", "schema", "subscription", "handlers")
@names_argument
@filter_options
@state_option
@click.option(
    "--before", metavar="TIME", help="Every fresh change of --type from before, such as 2026-01-31T18:00Z, now."
)
@because_option
@yes_option
@json_option
def discard(
    *,
    resolved: Resolved,
    names: tuple[str, ...],
    filters: FilterOptions,
    state: str | None,
    before: str | None,
    because: str | None,
    yes: bool,
    as_json: bool,
) -> None:
    """Mark changes processed that wait or are dead: nothing is to be done about them.

    Later changes of their keys go on. By filters, dead letters only, unless --state says otherwise: it says how many
    before it begins, and works in rounds of some thousand. It may be stopped and given again at any time.

    With --type and --before: fresh ones that were handled elsewhere. No consumer may be handling the type then.
    """
    if before is not None:
        who = actor(because)
        _discard_before(resolved.settings, names, filters, before, who=who, state=state, yes=yes, as_json=as_json)
        return
    _decide(resolved, names, filters, "discard", who=actor(because), state=state, yes=yes, as_json=as_json)


def _decide(
    resolved: Resolved,
    names: tuple[str, ...],
    filters: FilterOptions,
    decision: Decision,
    *,
    who: Actor,
    state: str | None,
    yes: bool,
    as_json: bool,
) -> None:
    refuse_unless_clear(filters, names, state)
    if filters.many:
        _decide_many(resolved, filters, decision, who=who, state=state, yes=yes, as_json=as_json)
        return
    from cdc.postgres.admin import parse_reference  # noqa: PLC0415 - see stats

    references = [parse_reference(name) for name in names]
    with _opened(resolved.settings) as connection:
        admin = _admin(connection, resolved.settings, who)
        decide, done = {
            "retry": (admin.retry, "will be tried now"),
            "discard": (admin.discard, "is discarded"),
        }[decision]
        entries = decide(connection, references)
    _report(done, entries, as_json)


def _decide_many(
    resolved: Resolved,
    filters: FilterOptions,
    decision: Decision,
    *,
    who: Actor,
    state: str | None,
    yes: bool,
    as_json: bool,
) -> None:
    from cdc.postgres.bulk import Bulk  # noqa: PLC0415 - see stats

    done = {"retry": "retried", "discard": "discarded"}[decision]
    wanted, settings = filters.wanted(resolved), resolved.settings
    chosen = ChangeState(state or ChangeState.DEAD)
    what = f"{_NAMED[chosen]}{described(filters)}"
    with _opened(settings) as connection:
        bulk = Bulk(settings.schema_, _admin(connection, settings, who))
        with bulk.selected(connection, chosen, wanted) as selection:
            if filters.dry_run:
                report_count(what, selection.count, as_json)
                return
            if selection.count:
                confirm(f"{decision} {selection.count:,} {what}", yes)
            total = work_off(selection.decide(decision), count=selection.count, done=done)
    report_done(done, what, total, as_json)


@outbox.command()
@resolved_options("dsn", "schema", "subscription", "handlers")
@names_argument
@filter_options
@click.option("--latest-per-key", is_flag=True, help="Of the changes of each key only the last that is found.")
@click.option(
    "--unless-replayed-since",
    metavar="TIME",
    help="Without those that were replayed at this time or later: to go on after an interruption.",
)
@because_option
@yes_option
@json_option
def replay(
    *,
    resolved: Resolved,
    names: tuple[str, ...],
    filters: FilterOptions,
    latest_per_key: bool,
    unless_replayed_since: str | None,
    because: str | None,
    yes: bool,
    as_json: bool,
) -> None:
    """Have processed changes handled once more.

    Each is written again as a new change that names the old one (replay_of), in the order of the old ones and behind
    whatever of its key is not processed yet. The old ones stay as they are. It says how many before it begins, and
    works in rounds of a thousand. Filters find no replays, but the changes that these repeat.

    With --subscription: what that one has processed or passed, for it alone. No other one sees the new changes.
    """
    refuse_unless_clear(filters, names)
    if names and (latest_per_key or unless_replayed_since is not None):
        raise UsageError("which changes?", hint="--latest-per-key and --unless-replayed-since are for filters")
    from cdc.postgres.admin import parse_reference  # noqa: PLC0415 - see stats
    from cdc.postgres.bulk import Bulk  # noqa: PLC0415 - see stats

    settings, what, who = resolved.settings, f"processed changes{described(filters)}", actor(because)
    if names:
        references = [parse_reference(name) for name in names]
        with _opened(settings) as connection:
            bulk = Bulk(settings.schema_, _admin(connection, settings, who))
            total = work_off(bulk.replay_named(connection, references), count=len(names), done="replayed")
        report_done("replayed", what, total, as_json)
        return
    wanted = filters.wanted(resolved)
    unless_since = parse_moment(unless_replayed_since) if unless_replayed_since is not None else None
    with (
        _opened(settings) as connection,
        Bulk(settings.schema_, _admin(connection, settings, who)).replayable(
            connection, wanted, latest_per_key=latest_per_key, unless_since=unless_since, only_count=filters.dry_run
        ) as found,
    ):
        if filters.dry_run:
            report_count(what, found.count, as_json)
            return
        if found.count:
            confirm(f"replay {found.count:,} {what}", yes)
            moments = {"--since": found.since, "--until": found.until, "--unless-replayed-since": found.unless_since}
            written = " ".join(f"{option} {moment.isoformat()}" for option, moment in moments.items() if moment)
            say(f"if it is interrupted, give it again with {written}")
        total = work_off(found.rounds(), count=found.count, done="replayed")
    report_done("replayed", what, total, as_json)


def _discard_before(
    settings: Settings,
    names: tuple[str, ...],
    filters: FilterOptions,
    before: str,
    *,
    who: Actor,
    state: str | None,
    yes: bool,
    as_json: bool,
) -> None:
    if filters.entity_type is None or names or state or filters.dry_run or filters.everything or len(filters.named) > 1:
        raise UsageError("which changes?", hint="with --before there is a --type, and no other filter")
    confirm(f"mark every fresh change of {filters.entity_type} from before {before} processed", yes)
    with _opened(settings) as connection:
        admin = _admin(connection, settings, who)
        count = sum(admin.discard_before(connection, filters.entity_type, before))
    if as_json:
        print_json({"discarded": count})
    else:
        say(f"fresh changes that are discarded: {count:,}")


outbox.add_command(prune)


def _admin(connection: Connection, settings: Settings, who: Actor | None = None) -> OutboxAdmin:
    """Of the subscription that the settings name. Raises NotFoundError where there is none of that name."""
    from cdc.postgres.admin import OutboxAdmin  # noqa: PLC0415 - see stats
    from cdc.postgres.subscription_admin import SubscriptionAdmin  # noqa: PLC0415 - see stats
    from cdc.postgres.subscriptions import Subscriptions  # noqa: PLC0415 - see stats

    if settings.subscription == DEFAULT:
        return OutboxAdmin(settings.schema_, who)
    found = Subscriptions(settings.schema_).named(connection, settings.subscription)
    return SubscriptionAdmin(settings.schema_, found, who)


@contextmanager
def _opened(settings: Settings) -> Iterator[Connection]:
    """Also for what a consumer cannot read: that is what an operator comes for."""
    from cdc.postgres.loaders import read_anything  # noqa: PLC0415 - see stats

    with open_database(settings) as connection:
        read_anything(connection)
        yield connection


def _print_attempts(attempts: Sequence[Attempt]) -> None:
    """Each with the frames of its error below it."""
    if not attempts:
        return
    put()
    rows: list[Sequence[Any]] = []
    for each in attempts:
        took = each.started_at and f"{(each.ended_at - each.started_at).total_seconds():.3f} s"
        text, *_ = each.text.split("\n", 1)
        rows.append((each.attempt, each.ended_at, took, each.handler, each.outcome, text))
        rows += [("", "", "", "", "", f"  {frame}") for frame in each.frames]
    print_table(["attempt", "ended_at", "took", "handler", "outcome", "error"], rows)


def _print_chain(chain: Sequence[CauseLink]) -> None:
    """Each cause a little further to the right, below what it caused; so is what a replay repeats."""
    if not chain or chain[0].before is None:
        return
    put()
    rows = [(link.seq, link.state, link.changed_at, "  " * level + _link(link)) for level, link in enumerate(chain)]
    print_table(["seq", "state", "changed_at", "caused by the one below"], rows)
    if chain[-1].before is not None:
        say(f"what caused the last one is not shown: it was removed, or this is more than {len(chain)} changes deep")


def _link(link: CauseLink) -> str:
    named = f"{link.entity_type} {link.entity_id} {link.operation}"
    return f"{named} (a replay of the one below)" if link.replay_of else named


def _print_stats(found: Stats) -> None:
    more = {"fresh": found.more_fresh, "blocked": found.more_fresh, "blocked_keys": found.more_fresh,
            "waiting": found.more_waiting, "dead": found.more_dead}  # fmt: skip
    rows = [asdict(each) for each in found.types]
    columns = ["entity_type", "fresh", "blocked", "waiting", "dead", "blocked_keys", "oldest_ready_age_s",
               "oldest_blocked_age_s"]  # fmt: skip
    print_table(columns, ([_figure(row[name], more.get(name, False)) for name in columns] for row in rows))
    if not rows:
        say("every change is processed")


def _figure(value: Any, more: bool) -> Any:
    if isinstance(value, float):
        return round(value)
    return f"{value}+" if more and value else value


def _lines(name: str, value: Any) -> list[tuple[str, Any]]:
    """The rows of a field: an error has its frames below it, a line each."""
    if name != "last_error" or value is None:
        return [(name, _text(value))]
    first, *others = value.split("\n")
    return [(name, first), *(("", line) for line in others)]


def _text(value: Any) -> Any:
    """A payload as the JSON it is."""
    return value.decode() if isinstance(value, Json) else value


def _row(entry: ChangeSummary) -> list[Any]:
    error = (entry.last_error or "").split("\n", 1)[0]
    shown = {
        **asdict(entry),
        "state": "blocked" if entry.blocked else entry.state,
        "attempts": entry.error_count,
        "last_error": (error if len(error) <= _LINE_LENGTH else f"{error[: _LINE_LENGTH - 1]}…") or None,
    }
    return [shown[name] for name in _LISTED]


def _say_what_is_missing(found: Iterable[SearchResult], limit: int) -> None:
    if any(each.more for each in found):
        say(f"there are more: these are {limit} of a state (--limit)")
    if any(each.cut for each in found):
        say("there may be more: there are so many changes that not all were looked at")


def _report(what: str, entries: list[ChangeSummary], as_json: bool) -> None:
    if as_json:
        print_json({"changes": [change_document(entry) for entry in entries]})
        return
    for entry in entries:
        say(f"{entry.seq} ({entry.entity_type} {entry.entity_id!r}) {what}")
