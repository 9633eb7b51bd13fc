"""The application of the demo: a webhook that stores what comes in, and triggers nothing.

It has its own thread and its own connection, and does not know that a consumer exists. One statement is one
transaction, as an adapter's upsert is.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from typing import LiteralString, NamedTuple

import psycopg

from cdc.connect import connect
from cdc.demo.handlers import UNREACHABLE
from cdc.demo.journal import Journal
from cdc.demo.place import SESSION
from cdc.demo.report import Burst
from cdc.model import Operation

_REACTIONS, _MESSAGES, _TASKS = "whatsapp_message_reactions", "whatsapp_messages", "tasks"
_TYPES = {_REACTIONS: "reaction", _MESSAGES: "message", _TASKS: "task"}

_ADD_REACTION = (
    "INSERT INTO whatsapp_message_reactions (id, message_id, reaction, user_id, chat_id) VALUES (%s, %s, %s, %s, %s)"
)
_CHANGE_REACTION = "UPDATE whatsapp_message_reactions SET reaction = %s WHERE id = %s"
_REMOVE_REACTION = "DELETE FROM whatsapp_message_reactions WHERE id = %s"
_ADD_MESSAGE = "INSERT INTO whatsapp_messages (id, content, user_id, chat_id) VALUES (%s, %s, %s, %s)"
_ADD_TASK = "INSERT INTO tasks (id, title, user_id, room_id) VALUES (%s, %s, %s, %s)"
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
"""Of the rows written, so many for one that is shown: as many lines as a person can read meanwhile."""
_BURST_LIMIT_S = 30.0


class _Row(NamedTuple):
    table: str
    operation: Operation
    id: str
    statement: LiteralString
    parameters: tuple[str, ...]
    note: str


class Webhook:
    """Writes for about ``ticks`` times 50 ms, with a burst of ``burst_rows`` in the middle, until ``stop`` is set."""

    def __init__(
        self,
        dsn: str,
        journal: Journal,
        *,
        ticks: int,
        burst_rows: int,
        burst_over: Callable[[Burst], None],
        stop: threading.Event,
    ) -> None:
        self._dsn = dsn
        self._journal = journal
        self._ticks = ticks
        self._burst_rows = burst_rows
        self._burst_over = burst_over
        self._stop = stop

    def run(self) -> None:
        """Returns when all is written. Raises psycopg.Error where the server goes away."""
        with connect(self._dsn, application_name="cdc demo: webhook", session=SESSION) as connection:
            shown, quiet = _scenes(), _traffic()
            for tick in range(self._ticks):
                if self._stop.wait(_PACE_S):
                    return
                if tick == self._ticks // 2:
                    self._burst(connection)
                show = tick % _SHOW_EVERY == 0
                self._write(connection, next(shown if show else quiet), shown=show)

    def _write(self, connection: psycopg.Connection, row: _Row, *, shown: bool) -> None:
        mark = (_TYPES[row.table], row.id, row.operation.value)
        journey = self._journal.sent(mark, table=row.table, note=row.note, shown=shown)
        connection.execute(row.statement, row.parameters)
        self._journal.stored(journey)

    def _burst(self, connection: psycopg.Connection) -> None:
        """Nothing else is written until it is processed: it would measure the burst, not the way of one change."""
        self._journal.burst_sent(self._burst_rows)
        began = time.time()
        connection.execute(_ADD_BURST, [self._burst_rows])
        stored = time.time()
        if not self._journal.burst_over.wait(_BURST_LIMIT_S):
            return  # the totals at the end will tell
        # The mark's own time: the hooks that told us are called one by one, and lag behind. One machine, one clock.
        [processed_at] = connection.execute(_BURST_PROCESSED_AT).fetchone() or [stored]
        self._burst_over(Burst(self._burst_rows, stored - began, processed_at - stored))


def _scenes() -> Iterator[_Row]:
    """What is shown, again and again with new ids."""
    for n in itertools.count(1):
        yield _reaction(f"reaction-{n}", "✅", note="✅ → task")
        yield _message(f"message-{n}", "Good morning", note="no action")
        yield _message(f"question-{n}", "Can you help me?", note="help → answer")
        yield _task(f"manual-{n}", note="→ notification")
        yield _message(f"unlucky-{n}", UNREACHABLE, note="help")
        yield _reaction(f"mood-{n}", "👍", note="👍")
        yield _Row(_REACTIONS, Operation.UPDATE, f"mood-{n}", _CHANGE_REACTION, ("❤️", f"mood-{n}"), "👍 → ❤️")
        yield _Row(_REACTIONS, Operation.DELETE, f"mood-{n}", _REMOVE_REACTION, (f"mood-{n}",), "gone")


def _traffic() -> Iterator[_Row]:
    """What goes on beside it."""
    for n in itertools.count(1):
        yield _message(f"chat-{n}", "Did you see this?", note="")
        yield _reaction(f"like-{n}", "👍", note="")
        yield _message(f"reply-{n}", "Yes!", note="")
        yield _reaction(f"check-{n}", "✅", note="")


def _reaction(identity: str, reaction: str, note: str) -> _Row:
    parameters = (identity, f"message-of-{identity}", reaction, "test-user", "test-chat")
    return _Row(_REACTIONS, Operation.INSERT, identity, _ADD_REACTION, parameters, note)


def _message(identity: str, content: str, note: str) -> _Row:
    return _Row(
        _MESSAGES, Operation.INSERT, identity, _ADD_MESSAGE, (identity, content, "test-user", "test-chat"), note
    )


def _task(identity: str, note: str) -> _Row:
    return _Row(_TASKS, Operation.INSERT, identity, _ADD_TASK, (identity, "Call back", "test-user", "test-room"), note)
