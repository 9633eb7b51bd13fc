"""cdc backfill: the rows that a tracked table has already, as changes of the operation READ."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

from cdc.app.config import Settings
from cdc.app.documents import backfill_document, backfill_state
from cdc.cli.acting import actor
from cdc.cli.commands import Commands
from cdc.cli.options import database_options, json_option, open_database, settings_options
from cdc.cli.output import print_json, print_table, say, show_progress
from cdc.cli.track import split_names
from cdc.core.subscription import DEFAULT
from cdc.core.units import format_duration

if TYPE_CHECKING:
    from cdc.postgres.backfill import Backfill, Backfills, Progress

_SAY_EVERY_S = 5.0
_DRAW_EVERY_S = 0.2
_BAR = 24
_WAITS_LONG_S = 10.0
_WAITS_S = 1.0
"""From then on no time is left: a backlog that is handled is waited for, for shorter, again and again."""
_RATE_S = 30.0
"""The rate is that of the last so many seconds."""
_BACKLOG_MAX = 100_000


class _Backfill(Commands):
    """``cdc backfill TABLE`` stands for ``cdc backfill start TABLE``."""

    default = "start"

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = [self.default, *args]
        return super().parse_args(ctx, args)


@click.group(cls=_Backfill)
def backfill() -> None:
    """Have the rows handled that were there before a table was tracked, or before a handler was.

    Each becomes a change with the operation READ. "cdc backfill TABLE" is short for "cdc backfill start TABLE".
    """


def _key(_ctx: click.Context, option: click.Parameter, value: str | None) -> list[str] | None:
    """``5`` or ``a,5``: a value for each column of the key, one with a comma in double quotes."""
    if value is None:
        return None
    if not (values := list(split_names(option, value))):
        raise click.BadParameter("it names no key")
    return values


_where_option = click.option("--where", "condition", metavar="SQL", help="Only the rows that meet this condition.")


def _rate(_ctx: click.Context, _option: click.Parameter, value: str | None) -> float | None:
    """``500`` or ``500/s``."""
    if value is None:
        return None
    try:
        rate = float(value.removesuffix("/s"))
    except ValueError:
        rate = 0.0
    if not 0 < rate < float("inf"):
        raise click.BadParameter(f"{value!r}; expected rows a second, such as 500/s")
    return rate


_rate_option = click.option("--rate", metavar="N/s", callback=_rate, help="At most so many rows a second.")
_backlog_option = click.option(
    "--backlog",
    type=click.IntRange(1, _BACKLOG_MAX),
    metavar="N",
    help="Wait while so many of its rows are not handled yet [100].",
)


@backfill.command()
@click.argument("table")
@settings_options("dsn", "schema", "subscription")
@_where_option
@click.option("--since", metavar="KEY", callback=_key, help="Begin at this primary key. Several columns: a,b.")
@_rate_option
@_backlog_option
@json_option
def start(
    *,
    settings: Settings,
    table: str,
    condition: str | None,
    since: list[str] | None,
    rate: float | None,
    backlog: int | None,
    as_json: bool,
) -> None:
    """Read the rows of TABLE, which must be tracked, and write a change for each.

    \b
        cdc backfill orders
        cdc backfill orders --where "status = 'open'" --rate 500/s

    Rows come in the order of the primary key, as they are when they are read, and in order with what is written to them
    meanwhile. It stays in the foreground, and waits for the consumer. Interrupted, also by kill -9, it goes on with
    "cdc backfill resume". Rows that are inserted later are not read: they are captured.

    With --subscription: for that one alone. No other one sees the rows, and its consumer is waited for.
    """
    from cdc.postgres.backfill import BACKLOG, Backfills  # noqa: PLC0415 - --help does not wait for the driver to load
    from cdc.postgres.subscriptions import Subscriptions  # noqa: PLC0415 - the same

    backfills = Backfills(settings.schema_, actor())
    with open_database(settings, user_path=True) as connection:
        only = None
        if settings.subscription != DEFAULT:
            only = Subscriptions(settings.schema_).named(connection, settings.subscription)
        begun = backfills.start(
            connection,
            table,
            condition=condition,
            since=since,
            rate=rate,
            backlog=backlog or BACKLOG,
            subscription=only,
        )
        say(f"backfill {begun.id} of {begun.of}: about {begun.estimate:,} rows; if it is interrupted:"
            f" cdc backfill resume {begun.id}")  # fmt: skip
        _work(backfills, connection, begun, condition, as_json=as_json)


@backfill.command()
@click.argument("reference", metavar="ID|TABLE")
@database_options
@_where_option
@_rate_option
@_backlog_option
@json_option
def resume(
    *,
    settings: Settings,
    reference: str,
    condition: str | None,
    rate: float | None,
    backlog: int | None,
    as_json: bool,
) -> None:
    """Go on with a backfill that was paused or interrupted, at another pace if that is given.

    A condition that another role has given is run only if --where repeats it: it would have your rights.
    """
    from cdc.postgres.backfill import Backfills  # noqa: PLC0415 - see start

    backfills = Backfills(settings.schema_, actor())
    with open_database(settings, user_path=True) as connection:
        found = backfills.named(connection, reference)
        found = backfills.resume(connection, found, condition=condition, rate=rate, backlog=backlog)
        _work(backfills, connection, found, condition, as_json=as_json)


@backfill.command()
@click.argument("reference", metavar="ID|TABLE")
@database_options
def pause(settings: Settings, reference: str) -> None:
    """Stop a backfill after its page, wherever it runs, until it is resumed."""
    from cdc.postgres.backfill import Backfills  # noqa: PLC0415 - see start

    backfills = Backfills(settings.schema_, actor())
    with open_database(settings, user_path=True) as connection:
        found = backfills.named(connection, reference)
        backfills.set_state(connection, found, "paused", ["running"])
    say(f"backfill {found.id} of {found.of} is paused; to go on: cdc backfill resume {found.id}")


@backfill.command()
@click.argument("reference", metavar="ID|TABLE")
@database_options
def cancel(settings: Settings, reference: str) -> None:
    """End a backfill for good, wherever it runs. What it has written is handled."""
    from cdc.postgres.backfill import UNFINISHED, Backfills  # noqa: PLC0415 - see start

    backfills = Backfills(settings.schema_, actor())
    with open_database(settings, user_path=True) as connection:
        found = backfills.named(connection, reference)
        backfills.set_state(connection, found, "cancelled", UNFINISHED)
    say(f"backfill {found.id} of {found.of} is cancelled")


@backfill.command()
@click.argument("reference", metavar="[ID|TABLE]", required=False)
@database_options
@json_option
def status(settings: Settings, reference: str | None, as_json: bool) -> None:
    """List the last hundred backfills, or show one."""
    from cdc.postgres.backfill import Backfills  # noqa: PLC0415 - see start

    backfills = Backfills(settings.schema_)
    with open_database(settings, user_path=True) as connection:
        found = backfills.newest(connection) if reference is None else [backfills.named(connection, reference)]
    if as_json:
        print_json({"backfills": [backfill_document(each) for each in found]})
        return
    headers = ["id", "table", "for", "state", "examined", "of about", "written", "since", "where", "by", "started_at"]
    print_table(headers, (
        (each.id, each.table, each.subscription_name or "all", backfill_state(each), each.examined, each.estimate,
         each.written, _shown(each.since_key), each.condition or "", each.started_by, each.started_at)
        for each in found
    ))  # fmt: skip


def _work(backfills: Backfills, connection: Any, begun: Backfill, condition: str | None, *, as_json: bool) -> None:
    """Raises KeyboardInterrupt as it comes: what is committed stays, and the rest is resumed."""
    _watch(begun, backfills.work(connection, begun, condition=condition))
    done = backfills.named(connection, str(begun.id))
    if as_json:
        print_json(backfill_document(done))
    else:
        say(
            f"backfill {done.id} of {done.of} is {backfill_state(done)}:"
            f" {done.examined:,} rows read, {done.written:,} written"
        )


def _watch(begun: Backfill, steps: Iterable[Progress]) -> None:
    """Take the steps, wait between them, and say how far it is."""
    said_at, pause = time.monotonic(), threading.Event()
    watch = Watch(begun.table, begun.estimate, begun.examined, said_at)
    for progress in steps:
        now = time.monotonic()
        warning = watch.take(progress, now)
        if now - said_at > (_DRAW_EVERY_S if sys.stderr.isatty() else _SAY_EVERY_S):
            said_at = now
            show_progress(watch.line(now))
        if warning:
            say(warning)
        if progress.waits is not None:
            pause.wait(progress.waits.seconds)
    show_progress("")


class Watch:
    """What is said of a backfill on its way. Pure: time, in seconds, is an argument. ``estimate``: of all its rows."""

    def __init__(self, table: str, estimate: int, examined: int, now: float) -> None:
        self._table = table
        self._estimate = estimate
        self._examined = examined
        self._stuck_since: float | None = None
        self._reported = set[bool]()
        self._samples = deque([(now, examined)])
        """Moment and rows examined, a second apart."""

    def take(self, step: Progress, now: float) -> str | None:
        """Returns what is to be said of a long wait, once for each cause."""
        self._examined = step.examined
        if now - self._samples[-1][0] >= 1:
            self._samples.append((now, step.examined))
        while len(self._samples) > 1 and now - self._samples[1][0] >= _RATE_S:
            self._samples.popleft()
        waits = step.waits
        if waits is None or not (waits.backlog or waits.locked):
            self._stuck_since = None
            return None
        if self._stuck_since is None:
            self._stuck_since = now
        if now - self._stuck_since < _WAITS_LONG_S or waits.locked in self._reported:
            return None
        self._reported.add(waits.locked)
        if waits.locked:
            return (
                f"waits: rows of {self._table} are locked by another session, see pg_locks and pg_stat_activity;"
                " it goes on by itself when they are free"
            )
        return f"waits: {step.unsettled:,} of its rows are not handled yet; is a consumer running that handles them?"

    def line(self, now: float) -> str:
        """``[#####.....] 41% 410,000 of about 1,000,000, 5,012 a second, 2 min left``."""
        total = max(self._estimate, self._examined, 1)
        since, examined = self._samples[0]
        per_s = (self._examined - examined) / (now - since) if now > since else 0.0
        waits = self._stuck_since is not None and now - self._stuck_since >= _WAITS_S
        left = f", {format_duration((total - self._examined) / per_s)} left" if per_s and not waits else ""
        filled = _BAR * self._examined // total
        return (
            f"[{'#' * filled}{'.' * (_BAR - filled)}] {100 * self._examined // total}%"
            f" {self._examined:,} of about {total:,}, {per_s:,.0f} a second{left}"
        )


def _shown(key: list[str] | None) -> str:
    return ",".join(key) if key else ""
