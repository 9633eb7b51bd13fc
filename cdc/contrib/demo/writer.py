"""The application of the demo: events for its webhook, which stores them and triggers nothing.

It has its own thread and its own connection, and is independent of the consumer. Tasks made by hand and the burst are
written straight into the tables by other code: a change is captured whatever its writer is.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import NamedTuple

import psycopg

from cdc.contrib.demo.environment import SCHEMA, SESSION
from cdc.contrib.demo.handlers import FAR_AWAY, TASK_EMOJI
from cdc.contrib.demo.report import Burst
from cdc.contrib.demo.tracker import Tracker
from cdc.contrib.whatsapp.adapter import Adapter
from cdc.core.model import Operation
from cdc.postgres.connect import connect_async

_REACTIONS, _MESSAGES, _TASKS = "whatsapp_message_reactions", "whatsapp_messages", "tasks"
_TYPES = {_REACTIONS: "reaction", _MESSAGES: "message", _TASKS: "task"}

_ADD_TASK = "INSERT INTO cortex_projects.tasks (id, title, room_id) VALUES (%s, 'Call back', 'test-room')"
_ADD_BURST = """
INSERT INTO whatsapp_messages (id, content, user_id, chat_id)
SELECT 'burst-' || n, 'burst ' || n, 'user-' || n %% 50, 'chat-' || n %% 10 FROM generate_series(1, %s) AS n
"""
_BURST_PROCESSED_AT = """
SELECT extract(epoch FROM max(processed_at))::float8 FROM recent_action_history
WHERE entity_type = 'message' AND preview LIKE 'burst %'
"""

_PACE_S = 0.05
_SHOW_EVERY = 14
"""Rows written for each one that is shown: as many lines as a person can read."""
_BURST_LIMIT_S = 30.0


class _Insert(NamedTuple):
    """``event``: what the webhook gets, without its time; None for a row that is written without the webhook."""

    table: str
    operation: Operation
    id: str
    event: Mapping[str, str] | None
    note: str


class Webhook:
    """Writes for about ``ticks`` times 50 ms, with a burst of ``burst_rows`` in the middle, until ``stop`` is set."""

    def __init__(
        self,
        dsn: str,
        tracker: Tracker,
        *,
        ticks: int,
        burst_rows: int,
        burst_over: Callable[[Burst], None],
        stop: threading.Event,
    ) -> None:
        self._dsn = dsn
        self._tracker = tracker
        self._ticks = ticks
        self._burst_rows = burst_rows
        self._burst_over = burst_over
        self._stop = stop

    def run(self) -> None:
        """Returns when all is written. Raises psycopg.Error when the server goes away."""
        asyncio.run(self._run())

    async def _run(self) -> None:
        async with await connect_async(self._dsn, application_name="cdc demo: webhook", session=SESSION) as connection:

            @contextlib.asynccontextmanager
            async def lend() -> AsyncIterator[psycopg.AsyncConnection]:
                yield connection

            adapter = Adapter(lend, SCHEMA)
            shown, quiet = _scenes(), _traffic()
            for tick in range(self._ticks):
                # This loop runs nothing else, so a blocking wait is fine.
                if self._stop.wait(_PACE_S):
                    return
                if tick == self._ticks // 2:
                    await self._burst(connection)
                show = tick % _SHOW_EVERY == 0
                await self._write(adapter, connection, next(shown if show else quiet), shown=show)

    async def _write(self, adapter: Adapter, connection: psycopg.AsyncConnection, row: _Insert, *, shown: bool) -> None:
        mark = (_TYPES[row.table], row.id, row.operation.value)
        journey = self._tracker.sent(mark, table=row.table, note=row.note, shown=shown)
        if row.event is None:
            await connection.execute(_ADD_TASK, [row.id])
        else:
            await adapter.process_webhook({**row.event, "timestamp": time.time()})
        self._tracker.stored(journey)

    async def _burst(self, connection: psycopg.AsyncConnection) -> None:
        """All other writes pause until it is processed: they would measure the burst, not the way of one change."""
        self._tracker.burst_sent(self._burst_rows)
        began = time.time()
        await connection.execute(_ADD_BURST, [self._burst_rows])
        stored = time.time()
        if not self._tracker.burst_over.wait(_BURST_LIMIT_S):
            return  # the totals at the end show it
        # The mark's own time: the hooks are called one by one, and lag behind. One machine, one clock.
        [processed_at] = await (await connection.execute(_BURST_PROCESSED_AT)).fetchone() or [stored]
        self._burst_over(Burst(self._burst_rows, stored - began, processed_at - stored))


def _scenes() -> Iterator[_Insert]:
    """Rows that are shown, repeated with new ids."""
    for n in itertools.count(1):
        yield _reaction(f"reaction-{n}", TASK_EMOJI, note="✅ → task")
        yield _message(f"message-{n}", "Good morning", note="no action")
        yield _message(f"question-{n}", "Can you help me?", note="help → answer")
        yield _Insert(_TASKS, Operation.INSERT, f"manual-{n}", None, "→ notification")
        yield _message(f"unlucky-{n}", "help, is anybody there?", note="help", chat=FAR_AWAY)
        yield _reaction(f"mood-{n}", "👍", note="👍")
        yield _reaction(f"mood-{n}", "❤️", note="👍 → ❤️", operation=Operation.UPDATE)
        yield _reaction(f"mood-{n}", "", note="gone", operation=Operation.DELETE)


def _traffic() -> Iterator[_Insert]:
    """Rows that are not shown."""
    for n in itertools.count(1):
        yield _message(f"chat-{n}", "Did you see this?", note="")
        yield _reaction(f"like-{n}", "👍", note="")
        yield _message(f"reply-{n}", "Yes!", note="")
        yield _reaction(f"check-{n}", TASK_EMOJI, note="")


def _reaction(identity: str, emoji: str, note: str, operation: Operation = Operation.INSERT) -> _Insert:
    event = {"event": "messages.reaction", "message_id": f"message-of-{identity}", "reaction": emoji}
    return _Insert(_REACTIONS, operation, identity, event | _sender(identity), note)


def _message(identity: str, content: str, note: str, chat: str = "test-chat") -> _Insert:
    event = {"event": "messages.upsert", "content": content}
    return _Insert(_MESSAGES, Operation.INSERT, identity, event | _sender(identity, chat), note)


def _sender(identity: str, chat: str = "test-chat") -> dict[str, str]:
    return {"key": identity, "from": "test-user", "chat_id": chat}
