"""The demo: a throw-away server, the document's tables, a consumer, and an application that writes.

Everything that is measured is measured from outside: the consumer is the one of ``cdc run``, unchanged, and has no
code for being watched.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from importlib.resources import files

import psycopg

from cdc import config, logs, schema
from cdc.app import App
from cdc.connect import connect, connect_async
from cdc.demo import report
from cdc.demo.handlers import make_router
from cdc.demo.journal import Journal, Journey
from cdc.demo.webhook import Webhook
from cdc.metrics import SOURCES
from cdc.model import WakeUp
from cdc.throwaway import Server, free_port

TICKS = 300
"""About 15 s of writing."""
BURST_ROWS = 2_000

_SLOT = "cdc_demo"
_START_LIMIT_S = 15.0
_FINISH_LIMIT_S = 20.0
_LOOK_EVERY_S = 0.05
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
    keep: bool = False,
    verbose: bool = False,
    ticks: int = TICKS,
    burst_rows: int = BURST_ROWS,
) -> bool:
    """Run the demo to its end; with ``keep``, until Ctrl-C. True: every captured change was processed.

    ``say`` prints a line. Raises NotFoundError where this machine has no PostgreSQL server programs.
    """
    logs.setup("info" if verbose else "critical", "text")
    say("Starting a private PostgreSQL server; nothing else on this machine is touched ...")
    with Server() as server:
        stage = _Stage(server, say, paint)
        stage.prepare()
        return asyncio.run(stage.perform(ticks, burst_rows, keep=keep))


class _Stage:
    """One performance. Its parts share the server, the journal and the word to stop."""

    def __init__(self, server: Server, say: Callable[[str], None], paint: report.Paint) -> None:
        self._server = server
        self._dsn = server.dsn()
        self._say = say
        self._paint = paint
        self._port = free_port()
        self._journal = Journal(self._arrived, self._stumbled)
        self._stop = threading.Event()
        self._stopping = asyncio.Event()

    def prepare(self) -> None:
        """The outbox, the application's tables, the documented triggers."""
        with connect(self._dsn, application_name="cdc demo: set-up") as connection:
            schema.install(connection, "public")
            connection.execute(files("cdc.demo").joinpath("tables.sql").read_bytes())

    async def perform(self, ticks: int, burst_rows: int, *, keep: bool) -> bool:
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._end)
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
        """A consumer at work, as ``cdc run`` would start it."""
        settings = config.from_options(
            {"dsn": self._dsn, "slot_name": _SLOT, "http_port": self._port, "backoff_base": _BACKOFF_S}
        )
        async with await connect_async(self._dsn, application_name="cdc demo: actions") as actions:
            app = App(settings, make_router(actions, self._journal))
            self._overhear(app)
            work = asyncio.create_task(app.run())
            try:
                await self._until_it_listens(app, work)
                yield app
            finally:
                app.consumer.stop()
                await work

    def _overhear(self, app: App) -> None:
        rang = app.consumer.rang

        def overheard(wakeups: Sequence[WakeUp]) -> Sequence[WakeUp]:
            self._journal.rang(wakeups)
            return rang(wakeups)

        # The one place where the demo reaches in: which wake-up was for which change, only the consumer hears.
        app.consumer.rang = overheard  # type: ignore[method-assign]

    async def _until_it_listens(self, app: App, work: asyncio.Task[None]) -> None:
        """Until the slot rings. Where it cannot, the consumer sweeps, and the demo shows that."""
        deadline = asyncio.get_running_loop().time() + _START_LIMIT_S
        while not (app.consumer.in_service and (_streams(app) or not self._server.wal2json)):
            if work.done() or self._stopping.is_set() or asyncio.get_running_loop().time() > deadline:
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_EVERY_S):
                    await self._stopping.wait()

    async def _write(self, ticks: int, burst_rows: int) -> None:
        webhook = Webhook(
            self._dsn,
            self._journal,
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
        with connect(self._dsn, application_name="cdc demo: totals") as connection:
            while _one(connection, _PENDING)[0] and not limit.wait(_LOOK_EVERY_S):
                pass
            timer.cancel()
            return report.Totals(*_one(connection, _TOTALS))

    async def _stay(self) -> None:
        self._journal.visitors = True
        self._say("")
        self._say("The server and the consumer stay up. Write something, and see it travel:")
        self._say(f'  psql "{self._dsn}"')
        self._say("  INSERT INTO whatsapp_messages VALUES ('mine', 'help!', 'me', 'my-chat');")
        self._say("Ctrl-C ends it and removes the server.")
        self._say("")
        await self._stopping.wait()

    def _end(self) -> None:
        self._stop.set()
        self._stopping.set()

    # --- what is said ----------------------------------------------------------------------------------------------

    def _introduce(self, app: App) -> None:
        way = f"rung by the slot {_SLOT}" if _streams(app) else "no slot rings, so it sweeps"
        self._say(f"A consumer is at work, {way}. Metrics: {self._url}")
        self._say("An application now writes 20 rows a second. One in 14 is shown, in ms after the row was sent:")
        self._say("")
        self._say(self._paint(report.HEADER, bold=True))

    def _conclude(self, app: App, totals: report.Totals) -> None:
        figure = app.metrics.registry.get_sample_value
        wakeups = {source: int(figure("cdc_wakeups_total", {"source": source}) or 0) for source in SOURCES}
        self._say("")
        resident = figure("process_resident_memory_bytes")
        for text in report.summary(totals, self._journal.ended, wakeups, resident, self._paint):
            self._say(text)
        self._say("")
        self._say(f"  metrics    {self._url} (until the demo ends)")

    @property
    def _url(self) -> str:
        return f"http://127.0.0.1:{self._port}/metrics"

    def _arrived(self, journey: Journey) -> None:
        if journey.shown:
            self._say(report.line(journey, self._paint))

    def _stumbled(self, journey: Journey, error: BaseException) -> None:
        if journey.shown:
            self._say(report.failure(journey, error, self._paint))


def _streams(app: App) -> bool:
    return app.metrics.registry.get_sample_value("cdc_stream_connected", {"slot": _SLOT}) == 1


def _one(connection: psycopg.Connection, query: str) -> tuple[int, ...]:
    row = connection.execute(query.encode()).fetchone()
    assert row is not None
    return tuple(row)
