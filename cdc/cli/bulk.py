"""Which changes a command is about, where they are many, and what it says while it decides about them."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from cdc.app.config import Resolved
from cdc.cli.output import print_json, say
from cdc.cli.wanted import named_router
from cdc.core.errors import UsageError
from cdc.core.units import parse_moment

if TYPE_CHECKING:
    from cdc.postgres.bulk import Round, Wanted

_PROGRESS_EVERY_S = 1.0

_FILTERS = (
    click.option("--type", "entity_type", metavar="TYPE", help="Of this entity type only."),
    click.option("--key", "entity_id", metavar="ENTITY_ID", help="Of this entity only."),
    click.option(
        "--handler", metavar="NAME", help="Only what this handler gets. --handlers says where the handlers are."
    ),
    click.option(
        "--error", metavar="CLASS", help="Only what failed with this class or kind (timeout, validation, rejected ...)."
    ),
    click.option(
        "--since",
        metavar="TIME",
        help="Changed at this time or later: 2026-01-31T18:00Z (UTC without a zone), or 2h ago.",
    ),
    click.option("--until", metavar="TIME", help="Changed before this time, written in the same way."),
    click.option("--all", "everything", is_flag=True, help="Without any of these, all of them."),
    click.option("--dry-run", is_flag=True, help="Count them, and change nothing."),
)


@dataclass(frozen=True, slots=True)
class FilterOptions:
    """The filters as they were given; ``dry_run``: nothing is to be changed."""

    entity_type: str | None
    entity_id: str | None
    handler: str | None
    error: str | None
    since: str | None
    until: str | None
    everything: bool
    dry_run: bool

    @property
    def named(self) -> list[str]:
        """The filters that narrow, as they would be written."""
        given = {"--type": self.entity_type, "--key": self.entity_id, "--handler": self.handler, "--error": self.error,
                 "--since": self.since, "--until": self.until}  # fmt: skip
        return [f"{option} {value}" for option, value in given.items() if value is not None]

    @property
    def many(self) -> bool:
        """Whether changes are described, and not named."""
        return bool(self.named) or self.everything

    def wanted(self, resolved: Resolved) -> Wanted:
        """Raises UsageError for a time that is none, and for a handler that nobody knows."""
        from cdc.postgres.bulk import Wanted  # noqa: PLC0415 - --help does not wait for the driver to load

        return Wanted(
            entity_type=self.entity_type,
            entity_id=self.entity_id,
            error=self.error,
            since=parse_moment(self.since) if self.since is not None else None,
            until=parse_moment(self.until) if self.until is not None else None,
            handled=named_router(resolved).handled_by(self.handler) if self.handler is not None else None,
            handler=self.handler,
        )


def filter_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of ``FilterOptions``; the command gets ``filters: FilterOptions``."""

    @functools.wraps(command)
    def packed(*args: Any, **options: Any) -> Any:
        filters = FilterOptions(**{name: options.pop(name) for name in FilterOptions.__dataclass_fields__})
        return command(*args, filters=filters, **options)

    with_options: Callable[..., Any] = packed
    for option in reversed(_FILTERS):
        with_options = option(with_options)
    return with_options


def refuse_unless_clear(filters: FilterOptions, names: tuple[str, ...], state: str | None = None) -> None:
    """Raises UsageError unless changes are either named or described. ``state`` is for those described."""
    if names and filters.many:
        raise UsageError("which changes?", hint="give their IDs, or filters such as --type, not both")
    if names and (filters.dry_run or state):
        raise UsageError(
            "which changes?", hint="--dry-run and --state are for filters; cdc outbox show ID shows one change"
        )
    if not names and not filters.many:
        raise UsageError("which changes?", hint="give their IDs, or filters such as --type, or --all")


def described(filters: FilterOptions) -> str:
    """The filters, for a sentence about what they find."""
    return f" with {', '.join(filters.named)}" if filters.named else ""


def work_off(rounds: Iterable[Round], *, count: int, done: str) -> Round:
    """Go through the rounds, and say now and then how far it is to whoever waits; returns their sum."""
    from cdc.postgres.bulk import Round  # noqa: PLC0415 - see FilterOptions.wanted

    looked_at = 0

    def each_done() -> Iterator[int]:
        nonlocal looked_at
        for each in rounds:
            looked_at += each.looked_at
            yield each.done

    total = add_up(each_done(), lambda so_far: f"{done} {so_far:,} of {count:,} so far")
    return Round(looked_at, total)


def add_up(counts: Iterable[int], text: Callable[[int], str]) -> int:
    """The sum, which the text says now and then to whoever waits."""
    total, said_at = 0, time.monotonic()
    for count in counts:
        total += count
        if time.monotonic() - said_at > _PROGRESS_EVERY_S:
            said_at = time.monotonic()
            say(text(total))
    return total


def report_count(what: str, count: int, as_json: bool) -> None:
    """Of a dry run."""
    if as_json:
        print_json({"matching": count})
    else:
        say(f"{what}: {count:,}; nothing was changed")


def report_done(done: str, what: str, total: Round, as_json: bool) -> None:
    """``left``: what was no longer in that state, or was locked by somebody else."""
    left = total.looked_at - total.done
    if as_json:
        print_json({done: total.done, "left": left})
        return
    say(f"{what} that are {done}: {total.done:,}")
    if left:
        say(f"left as they are, since somebody else has decided about them or is at work on them: {left:,}")
