"""A change whose handler ends its process: dead after its attempts, and everything else is processed."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from tests.eventually import eventually
from tests.faults import records
from tests.faults.ledger import Call, Evidence, judge
from tests.fix_consumer import Process, settled, states
from tests.handlers_ledger import CALM, KINDS, MAX_ATTEMPTS, POISON

_KEYS, _ROUNDS = 40, 5
_POISONED_ROUND = 3
_BOUND = MAX_ATTEMPTS + 3
"""Deaths of one poisonous change: one that nobody saw coming, one as one of many, and as many as it has attempts."""
_OPTIONS = {
    "handlers": "tests.handlers_ledger:router", "slot_name": "ledger", "backoff_base": 0.05, "backoff_cap": 0.5,
    "concurrency": 20, "window": 200, "drain_time": 5,
}  # fmt: skip


class Supervised:
    """A consumer that is started again whenever it has ended. ``look`` now and then."""

    def __init__(self, dsn: str, folder: Path, role: str) -> None:
        self._dsn = make_conninfo(dsn, user=role)
        self._log = folder / f"{role}.log"
        self.deaths = 0
        self.process = self._started()

    def look(self) -> None:
        if self.process.process.poll() is not None:
            self.deaths += 1
            self.process = self._started()

    def kill(self) -> None:
        self.process.kill()
        self.look()

    def _started(self) -> Process:
        return Process(self._dsn, self._log, module="tests.faults.hurried", **_OPTIONS)  # type: ignore[arg-type]


Start = Callable[..., Sequence[Supervised]]


@pytest.fixture
def start(outbox: str, kept: psycopg.Connection, ledgers: Path) -> Iterator[Start]:
    """``start("one", "two")`` starts a consumer for each role."""
    consumers: list[Supervised] = []

    def begin(*roles: str) -> Sequence[Supervised]:
        consumers.extend(Supervised(outbox, ledgers, role) for role in roles)
        return consumers

    yield begin
    for consumer in consumers:
        consumer.process.kill()


def _write(db: psycopg.Connection, kinds: Sequence[str], rounds: int = _ROUNDS, poisoned: Sequence[int] = ()) -> None:
    """Each round changes every row of these tables once; one of them poisons these rows of the first."""
    for round_ in range(1, rounds + 1):
        for kind in kinds:
            keys = poisoned if round_ == _POISONED_ROUND and kind == kinds[0] else ()
            db.execute(
                sql.SQL(
                    "INSERT INTO {} SELECT n, CASE WHEN n = ANY (%s::int[]) THEN %s ELSE %s END || %s || n"
                    " FROM generate_series(1, %s) AS n ON CONFLICT (id) DO UPDATE SET token = excluded.token"
                ).format(sql.Identifier(kind)),
                [list(keys), POISON, CALM, f" {kind} {round_}.", _KEYS],
            )


def _wait(db: psycopg.Connection, consumers: Sequence[Supervised], bound: int) -> None:
    """Supervise until everything is processed or dead."""

    def over() -> bool:
        for consumer in consumers:
            consumer.look()
        deaths = sum(consumer.deaths for consumer in consumers)
        assert deaths <= bound, f"{deaths} deaths; dead letters: {_dead(db)}; {consumers[0].process.log[-3000:]}"
        return settled(db)

    eventually(over, within_s=90, what="every change processed or dead")


def _judge(db: psycopg.Connection, folder: Path, kills: int) -> list[Call]:
    """Nothing is lost or out of order, effects are there once. What was called."""
    # When exactly a process died is not known; not before what it last wrote down, at any rate.
    calls = records.read_calls(folder, {"one": 0.0, "two": 0.0})
    captured = records.read_captured(db, KINDS)
    found = judge(Evidence(captured, calls, effects=records.read_effects(db), kills=kills))
    assert found.violations == [], str(found)
    return calls


def _dead(db: psycopg.Connection) -> list[tuple[str, str]]:
    return db.execute(
        "SELECT new_data ->> 'token', last_error FROM entity_changes WHERE dead_at IS NOT NULL ORDER BY 1"
    ).fetchall()


def _assert_only_the_poison_died(db: psycopg.Connection, count: int) -> None:
    dead = _dead(db)
    assert len(dead) == count, dead
    for token, last_error in dead:
        assert token.startswith(POISON)
        assert re.search("process|consumer", last_error), last_error
        assert re.search("died|ended|crash|kill", last_error), last_error
    assert set(states(db)) == {"processed", "dead"}


@pytest.mark.promise("G1")
@pytest.mark.promise("G4")
@pytest.mark.parametrize("kind", ["kept_transactional", "kept_batch_transactional"])
def test_a_change_that_ends_every_process_that_touches_it_becomes_a_dead_letter_and_all_else_is_processed(
    kind: str, kept: psycopg.Connection, start: Start, ledgers: Path
) -> None:
    _write(kept, [kind, "kept_async"], poisoned=[7])
    consumers = start("one")
    _wait(kept, consumers, _BOUND)
    _assert_only_the_poison_died(kept, 1)
    calls = _judge(kept, ledgers, consumers[0].deaths)
    [(poison,)] = kept.execute("SELECT seq FROM entity_changes WHERE dead_at IS NOT NULL").fetchall()
    assert consumers[0].deaths == sum(call.seq == poison for call in calls)
    assert consumers[0].deaths >= MAX_ATTEMPTS


@pytest.mark.promise("G1")
@pytest.mark.promise("G8")
def test_two_consumers_do_not_die_more_often_of_it_than_one(
    kept: psycopg.Connection, start: Start, ledgers: Path
) -> None:
    _write(kept, ["kept_transactional_sync", "kept_async"], poisoned=[7])
    consumers = start("one", "two")
    _wait(kept, consumers, _BOUND)
    _assert_only_the_poison_died(kept, 1)
    _judge(kept, ledgers, _BOUND)


@pytest.mark.promise("G4")
def test_two_poisonous_changes_are_distinguished_from_all_others_and_from_each_other(
    kept: psycopg.Connection, start: Start, ledgers: Path
) -> None:
    _write(kept, ["kept_async", "kept_sync"], poisoned=[7, 23])
    consumers = start("one")
    _wait(kept, consumers, 2 * _BOUND)
    _assert_only_the_poison_died(kept, 2)
    _judge(kept, ledgers, consumers[0].deaths)


def test_work_that_comes_in_after_a_takeover_is_done_while_the_poison_is_still_alive(
    kept: psycopg.Connection, start: Start, ledgers: Path
) -> None:
    """It does not wait for the suspects: later changes were in nobody's hands."""
    _write(kept, ["kept_batch"], poisoned=[7])
    consumers = start("one")

    def has_died() -> bool:
        consumers[0].look()
        return consumers[0].deaths > 0

    eventually(has_died, what="the poison is met")
    _write(kept, ["kept_transactional"], rounds=2)
    _wait(kept, consumers, _BOUND)
    _assert_only_the_poison_died(kept, 1)
    _judge(kept, ledgers, consumers[0].deaths)


@pytest.mark.promise("G1")
@pytest.mark.parametrize("roles", [["one"], ["one", "two"]], ids=["alone", "with another"])
def test_killing_a_consumer_from_outside_again_and_again_makes_nothing_a_dead_letter(
    roles: list[str], kept: psycopg.Connection, start: Start, ledgers: Path
) -> None:
    _write(kept, KINDS, rounds=8)
    consumers = start(*roles)
    for _ in range(4):
        before = _processed(kept)
        eventually(lambda: _processed(kept) > before + 150, what="it is in the middle of its work")  # noqa: B023
        consumers[0].kill()
    _wait(kept, consumers, 4)
    assert states(kept) == {"processed": 8 * _KEYS * len(KINDS)}
    _judge(kept, ledgers, 4)


def _processed(db: psycopg.Connection) -> int:
    return states(db).get("processed", 0)


@pytest.mark.promise("G1")
def test_a_consumer_that_is_stopped_in_peace_blames_nothing(
    kept: psycopg.Connection, start: Start, ledgers: Path
) -> None:
    _write(kept, KINDS, rounds=8)
    [consumer] = start("one")
    for _ in range(2):
        before = _processed(kept)
        eventually(lambda: _processed(kept) > before + 150, what="it is in the middle of its work")  # noqa: B023
        assert consumer.process.terminate() == os.EX_OK, consumer.process.log
        consumer.look()
    _wait(kept, [consumer], 2)
    assert states(kept) == {"processed": 8 * _KEYS * len(KINDS)}
    assert kept.execute("SELECT max(error_count), max(last_error) FROM entity_changes").fetchone() == (0, None)
