"""Faults, one after the other, from a seed: ``python -m tests.faults.chaos --minutes 30 --seed 7``.

Each step draws all it needs before anything happens, so that a seed means the same faults in the same
order whatever the run made of the earlier ones. Only the moments differ: processes and servers are not ours to time.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import psycopg

from cdc.core.subscription import DEFAULT
from tests.faults.ledger import Verdict, judge
from tests.faults.operators import OPERATOR
from tests.faults.stage import SLOT, TIMEOUT_S, Stage, pause
from tests.handlers_ledger import ODD
from tests.refusals import MARKS, SHARDS, refusing

CONNECTIONS = (
    "cdc: shards", "cdc: reader", "cdc: listener", "cdc: stream", "cdc: relay", "cdc: collector", "cdc: handlers",
    "cdc: due",
)  # fmt: skip
_TAKE_OVER_S = 20.0
_TELL_EVERY_S = 30.0


class Draw(NamedTuple):
    """What a step may need. ``share`` is evenly from 0 to 1."""

    place: int
    connection: str
    everywhere: bool
    share: float


def kill(stage: Stage, draw: Draw) -> None:
    """kill -9; the next one comes at once, or after the others had time to take its shards."""
    stage.kills += 1
    stage.consumers[draw.place].kill()
    pause(draw.share * 3)
    stage.start(draw.place)


def replace(stage: Stage, draw: Draw) -> None:
    """SIGTERM and a successor, as in a rolling restart."""
    consumer = stage.consumers[draw.place]
    # One that has only just started knows nothing of signals yet.
    if consumer.alive and (code := consumer.terminate()) not in (0, -signal.SIGTERM):
        stage.troubles.append(f"{consumer.name}: SIGTERM ended in {code}")
    stage.start(draw.place)


def freeze(stage: Stage, draw: Draw) -> None:
    """SIGSTOP, at its longest beyond the stream's wal_sender_timeout of 15 s. Its session stays: nobody takes over."""
    with _frozen(stage, draw.place):
        pause(0.5 + draw.share**3 * 17)


def freeze_and_lose(stage: Stage, draw: Draw) -> None:
    """The worst there is: the session ends while its owner is stopped, and another takes its shards meanwhile."""
    with _frozen(stage, draw.place):
        stage.end_backends("cdc: shards", draw.place)
        pause(0.5 + draw.share * 4)


def freeze_beyond_every_limit(stage: Stage, draw: Draw) -> None:
    """The server ends all its sessions while it is stopped, for longer than a handler may take: others finish its work.

    Stopped and not dead, it would keep its sessions for ever: its kernel answers the server's keepalives.
    """
    with _frozen(stage, draw.place):
        stage.end_backends(place=draw.place)
        began = moved = time.monotonic()
        left = stage.unsettled(newest := stage.newest(), draw.place)
        while left:
            stage.watch()
            pause(0.1)
            before, left = left, stage.unsettled(newest, draw.place)
            # Where much waits and the machine is busy, all of it takes longer.
            moved = time.monotonic() if left < before else moved
            if time.monotonic() - moved > _TAKE_OVER_S:
                stage.troubles.append(f"the others had done nothing of its work for {_TAKE_OVER_S:g} s")
                return
        pause(began + TIMEOUT_S * (1.1 + draw.share) - time.monotonic())


@contextlib.contextmanager
def _frozen(stage: Stage, place: int) -> Iterator[None]:
    began = time.time()
    stage.consumers[place].signal(signal.SIGSTOP)
    try:
        yield
    finally:
        stage.consumers[place].signal(signal.SIGCONT)
        stage.was_paused(place, began)


def terminate(stage: Stage, draw: Draw) -> None:
    """pg_terminate_backend of one kind of connection, of one consumer or of all."""
    stage.end_backends(draw.connection, None if draw.everywhere else draw.place)


def end_operator(stage: Stage, draw: Draw) -> None:
    """A backfill or a replay ends in the middle."""
    stage.end_backends(OPERATOR)


def restart(stage: Stage, draw: Draw) -> None:
    """A clean restart of the server."""
    stage.crash_or_restart("fast")


def crash(stage: Stage, draw: Draw) -> None:
    """The server goes without a word and recovers from its WAL."""
    stage.crash_or_restart("immediate")


def cut(stage: Stage, draw: Draw) -> None:
    """Every connection of a consumer is reset."""
    stage.proxies[draw.place].cut()


def cut_writers(stage: Stage, draw: Draw) -> None:
    """Some of them are waiting for the answer to a commit."""
    stage.writers_proxy.cut()


def hold(stage: Stage, draw: Draw) -> None:
    """Half-open: nothing passes and nothing closes. Held longer than the look at the shards waits between two looks."""
    began = time.time()
    stage.proxies[draw.place].hold()
    pause(0.5 + draw.share * 6)
    stage.proxies[draw.place].open()
    stage.was_paused(draw.place, began)


def hold_and_lose(stage: Stage, draw: Draw) -> None:
    """A black hole that the server notices and the consumer does not; then the dead link is reset."""
    began = time.time()
    stage.proxies[draw.place].hold()
    stage.end_backends("cdc: shards", draw.place)
    pause(0.5 + draw.share * 4)
    stage.proxies[draw.place].cut()
    stage.proxies[draw.place].open()
    stage.was_paused(draw.place, began)


def lose_answers(stage: Stage, draw: Draw) -> None:
    """Whatever a consumer asks for next on each connection is done by the server, and the answer lost."""
    _lose(stage, draw, b"")


def lose_commits(stage: Stage, draw: Draw) -> None:
    """A COMMIT, of a transactional handler mostly, is done and its answer lost."""
    _lose(stage, draw, b"COMMIT")


def _lose(stage: Stage, draw: Draw, words: bytes) -> None:
    proxy = stage.proxies[draw.place]
    proxy.lose(words)
    pause(0.1 + draw.share)
    proxy.open()


def lose_writers_commits(stage: Stage, draw: Draw) -> None:
    """The writers cannot know what they have committed."""
    stage.writers_proxy.lose(b"COMMIT")
    pause(0.1 + draw.share * 0.2)
    stage.writers_proxy.open()


def slow(stage: Stage, draw: Draw) -> None:
    """Every piece takes its time, in both directions."""
    stage.proxies[draw.place].slow(0.005 + draw.share * 0.05)
    pause(2.0)
    stage.proxies[draw.place].open()


def drop_slot(stage: Stage, draw: Draw) -> None:
    """Whoever streams finds its slot gone."""
    with stage.connect() as connection:
        connection.execute(
            "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = %s AND active", [SLOT]
        )
        with contextlib.suppress(psycopg.errors.ObjectInUse, psycopg.errors.UndefinedObject):
            connection.execute("SELECT pg_drop_replication_slot(%s)", [SLOT])


def lock_row(stage: Stage, draw: Draw) -> None:
    """A session holds changes that are about to be marked, at its longest beyond the lock_timeout of who would."""
    with stage.connect() as connection, connection.transaction():
        connection.execute(
            "SELECT FROM entity_changes WHERE NOT processed AND dead_at IS NULL ORDER BY seq LIMIT 3"
            " FOR UPDATE SKIP LOCKED"
        )
        pause(0.5 + draw.share**3 * 14)


def lock_table(stage: Stage, draw: Draw) -> None:
    """What CREATE INDEX takes: reads go on, and nothing is captured or marked."""
    with stage.connect() as connection, connection.transaction():
        connection.execute("LOCK TABLE entity_changes IN SHARE MODE")
        pause(0.5 + draw.share**3 * 14)


_ODD: tuple[tuple[str, str], ...] = (
    # Longer than an index entry may be, and different enough not to be compressed.
    ("(SELECT string_agg(md5(g::text || %s), '') FROM generate_series(1, 120) AS g)", "NULL"),
    # Deeper than Python's recursion goes, and more digits than it converts.
    ("'deep ' || %s", "(repeat('[', 5000) || repeat(']', 5000))::jsonb"),
    ("'digits ' || %s", "repeat('9', 6000)::jsonb"),
    # As JSON six times as long.
    ("'large ' || %s", "to_jsonb(repeat(chr(1), 2 * 1024 * 1024))"),
)
"""Arguments of publish_change(): the id, and new_data."""


def write_odd(stage: Stage, draw: Draw) -> None:
    """Changes that cannot be read, or not marked as any other: each becomes a dead letter, and nothing else suffers."""
    with stage.connect() as connection:
        for id_, new_data in _ODD:
            publish = f"SELECT publish_change('{ODD}', {id_}, new_data => {new_data})"
            connection.execute(publish.encode(), [str(draw.share)])


_CODES = ("40001", "40P01", "53100", "53200", "53300", "55P03", "57014", "57P01", "58030")
_LONG_S = 6.0


def refuse(stage: Stage, draw: Draw) -> None:
    """For a while the server refuses each mark, or each word about who owns a shard."""
    code = _CODES[int(draw.share * 1000) % len(_CODES)]
    with stage.connect() as connection, refusing(connection, SHARDS if draw.everywhere else MARKS, code):
        pause(0.5 + draw.share * _LONG_S)


def fill_disk(stage: Stage, draw: Draw) -> None:
    """The outbox has no room to grow: nothing is captured, and not much is marked."""
    if stage.disk is None:  # who may not mount is refused with the same words
        with stage.connect() as connection, refusing(connection, MARKS, "53100"):
            pause(0.5 + draw.share * _LONG_S)
        return
    stage.disk.fill()
    try:
        pause(0.5 + draw.share * _LONG_S)
    finally:
        stage.disk.free()


def cancel(stage: Stage, draw: Draw) -> None:
    """pg_cancel_backend for whatever a consumer has asked; a lock sees to it that there is something."""
    began = time.monotonic()
    with stage.connect() as connection:
        while time.monotonic() - began < 0.5 + draw.share * 3:
            with connection.transaction():
                connection.execute("LOCK TABLE entity_changes IN ACCESS EXCLUSIVE MODE")
                pause(0.1)
                stage.cancel_statements()
            pause(0.05)


def deadlock(stage: Stage, draw: Draw) -> None:
    """Rows that are about to be marked are held, and then the table is asked for: one of the two is the victim."""
    for _ in range(3):
        with (
            contextlib.suppress(psycopg.errors.DeadlockDetected),
            stage.connect() as connection,
            connection.transaction(),
        ):
            connection.execute(
                "SELECT FROM entity_changes WHERE NOT processed AND dead_at IS NULL ORDER BY seq LIMIT 20"
                " FOR UPDATE SKIP LOCKED"
            )
            pause(0.2)
            connection.execute("LOCK TABLE entity_changes IN EXCLUSIVE MODE")


def crowd(stage: Stage, draw: Draw) -> None:
    """A consumer has lost its connections, and there are too many others for new ones."""
    with contextlib.ExitStack() as others:
        stage.end_backends(place=draw.place)
        with contextlib.suppress(psycopg.OperationalError):
            while True:
                others.enter_context(contextlib.closing(stage.connect()))
        pause(0.5 + draw.share * 3)


Fault = Callable[[Stage, Draw], None]
WEIGHTS: dict[Fault, int] = {
    kill: 6, replace: 2, freeze: 2, freeze_and_lose: 4, freeze_beyond_every_limit: 2, terminate: 8, end_operator: 2,
    restart: 1,
    crash: 2, cut: 3, cut_writers: 2, hold: 2, hold_and_lose: 2, lose_answers: 2, lose_commits: 3,
    lose_writers_commits: 1, slow: 2, drop_slot: 1, lock_row: 2, lock_table: 1, write_odd: 1, refuse: 4, fill_disk: 2,
    cancel: 3, deadlock: 2, crowd: 1,
}  # fmt: skip


def steps(seed: int, places: int, weights: Mapping[Fault, int]) -> Iterator[tuple[float, Fault, Draw]]:
    """For ever: seconds to wait first, the fault, its draw."""
    dice = random.Random(f"{seed} chaos")
    while True:
        pause_s = dice.choice([0.1, 0.5, 1.0, 2.0, 3.0])
        [fault] = dice.choices(list(weights), list(weights.values()))
        yield pause_s, fault, Draw(dice.randrange(places), dice.choice(CONNECTIONS), dice.random() < 0.3, dice.random())


def play(stage: Stage, seed: int, seconds: float, weights: Mapping[Fault, int], tell: Callable[[str], None]) -> int:
    """Faults for so long; how many there were."""
    began = told = time.monotonic()
    for number, (pause_s, fault, draw) in enumerate(steps(seed, len(stage.consumers), weights)):
        pause(pause_s)
        if time.monotonic() - began > seconds:
            return number
        stage.watch()
        fault(stage, draw)
        if time.monotonic() - told > _TELL_EVERY_S:
            told = time.monotonic()
            tell(f"{told - began:5.0f} s: {number + 1} faults, {stage.processed()} changes processed, last: "
                 f"{fault.__name__} at {draw.place}")  # fmt: skip
    raise AssertionError("the steps never end")


def verdict(stage: Stage) -> Verdict:
    """Heal, and judge the default subscription; ``verdicts`` judges the others afterwards.

    A consumer that stopped by a bug, or left with an error, is a violation, too.
    """
    stage.heal()
    evidence = stage.evidence()
    (stage.folder / "captured.txt").write_text("".join(f"{row}\n" for row in sorted(evidence.captured)))
    found = judge(evidence)
    found.violations += stage.troubles + stage.odd_survivors()
    for words in ("this is a bug", "stopped by a bug", "Traceback"):
        found.violations += [f"{name} said {words!r}: see {stage.folder}" for name in stage.logged(words)]
    return found


def verdicts(stage: Stage) -> dict[str, Verdict]:
    """Of each subscription beside the default one: its own truth, and nothing of another's."""
    found = {}
    for name in stage.subscriptions.names:
        evidence = stage.evidence(name)
        (stage.folder / f"captured-{name}.txt").write_text("".join(f"{row}\n" for row in sorted(evidence.captured)))
        found[name] = judge(evidence)
    return found


def _faults(names: str) -> dict[Fault, int]:
    chosen = {fault: weight for fault, weight in WEIGHTS.items() if fault.__name__ in names.split(",")}
    if not chosen:
        raise argparse.ArgumentTypeError(f"choose from {', '.join(fault.__name__ for fault in WEIGHTS)}")
    return chosen


def main() -> int:
    parser = argparse.ArgumentParser(prog="make chaos", description="Break what can break, at random, and judge.")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=None, help="the same faults in the same order again")
    parser.add_argument("--consumers", type=int, default=3)
    parser.add_argument("--subscriptions", type=int, default=1, help="beside the default one, of two consumers each")
    parser.add_argument("--only", type=_faults, default=WEIGHTS, metavar="FAULT,...", help="only these")
    arguments = parser.parse_args()
    seed = random.randrange(1_000_000) if arguments.seed is None else arguments.seed
    folder = Path(tempfile.mkdtemp(prefix="cdcchaos"))
    print(f"seed {seed}, {arguments.minutes:g} minutes; logs and ledgers in {folder}", flush=True)
    names = [f"reader_{number}" for number in range(1, arguments.subscriptions + 1)]
    places = [DEFAULT] * arguments.consumers + [name for name in names for _ in range(2)]
    with Stage(folder, seed, subscriptions=places) as stage:
        faults = play(stage, seed, arguments.minutes * 60, arguments.only, lambda text: print(text, flush=True))
        found = verdict(stage)
        others = verdicts(stage)
        (folder / "server.log").write_text((stage.server.folder / "server.log").read_text())
    print(f"seed {seed}: {faults} faults, {stage.restarted} consumers restarted by the supervisor; {found}")
    for name, of_it in others.items():
        print(f"{name}: {of_it}")
        found.violations += of_it.violations
    if found.violations:
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
