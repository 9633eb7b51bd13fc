"""When each change reached each step, as recorded by the webhook, the wake-ups, the handlers and the demo's hooks.

Times are seconds of ``time.monotonic()``. The webhook's thread writes ``sent`` and ``stored`` of its own changes, the
event loop and the handlers' threads all later fields; each field is written once, by one thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from cdc.core.model import Change

Mark = tuple[str, str, str]
"""(entity_type, entity_id, operation): identifies a change before the capture trigger has numbered it."""

STEPS = ("stored", "wake-up", "handler", "processed")
"""In their usual order. The wake-up may come slightly before ``stored``: the server answers the writer last."""


@dataclass(slots=True)
class Journey:
    """The steps of one change. ``shown``: it gets a line of output; ``announced``: its writer records ``stored``."""

    table: str
    operation: str
    note: str
    shown: bool
    sent: float
    stored: float | None = None
    notified: float | None = None
    """The slot has reported the change; None: a read found it first."""
    handler: str = ""
    started: float | None = None
    attempts: int = 0
    processed: float | None = None
    announced: bool = True

    @property
    def source(self) -> str:
        return "sweep" if self.notified is None else "wal"

    def step(self, name: str) -> float | None:
        """The time of one of STEPS."""
        return {"stored": self.stored, "wake-up": self.notified, "handler": self.started, "processed": self.processed}[
            name
        ]


class Tracker:
    """``arrived`` is called for each journey that has ended, ``attempt_failed`` for each failed attempt; in any thread.

    The writer may learn of its commit after the change is processed: a journey has ended when both are recorded.
    """

    def __init__(
        self,
        arrived: Callable[[Journey], None],
        attempt_failed: Callable[[Journey, BaseException], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._arrived = arrived
        self._attempt_failed = attempt_failed
        self._clock = clock
        self._on_the_way: dict[Mark, Journey] = {}
        self._notified: dict[int, float] = {}
        self._lock = threading.Lock()
        self._burst_left = 0
        self.burst_over = threading.Event()
        self.ended: list[Journey] = []
        self.visitors = False
        """When True, changes that were not announced get a line, too: those of a user in psql, for example."""

    def sent(self, mark: Mark, *, table: str, note: str, shown: bool) -> Journey:
        """The row is about to be written. Called before the write, so that no handler can be earlier."""
        journey = Journey(table, mark[2], note, shown, self._clock())
        self._on_the_way[mark] = journey
        return journey

    def stored(self, journey: Journey) -> None:
        """The writer's commit has returned."""
        with self._lock:
            journey.stored = self._clock()
            ended = journey.processed is not None
        if ended:
            self._end(journey)

    def known_as(self, mark: Mark, change: Change) -> None:
        """The change announced by this mark is ``change``: its writer did not know the id that it would get."""
        if journey := self._on_the_way.pop(mark, None):
            self._on_the_way[_mark(change)] = journey

    def burst_sent(self, count: int) -> None:
        self._burst_left = count

    def notified(self, seqs: Iterable[int], at: float) -> None:
        """Called before the consumer reads these changes; a sweep may have started a handler already."""
        for seq in seqs:
            self._notified.setdefault(seq, at)

    def started(self, change: Change, handler: str) -> Journey | None:
        """A handler begins. None: the change is not shown."""
        journey = self._on_the_way.get(_mark(change)) or self._visitor(change)
        if journey is not None:
            journey.attempts = change.attempt
            if journey.started is None:
                journey.started, journey.handler = self._clock(), handler
        return journey

    def processed(self, change: Change) -> None:
        journey = self._on_the_way.pop(_mark(change), None)
        notified = self._notified.pop(change.seq, None)
        if journey is not None:
            journey.notified = notified
            with self._lock:
                journey.processed = self._clock()
                ended = journey.stored is not None or not journey.announced
            if ended:
                self._end(journey)
        elif self._burst_left:
            self._burst_left -= 1
            if self._burst_left == 0:
                self.burst_over.set()

    def failed(self, change: Change, error: BaseException) -> None:
        if journey := self._on_the_way.get(_mark(change)):
            journey.notified = self._notified.get(change.seq)
            self._attempt_failed(journey, error)

    def _end(self, journey: Journey) -> None:
        self.ended.append(journey)
        self._arrived(journey)

    def _visitor(self, change: Change) -> Journey | None:
        if not self.visitors:
            return None
        # Of a user's commit only the start of its transaction is known, by the server's clock.
        began = self._clock() - (time.time() - change.changed_at.timestamp())
        journey = Journey(change.table, change.operation, "yours", shown=True, sent=began, announced=False)
        self._on_the_way[_mark(change)] = journey
        return journey


def _mark(change: Change) -> Mark:
    return (change.entity_type, change.entity_id, change.operation.value)


def percentile(values: Iterable[float], percent: float) -> float:
    """The smallest of ``values`` that at least ``percent`` of them do not exceed. At least one value is needed."""
    ordered = sorted(values)
    return ordered[max(0, -int(-len(ordered) * percent // 100) - 1)]
