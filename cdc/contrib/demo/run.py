"""The demo: the documented application, a consumer with its handlers, and webhooks for it.

All measurements are made from outside: the consumer is that of ``cdc run``, observed by the hooks that any application
has.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable

import psycopg

from cdc.app import config
from cdc.app.application import App
from cdc.contrib.demo import environment, report
from cdc.contrib.demo.handlers import Messenger, make_router
from cdc.contrib.demo.temp_server import free_port
from cdc.contrib.demo.tracker import Journey, Tracker
from cdc.contrib.demo.writer import Webhook
from cdc.core.stream_reason import Reason
from cdc.observability import logs
from cdc.postgres.connect import connect, describe
from cdc.runtime import process
from cdc.runtime.deadline import deadline
from cdc.runtime.memory import resident_bytes

TICKS = 300
"""About 15 s of writing."""
BURST_ROWS = 2_000

_START_LIMIT_S = 15.0
_REFUSED_LIMIT_S = 3.0
"""A server that refuses one way of replication may allow the next one tried."""
_FINISH_LIMIT_S = 20.0
_POLL_INTERVAL_S = 0.05
_PASSING = (None, Reason.NETWORK)
"""Reasons of a stream that has not begun yet which waiting may resolve."""
_BACKOFF_S = 0.5
_PENDING = "SELECT coalesce(sum(pending), 0)::int FROM action_processing_dashboard"
_TOTALS = """
SELECT count(*), count(*) FILTER (WHERE processed), count(*) FILTER (WHERE processed AND error_count > 0),
       count(*) FILTER (WHERE NOT processed AND error_count > 0)
FROM recent_action_history
"""


def play(
    *,
    say: Callable[[str], None],
    paint: report.Paint,
    dsn: str | None = None,
    keep: bool = False,
    verbose: bool = False,
    ticks: int = TICKS,
    burst_rows: int = BURST_ROWS,
) -> bool:
    """Run the demo to its end; with ``keep``, until Ctrl-C. True: every captured change was processed.

    On the server of ``dsn``, else on a private one. ``say`` prints a line. Raises NotFoundError where there are no
    PostgreSQL server programs, RefusedError where something on the server has the demo's name.
    """
    logs.setup("info" if verbose else "critical", "text")
    with environment.private(say) if dsn is None else environment.guest(dsn, say) as where:
        stage = _Stage(where, say, paint)
        return asyncio.run(stage.perform(ticks, burst_rows, keep=keep))


class _Stage:
    """One run of the demo. Its parts share the database, the tracker and the signal to stop."""

    def __init__(self, dsn: str, say: Callable[[str], None], paint: report.Paint) -> None:
        self._dsn = dsn
        self._say = say
        self._paint = paint
        self._port = free_port()
        self._tracker = Tracker(self._arrived, self._attempt_failed)
        self._messenger = Messenger()
        self._stop = threading.Event()
        self._stopping = asyncio.Event()

    async def perform(self, ticks: int, burst_rows: int, *, keep: bool) -> bool:
        loop = asyncio.get_running_loop()
        process.hand_over(lambda _: loop.call_soon_threadsafe(self._end))
        async with self._consumer() as app:
            self._introduce(app)
            await self._write(ticks, burst_rows)
            totals = await asyncio.to_thread(self._finish)
            self._conclude(app, totals)
            if keep and not self._stopping.is_set():
                await self._stay()
        return totals.captured == totals.processed

    @contextlib.asynccontextmanager
    async def _consumer(self) -> AsyncIterator[App]:
        """A running consumer, started as ``cdc run`` would start it."""
        settings = config.from_options(
            {
                "dsn": self._dsn,
                "schema": environment.SCHEMA,
                "slot_name": environment.SLOT,
                "slot_mode": "temporary",  # the slot ends with the demo, even if it is killed
                "http_port": self._port,
                "backoff_base": _BACKOFF_S,
            }
        )
        app = App(settings, make_router(environment.SCHEMA, self._messenger, self._tracker))
        work = asyncio.create_task(app.run())
        try:
            await self._until_it_listens(app, work)
            yield app
        finally:
            app.consumer.stop()
            await work

    async def _until_it_listens(self, app: App, work: asyncio.Task[None]) -> None:
        """Wait until the slot delivers wake-ups. Where it cannot, the consumer sweeps, and the demo shows that."""
        now = asyncio.get_running_loop().time
        latest, refused = now() + _START_LIMIT_S, False
        while not (app.consumer.lifecycle.in_service and app.status.not_streaming is None):
            if work.done() or self._stopping.is_set() or now() > latest:
                return
            if not refused and app.status.not_streaming not in _PASSING:
                refused, latest = True, min(latest, now() + _REFUSED_LIMIT_S)
            with contextlib.suppress(TimeoutError):
                async with deadline(_POLL_INTERVAL_S):
                    await self._stopping.wait()

    async def _write(self, ticks: int, burst_rows: int) -> None:
        webhook = Webhook(
            self._dsn,
            self._tracker,
            ticks=ticks,
            burst_rows=burst_rows,
            burst_over=lambda burst: self._say(report.burst_line(burst, self._paint)),
            stop=self._stop,
        )
        await asyncio.to_thread(webhook.run)

    def _finish(self) -> report.Totals:
        """Wait until nothing is pending, then count."""
        limit = threading.Event()
        timer = threading.Timer(_FINISH_LIMIT_S, limit.set)
        timer.daemon = True
        timer.start()
        with connect(self._dsn, application_name="cdc demo: totals", session=environment.SESSION) as connection:
            while _one(connection, _PENDING)[0] and not limit.wait(_POLL_INTERVAL_S):
                pass
            timer.cancel()
            return report.Totals(*_one(connection, _TOTALS))

    async def _stay(self) -> None:
        self._tracker.visitors = True
        self._say("")
        self._say("The consumer stays up. Write something, and see it travel:")
        self._say(f'  psql "{describe(self._dsn)}"')
        self._say("  INSERT INTO cdc_demo.whatsapp_messages VALUES ('mine', 'help!', 'me', 'my-chat');")
        self._say("Ctrl-C ends it and removes what it has made.")
        self._say("")
        await self._stopping.wait()

    def _end(self) -> None:
        self._stop.set()
        self._stopping.set()

    # --- output ----------------------------------------------------------------------------------------------------

    def _introduce(self, app: App) -> None:
        way = f"woken by the slot {environment.SLOT}"
        if reason := app.status.not_streaming:
            way = f"no wake-ups from a slot ({reason}), so it sweeps"
        self._say(f"A consumer is at work, {way}. Metrics: {self._url}")
        self._say("An application now writes 20 rows a second. One in 14 is shown, in ms after the row was sent:")
        self._say("")
        self._say(self._paint(report.HEADER, bold=True))

    def _conclude(self, app: App, totals: report.Totals) -> None:
        self._say("")
        resident = resident_bytes()
        for text in report.summary(totals, self._tracker.ended, app.status.wakeups, resident, self._paint):
            self._say(text)
        self._say("")
        self._say(f"  messages   {len(self._messenger.sent):,} for the messenger: answers, and notices of new tasks")
        self._say(f"  metrics    {self._url} (until the demo ends)")

    @property
    def _url(self) -> str:
        return f"http://127.0.0.1:{self._port}/metrics"

    def _arrived(self, journey: Journey) -> None:
        if journey.shown:
            self._say(report.line(journey, self._paint))

    def _attempt_failed(self, journey: Journey, error: BaseException) -> None:
        if journey.shown:
            self._say(report.failure(journey, error, self._paint))


def _one(connection: psycopg.Connection, query: str) -> tuple[int, ...]:
    row = connection.execute(query.encode()).fetchone()
    assert row is not None
    return tuple(row)
