"""Consumers, a server and what may go wrong between them, played step by step as the dice say.

A run is a function of its seed. At each step one small thing happens somewhere: a transaction draws a number, is
flushed (and notified), becomes visible later or never; a read takes its snapshot or is answered; a settle is sent,
is executed or is answered; a handler takes its row, commits, returns; a consumer looks at the shards or acts on what
it saw a while ago; a wake-up is relayed, or lost; a session ends, and its consumer notices later; a process is killed,
and the server notices later. One outbox has up to three readers, the default one and subscriptions, each with consumers
of its own. ``Promises`` says what must hold at each of them. In the end nothing goes wrong any more, and everything
must get settled.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from itertools import accumulate

from cdc.core.model import WakeUp
from cdc.core.rebalance import fair_share
from tests.simulation.consumer import Consumer, Kind, Settings
from tests.simulation.outbox import Outbox
from tests.simulation.promises import Promises
from tests.simulation.server import SHARDS, Record, Server, Session

_KEYS = "abcdef"
_TRUNCATES = "TU"
_ROUNDS_MAX = 3_000
_ROUND_S = 0.05
_READERS = ((False,), (True,), (False, True), (True, True), (False, True, True))
"""Of each, whether it is a subscription. In turn, by the seed."""


class Simulation:
    """``run()`` plays the schedule of ``seed``; raises AssertionError where a promise is broken.

    ``on_step`` is told the name of each step before it is taken.
    """

    def __init__(
        self, seed: int, *, steps: int = 2_000, consumers: int | None = None, full_passes: bool | None = None,
        on_step: Callable[[str], None] = lambda _: None,
    ) -> None:  # fmt: skip
        self._dice = dice = random.Random(seed)
        self._steps = steps
        self._on_step = on_step
        self.settings = _settings(dice, full_passes)
        self._lossy = dice.random() < 0.5
        self._trouble = dice.choice([0.0, 0.5, 1.0, 3.0])
        self._failure = dice.choice([0.0, 0.1, 0.4])
        self._truncates = dice.choice([0.0, 0.02, 0.1])
        self.outbox = Outbox(_READERS[seed % len(_READERS)], durable_slot=dice.random() < 0.3)
        self.happened: Counter[str] = Counter()
        self.promises = {reader: Promises(reader, self.happened) for reader in self.outbox.readers}
        count = consumers or dice.choice([1, 2, 3])
        self.consumers = [self._new_consumer(reader) for reader in self.outbox.readers for _ in range(count)]
        self._replay_for: tuple[Server, bool] = self.outbox.readers[0], False
        """Whose the processed changes are that are replayed, and whether it alone takes them."""
        self._replayed: list[int] = []
        """What the replay that is under way repeats; its last round is the transaction ``_round_of_replay``."""
        self._round_of_replay = 0
        self._vanished: list[tuple[Server, Session]] = []
        """Sessions whose process is gone, which the server does not know yet."""

    def run(self) -> None:
        weighted = self._actions()
        actions, weights = list(weighted), list(accumulate(weighted.values()))
        for _ in range(self._steps):
            self._step(self._dice.choices(actions, cum_weights=weights)[0])
        self._let_settle()
        for promises in self.promises.values():
            promises.all_kept(lambda record: self.settings.kind(record.key, record.seq).transactional)
        self.happened["a schedule had several readers"] += len(self.promises) > 1

    def _actions(self) -> dict[Callable[[], None], float]:
        each, lossy, trouble = float(len(self.consumers)), 0.5 * self._lossy, self._trouble
        return {
            self._write: 1.5, self._flush: 3, self._end: 4, self._deliver: 5, self._execute: 4 * each, self._tick: 2,
            self._hear: 4 * each, self._connect: each, self._stream: each, self._balance: 3 * each,
            self._read: 12 * each, self._start: 8 * each, self._advance: 12 * each, self._settle: 8 * each,
            self._notice: each, self._notice_stream: each, self._end_vanished: 0.5,
            self._move_positions: 2.0 * sum(bool(reader.positions) for reader in self.outbox.readers),
            self._keep_floors: each, self._cut_stream: lossy, self._lose_relayed: 2 * lossy,
            self._end_a_session: 0.3 * trouble, self._kill: 0.2 * trouble, self._restart_server: 0.05 * trouble,
            self._cut_off_handler: trouble, self._requeue: 0.3 * trouble, self._replay: 0.5,
        }  # fmt: skip

    def _step(self, action: Callable[[], None]) -> None:
        self._on_step(action.__name__.strip("_"))
        action()

    def _new_consumer(self, reader: Server) -> Consumer:
        return Consumer(self.settings, reader, self.promises[reader], self._dice)

    def _any(self) -> Consumer:
        return self._dice.choice(self.consumers)

    # --- the calm after it -----------------------------------------------------------------------------------------

    def _let_settle(self) -> None:
        """The writers stop, every transaction ends, nothing fails or is lost any more: all must be settled."""
        for xid in self.outbox.open:
            if xid not in self.outbox.flushed:
                self.outbox.flush(xid)
            self.outbox.end(xid)
        for round_ in range(_ROUNDS_MAX):
            if round_ % 100 == 0:
                self._requeue_what_pauses()
            self._round()
            if self.outbox.settled and all(consumer.at_rest for consumer in self.consumers):
                self._shares_are_fair()
                return
        left = [row for reader in self.outbox.readers for row in reader.visible()]
        raise AssertionError(f"never settled: {left[:5]}")

    def _round(self) -> None:
        self._end_vanished()
        for _ in self.consumers:
            self._deliver()
        for consumer in self.consumers:
            consumer.notice()
            consumer.connect()
            if consumer.streaming != (self.outbox.slot.reader is consumer):
                consumer.stream_ended()
            self._let_stream(consumer)
            for call in (consumer.balance, consumer.hear, consumer.read, consumer.start, consumer.read):
                call()
            consumer.advance(0)
            consumer.settle()
            self._execute()
        self.outbox.pass_time(_ROUND_S)

    def _requeue_what_pauses(self) -> None:
        for reader in self.outbox.readers:
            for record in reader.rows.values():
                if record.state == "paused":
                    reader.requeue(record)
        self._notify(None)

    def _shares_are_fair(self) -> None:
        """In the end each shard is somebody's, and nobody has more than the others by more than one."""
        for _ in range(10):
            for consumer in self.consumers:
                consumer.balance()
        for reader in self.outbox.readers:
            owned = [len(session.shards) for session in reader.sessions]
            assert sum(owned) == SHARDS, f"shards left over: {owned}"
            assert max(owned) <= fair_share(len(owned), shards=SHARDS)[1], f"unfair: {owned}"

    # --- writers and an operator -----------------------------------------------------------------------------------

    def _write(self) -> None:
        candidates = [xid for xid in self.outbox.unflushed if xid != self._round_of_replay]
        xid = self._dice.choice(candidates) if candidates and self._dice.random() < 0.5 else self.outbox.begin()
        for _ in range(self._dice.choice([1, 1, 1, 5])):
            self.outbox.write(xid, self._dice.choice(_TRUNCATES if self._dice.random() < self._truncates else _KEYS))

    def _flush(self) -> None:
        if candidates := self.outbox.unflushed:
            xid = self._dice.choice(candidates)
            if self._dice.random() < 0.1:
                self.outbox.end(xid)
            else:
                self.outbox.flush(xid)

    def _end(self) -> None:
        if candidates := [xid for xid in self.outbox.open if xid in self.outbox.flushed]:
            self.outbox.end(self._dice.choice(candidates))

    def _requeue(self) -> None:
        """An operator gives dead letters another try, and wakes the consumers."""
        reader = self._dice.choice(self.outbox.readers)
        if dead := [record for record in reader.rows.values() if record.state in ("dead", "paused")]:
            reader.requeue(self._dice.choice(dead))
            self._notify(None)

    def _replay(self) -> None:
        """An operator replays what is processed, a round after the other; what is rolled back is replayed later."""
        if self._round_of_replay in self.outbox.open:
            return
        reader, alone = self._replay_for
        left = self._left_of_replay(reader)
        if not left:
            reader, alone = self._dice.choice(self.outbox.readers), self._dice.random() < 0.5
            self._replay_for = reader, alone
            again = {row.replays for row in reader.rows.values()}
            first = [row.seq for row in reader.rows.values() if _may_be_replayed(row) and row.seq not in again]
            left = self._replayed = sorted(self._dice.sample(first, min(6, len(first))))
        only = reader if alone and len(self.outbox.readers) > 1 else None
        self.happened["a replay was for one reader"] += bool(left and only)
        self._round_of_replay = self.outbox.replay(left[: self._dice.choice([1, 3])], only=only)

    def _left_of_replay(self, reader: Server) -> list[int]:
        again = {row.replays for row in reader.rows.values()}
        return [seq for seq in self._replayed if seq not in again]

    # --- wake-ups --------------------------------------------------------------------------------------------------

    def _stream(self) -> None:
        self._let_stream(self._any())

    def _let_stream(self, consumer: Consumer) -> None:
        if not consumer.streaming and self.outbox.slot.connect(consumer):
            consumer.stream_began()

    def _deliver(self) -> None:
        """Who streams passes on what it does not own to consumers of its own subscription, and everything to others."""
        streams = self.outbox.slot.reader
        if not isinstance(streams, Consumer):
            return
        read = self.outbox.slot.read(self._dice.randint(1, 6))
        others = streams.notified(read)
        for consumer in self.consumers:
            if told := others if consumer.reader is streams.reader else list(read):
                consumer.wakeups.append(told)

    def _notify(self, payload: list[WakeUp] | None) -> None:
        """To whoever listens, the sender too."""
        for consumer in self.consumers:
            consumer.wakeups.append(payload)

    def _hear(self) -> None:
        self._any().hear()

    def _lose_relayed(self) -> None:
        """A relay that is cut loses wake-ups; a NOTIFY by hand is the operator's statement, and is not lost."""
        wakeups = self._any().wakeups
        if wakeups and wakeups[0] is not None:
            wakeups.popleft()

    def _cut_stream(self) -> None:
        if self.outbox.slot.reader:
            self.outbox.slot.disconnect()

    def _notice_stream(self) -> None:
        consumer = self._any()
        if consumer.streaming and self.outbox.slot.reader is not consumer:
            consumer.stream_ended()

    # --- consumers -------------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        self._any().connect()

    def _balance(self) -> None:
        self._any().balance()

    def _read(self) -> None:
        self._any().read()

    def _start(self) -> None:
        self._any().start()

    def _advance(self) -> None:
        self._any().advance(self._failure)

    def _settle(self) -> None:
        self._any().settle()

    def _cut_off_handler(self) -> None:
        self._any().cut_off()

    def _execute(self) -> None:
        """The server runs a settle that was sent, also one of a process that is gone."""
        sent = [
            (reader, session)
            for reader in self.outbox.readers
            for session in reader.sessions
            if session.statement and not reader.blocked(session)
        ]
        if sent:
            reader, session = self._dice.choice(sent)
            promises = self.promises[reader]
            promises.settles(session.statement or [])
            for finished in reader.execute(session):
                kind = self.settings.kind(finished.change.entity_id, finished.change.seq)
                promises.missed(finished, transactional=kind.transactional)

    def _move_positions(self) -> None:
        """Of a subscription, by one of its consumers."""
        reader = self._dice.choice([reader for reader in self.outbox.readers if reader.positions])
        if reader.sessions:
            self.happened["a position moved"] += reader.move_positions(self._dice.choice(reader.sessions))

    def _keep_floors(self) -> None:
        consumer = self._any()
        self.happened["a floor moved"] += consumer.keep_floors()

    def _tick(self) -> None:
        self.outbox.pass_time(self._dice.choice([0.001, 0.01, 0.1, 1.0]))

    # --- trouble ---------------------------------------------------------------------------------------------------

    def _end_a_session(self) -> None:
        if sessions := [(reader, session) for reader in self.outbox.readers for session in reader.sessions]:
            reader, session = self._dice.choice(sessions)
            reader.end_session(session)

    def _notice(self) -> None:
        self._any().notice()

    def _kill(self) -> None:
        """And a supervisor starts it anew."""
        place = self._dice.randrange(len(self.consumers))
        consumer = self.consumers[place]
        self.consumers[place] = self._new_consumer(consumer.reader)
        consumer.killed()
        if consumer.session:
            self._vanished.append((consumer.reader, consumer.session))
        if self.outbox.slot.reader is consumer:
            self.outbox.slot.disconnect()

    def _end_vanished(self) -> None:
        while self._vanished:
            reader, session = self._vanished.pop()
            reader.end_session(session)

    def _restart_server(self) -> None:
        """Every session ends, and every transaction: those whose commit record was flushed have committed."""
        for reader in self.outbox.readers:
            for session in list(reader.sessions):
                reader.end_session(session)
        for xid in self.outbox.open:
            self.outbox.end(xid)
        self._cut_stream()
        for consumer in self.consumers:
            consumer.wakeups.clear()
            for call in [call for call in consumer.calls if call.kind.transactional]:
                consumer.interrupt(call)


def _may_be_replayed(row: Record) -> bool:
    return row.state == "processed" and row.replays is None and not row.requeued_late


def _settings(dice: random.Random, full_passes: bool | None) -> Settings:
    def odds(probability: float) -> bool:
        return dice.random() < probability

    def kind() -> Kind:
        return Kind(odds(0.4), odds(0.4), odds(0.3), odds(0.3))

    passes, one_handler = odds(0.5), odds(0.5)
    handlers = {key: (kind(), kind()) for key in _KEYS + _TRUNCATES}
    return Settings(
        kinds={key: (even, even if one_handler else odd) for key, (even, odd) in handlers.items()},
        capacity=dice.choice([4, 12, 40]),
        key_capacity=dice.choice([1, 2, 8]),
        deferred_max=dice.choice([1, 3, 100]),
        queue_capacity=dice.choice([2, 10, 1000]),
        sole=odds(0.3),
        concurrency=dice.choice([1, 3, 10]),
        threads=dice.choice([1, 3]),
        batches=odds(0.5),
        full_passes=passes if full_passes is None else full_passes,
        settle_s=dice.choice([0.0, 0.0, 0.5]),
        coalesced_max=dice.choice([1, 3, 100]),
    )
