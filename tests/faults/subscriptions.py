"""The subscriptions beside the default one in a chaos run: whose place is whose, and when each change was settled."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import psycopg

from cdc.core.subscription import DEFAULT
from tests.commands import done
from tests.faults import records
from tests.faults.ledger import Call, Captured, Effect
from tests.handlers_ledger import ALL_KINDS
from tests.subscriptions import states_of, subscribe

if TYPE_CHECKING:
    from tests.faults.stage import Stage

_LOOK_S = 2.0
_SETTLED = ("done", "dead")
_COUNT = """
SELECT count(*) FROM entity_changes AS n
JOIN cdc_positions AS p ON p.subscription = %(number)s AND p.shard = n.shard
LEFT JOIN cdc_subscription_changes AS s ON s.subscription = %(number)s AND s.seq = n.seq
WHERE (n.subscription IS NULL OR n.subscription = %(number)s)
  AND (s.dead_at IS NOT NULL OR s.next_attempt_at IS NULL AND (s.seq IS NOT NULL OR n.seq <= p.seq))
"""


class Subscriptions(threading.Thread):
    """``at``: of each place, whose it is. ``names``: those beside the default one that are not dropped.

    A mark of a subscription has no time, so this thread looks now and then what is settled.
    """

    def __init__(self, stage: Stage, at: Sequence[str]) -> None:
        super().__init__(name="subscriptions", daemon=True)
        self._stage = stage
        self.at = list(at)
        self.names = sorted({*at} - {DEFAULT})
        self.paused = set[str]()
        self._numbers: dict[str, int] = {}
        self._seen: dict[int, dict[int, float]] = defaultdict(dict)
        self._stopping = threading.Event()

    def make(self) -> None:
        with self._stage.connect() as connection:
            self._numbers = {name: subscribe(connection, name) for name in self.names}

    def stop(self) -> None:
        self._stopping.set()
        self.join()

    def run(self) -> None:
        while not self._stopping.wait(_LOOK_S):
            try:
                with self._stage.connect() as connection:
                    for name in self.names:
                        number = self._numbers[name]
                        states = states_of(connection, number)
                        now, seen = time.time(), self._seen[number]
                        for seq, state in states.items():
                            if state in _SETTLED:
                                seen.setdefault(seq, now)
            except psycopg.Error:  # the server is away
                continue

    def settled(self, name: str) -> int:
        """How many changes are done or dead in it."""
        with self._stage.connect() as connection:
            [(count,)] = connection.execute(_COUNT, {"number": self._numbers[name]}).fetchall()
        return int(count)

    def unsettled(self, name: str, seq: int) -> int:
        """How many changes up to this number are not."""
        with self._stage.connect() as connection:
            states = states_of(connection, self._numbers[name])
        return sum(state not in _SETTLED for number, state in states.items() if number <= seq)

    def all_done(self, name: str) -> bool:
        return not self.unsettled(name, self._stage.newest())

    def captured(
        self, connection: psycopg.Connection, name: str, calls: Sequence[Call], effects: Sequence[Effect]
    ) -> list[Captured]:
        number = self._numbers[name]
        return records.read_captured_by(connection, ALL_KINDS, number, self._seen[number], calls=calls, effects=effects)

    # --- what an operator does -------------------------------------------------------------------------------------

    def create(self, name: str, place: int) -> None:
        """From the beginning, and consumed at this place from now on."""
        with self._stage.connect() as connection:
            self._numbers[name] = subscribe(connection, name)
        self.names.append(name)
        self._move(place, name)

    def pause(self, name: str) -> None:
        done(self._stage.dsn, "subscription", "pause", name)
        self.paused.add(name)

    def resume(self, name: str) -> None:
        done(self._stage.dsn, "subscription", "resume", name)
        self.paused.discard(name)

    def drop(self, name: str) -> None:
        """While its consumers are at work; their places are those of the default one from now on."""
        done(self._stage.dsn, "subscription", "drop", name, "--yes")
        self.names.remove(name)
        for place, whose in enumerate(self.at):
            if whose == name:
                self._stage.consumers[place].process.wait_for("was dropped")
                self._move(place, DEFAULT)

    def _move(self, place: int, name: str) -> None:
        self.at[place] = name
        if (consumer := self._stage.consumers[place]).alive:
            consumer.terminate()
        self._stage.start(place)
