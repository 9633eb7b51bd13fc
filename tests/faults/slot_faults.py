"""What can happen to a slot, its stream, its plugin and its server; each broken and fixed, and what became of it.

A fault is a context: entering breaks something, leaving fixes it. Between the two, with a fault that lasts, the
consumer must say why it does not stream, and go on by sweeping.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import psycopg
from psycopg import errors, sql

from cdc.contrib.demo.temp_server import TempServer
from cdc.core.errors import StreamError
from cdc.core.lsn import Lsn
from cdc.core.model import PLUGINS, message_prefix
from cdc.core.stream_reason import Reason
from cdc.replication.connection import ReplicationSession, SocketWait, open_session
from cdc.replication.stream import plugins
from tests.eventually import eventually
from tests.faults.slot_stage import ROLE, SERVER, SLOT, Account, Moment, Stage, prepare
from tests.fix_slot import SlotFacts, lose
from tests.fix_stream import offered_libraries
from tests.standby import standing_by

_SLOTS, _WALSENDERS = int(SERVER["max_replication_slots"]), int(SERVER["max_wal_senders"])
_UNDELIVERABLE = "nobody lives to read this"


@dataclass(frozen=True, slots=True)
class Fault:
    """``reason`` and ``remedy`` as the log must have them; None: any reason, or, with a slot that is kept, not a word.

    ``lasts``: until it is fixed. ``anew``: the slot does not survive it. ``restarts``: the server ends all sessions,
    so that a call may be cut off and made again. ``settings`` are the consumer's.
    """

    name: str
    broken: Callable[[Stage], AbstractContextManager[None]]
    reason: Reason | None
    remedy: str = "it is tried again"
    lasts: bool = False
    anew: bool = False
    restarts: bool = False
    plugins: tuple[str, ...] = PLUGINS
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Outcome:
    """``restored_s``: from the fault, or from its end where it lasts, until the slot rang. ``swept_s``: see below."""

    fault: str
    plugin: str
    slot: str
    restored_s: float
    swept_s: float
    captured: int
    lost: int


# --- what breaks, and how to fix it --------------------------------------------------------------------------------


def _drop_and(stage: Stage, then: str, *values: object, dbname: str = "postgres") -> None:
    """Drop the slot under its reader, which comes back at once, and be faster than it with a statement."""

    def done() -> bool:
        try:
            stage.end_stream()
            connection.execute("SELECT pg_drop_replication_slot(%s)", [SLOT])
            elsewhere.execute(then, values)
        except (errors.ObjectInUse, errors.DuplicateObject):
            return False
        return True

    with stage.connect() as connection, stage.connect(dbname=dbname) as elsewhere:
        eventually(done, what="the slot is dropped, and something else is there")


def _drop_slot(stage: Stage, name: str = SLOT) -> None:
    stage.sql("SELECT pg_drop_replication_slot(%s)", [name])


@contextlib.contextmanager
def _slot_dropped(stage: Stage) -> Iterator[None]:
    _drop_and(stage, "SELECT 1")
    yield


@contextlib.contextmanager
def _slot_lost(stage: Stage) -> Iterator[None]:
    """As by a consumer that stood still for too long. A walsender that is told to end while a full socket blocks it
    hangs until its client is back, and the checkpoint that wants the slot with it: it is given the time to leave.
    """
    stage.set(max_slot_wal_keep_size="1MB")
    with stage.stopped_process(), stage.connect() as connection:
        stage.wait(lambda: not stage.slot()["active"], "the server gives the silent consumer up")
        lose(connection, SLOT)
    stage.set(max_slot_wal_keep_size="")
    yield


@contextlib.contextmanager
def _slot_held(stage: Stage) -> Iterator[None]:
    """By a client that reads nothing, as pg_recvlogical does when it is stopped."""
    with ExitStack() as undo:
        waiting = SocketWait().open()
        undo.callback(waiting.close)
        stranger = undo.enter_context(
            open_session(
                stage.dsn, waiting, application_name="a stranger", settings={"wal_sender_timeout": "0"}, slot=SLOT
            )
        )
        eventually(lambda: _seized(stage, stranger), what="a stranger reads the slot")
        yield


def _seized(stage: Stage, stranger: ReplicationSession) -> bool:
    stage.end_stream()
    with contextlib.suppress(StreamError):
        stranger.start(plugins("public")[stage.plugin], Lsn(0))
        return True
    return False


@contextlib.contextmanager
def _slot_of_another_plugin(stage: Stage) -> Iterator[None]:
    _drop_and(stage, "SELECT pg_create_logical_replication_slot(%s, 'test_decoding')", SLOT)
    yield
    _drop_slot(stage)


@contextlib.contextmanager
def _slot_of_another_database(stage: Stage) -> Iterator[None]:
    statement = "SELECT pg_create_logical_replication_slot(%s, %s)"
    _drop_and(stage, statement, SLOT, stage.plugin, dbname="template1")
    yield
    with stage.connect(dbname="template1") as connection:
        connection.execute("SELECT pg_drop_replication_slot(%s)", [SLOT])


@contextlib.contextmanager
def _physical_slot(stage: Stage) -> Iterator[None]:
    _drop_and(stage, "SELECT pg_create_physical_replication_slot(%s)", SLOT)
    yield
    _drop_slot(stage)


@contextlib.contextmanager
def _wal_level_replica(stage: Stage) -> Iterator[None]:
    """A server that has a logical slot does not start so: it is dropped first, and kept from being recreated."""
    with _no_replication(stage):
        _drop_slot(stage)
        stage.set(wal_level="replica")
        stage.server.restart()
    yield
    stage.set(wal_level="")
    stage.server.restart()


@contextlib.contextmanager
def _plugin_removed(stage: Stage) -> Iterator[None]:
    with stage.connect() as connection, offered_libraries(connection) as offer:
        offer(*(plugin for plugin in (*PLUGINS, "test_decoding") if plugin != stage.plugin))
        stage.end_stream()
        yield
        connection.execute("ALTER DATABASE postgres RESET dynamic_library_path")


@contextlib.contextmanager
def _wal2json_removed_for_good(stage: Stage) -> Iterator[None]:
    with stage.connect() as connection, offered_libraries(connection) as offer:
        offer("pgoutput")
        stage.end_stream()
        yield
        stage.wait(lambda: stage.slot().get("plugin") == "pgoutput", "pgoutput takes its place")
        connection.execute("ALTER DATABASE postgres RESET dynamic_library_path")


@contextlib.contextmanager
def _no_free_slot(stage: Stage) -> Iterator[None]:
    for number in range(1, _SLOTS):
        stage.sql("SELECT pg_create_physical_replication_slot(%s)", [f"filler_{number}"])
    _drop_and(stage, "SELECT pg_create_physical_replication_slot('one_too_many')")
    yield
    for name in ("one_too_many", *(f"filler_{number}" for number in range(1, _SLOTS))):
        _drop_slot(stage, name)


@contextlib.contextmanager
def _no_free_walsender(stage: Stage) -> Iterator[None]:
    with ExitStack() as held:

        def taken() -> bool:
            """Also the one that the stream has just let go of, before it can have it again."""
            for _ in range(2):
                with contextlib.suppress(psycopg.OperationalError):
                    held.enter_context(psycopg.connect(stage.dsn, replication="database", autocommit=True))
                    return True
                stage.end_stream()
            return False

        for number in range(_WALSENDERS):
            eventually(taken, what=f"others hold {number + 1} walsenders")
        yield


@contextlib.contextmanager
def _no_replication(stage: Stage) -> Iterator[None]:
    stage.sql(sql.SQL("ALTER ROLE {} NOREPLICATION").format(sql.Identifier(ROLE)))
    stage.end_stream()
    yield
    stage.sql(sql.SQL("ALTER ROLE {} REPLICATION").format(sql.Identifier(ROLE)))


@contextlib.contextmanager
def _breaks_at_one_place(stage: Stage) -> Iterator[None]:
    """As by a fault in the plugin that takes the walsender down: the link breaks before the message arrives."""
    stage.proxy.snap(_UNDELIVERABLE.encode())
    stage.sql("SELECT pg_logical_emit_message(true, %s, %s)", [message_prefix("public"), _UNDELIVERABLE])
    yield
    stage.wait(lambda: stage.now.recreated, "the slot is recreated behind it")
    stage.proxy.open()


@contextlib.contextmanager
def _black_hole(stage: Stage) -> Iterator[None]:
    stage.proxy.hold()
    yield
    # What was in the hole is gone: the server's half of a dead connection never hears of us again.
    stage.proxy.cut()
    stage.proxy.open()


@contextlib.contextmanager
def _event_loop_blocked(stage: Stage) -> Iterator[None]:
    """By a handler, for longer than the server waits for an answer of the stream."""
    long_s = min(20.0, 3 * stage.pace.wal_sender_timeout_s)
    stage.sql(
        "SELECT publish_change('counted', 'blocks', 'INSERT', jsonb_build_object('blocks_s', %s::float8))", [long_s]
    )
    ended = "SELECT count(ended) FROM calls WHERE key = 'blocks'"
    [(before,)] = stage.sql(ended)
    stage.wait(lambda: stage.sql(ended) != [(before,)], "the handler returns")
    yield


@contextlib.contextmanager
def failing_over() -> Iterator[tuple[TempServer, str, Fault]]:
    """A primary whose commits wait for its standby; the DSN that leads to the one in charge; the primary dies."""

    @contextlib.contextmanager
    def broken(stage: Stage) -> Iterator[None]:
        stage.server.stop("immediate")
        standby.promote()
        yield

    with TempServer(durable=False, settings=SERVER) as primary:
        prepare(primary.dsn())
        with standing_by(primary) as (standby, dsn):
            with psycopg.connect(primary.dsn(), autocommit=True) as db:
                db.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
                db.execute("SELECT pg_reload_conf()")
            yield primary, dsn, Fault(FAILOVER, broken, None, anew=True, restarts=True)


FAILOVER = "primary dies, a standby without the slot is promoted"
FAULTS = (
    Fault("slot dropped", _slot_dropped, Reason.SERVER_SHUTDOWN, anew=True),
    Fault("slot lost (`max_slot_wal_keep_size`)", _slot_lost, None, anew=True),
    Fault("slot read by another process", _slot_held, Reason.SLOT_BUSY, "stands by", lasts=True),
    Fault("slot of another plugin under our name", _slot_of_another_plugin, Reason.SLOT_FOREIGN, "CDC_SLOT_NAME",
          lasts=True, anew=True),
    Fault("slot of another database under our name", _slot_of_another_database, Reason.SLOT_FOREIGN, "CDC_SLOT_NAME",
          lasts=True, anew=True),
    Fault("physical slot under our name", _physical_slot, Reason.SLOT_FOREIGN, "CDC_SLOT_NAME",
          lasts=True, anew=True, plugins=("pgoutput",)),
    Fault("plugin removed", _plugin_removed, Reason.PLUGIN_MISSING, "install", lasts=True),
    Fault("wal2json removed, `CDC_SLOT_PLUGIN=auto`", _wal2json_removed_for_good, None, anew=True,
          plugins=("wal2json",), settings={"slot_plugin": "auto"}),
    Fault("no free slot", _no_free_slot, Reason.NO_FREE_SLOT, "max_replication_slots", lasts=True, anew=True,
          plugins=("wal2json",)),
    Fault("no free walsender", _no_free_walsender, Reason.NO_FREE_WALSENDER, "max_wal_senders", lasts=True,
          plugins=("pgoutput",)),
    Fault("role without `REPLICATION`", _no_replication, Reason.NO_REPLICATION_ROLE, "ALTER ROLE", lasts=True,
          plugins=("wal2json",)),
    Fault("stream breaks at one place at every start", _breaks_at_one_place, Reason.NETWORK, anew=True),
    Fault("link of the stream a black hole", _black_hole, Reason.STALLED, lasts=True),
    Fault("event loop blocked for longer than `wal_sender_timeout`", _event_loop_blocked, None),
    Fault("`wal_level = replica`", _wal_level_replica, Reason.WAL_LEVEL, "wal_level = logical",
          lasts=True, anew=True, restarts=True),
)  # fmt: skip
"""The last one restarts the server. ``failing_over`` has one more, which needs two."""


# --- the course of each --------------------------------------------------------------------------------------------


def suffer(stage: Stage, fault: Fault) -> Outcome:
    """The fault happens, and is fixed; AssertionError where anything of it goes another way than promised."""
    before, log = stage.now, len(stage.process.log)
    broken_at = time.monotonic()
    with fault.broken(stage):
        since = time.monotonic()
        if fault.lasts:
            _shown(stage, fault, before)
            stage.keeps_up()
    since = time.monotonic() if fault.lasts else since
    if fault.anew:
        stage.wait(lambda: "created the slot" in stage.process.log[log:], "the slot is recreated")
    stage.streams_again(since)
    facts = stage.slot()
    created = stage.process.log[log:].count("created the slot")
    account = stage.ends_in_peace()
    _told(stage, fault, log)
    assert facts["active"], facts
    assert facts["wal_status"] != "lost", facts
    assert bool(created) == fault.anew, stage.process.log
    _accounted(account, fault)
    series = stage.moments_since(broken_at)
    return Outcome(
        fault.name,
        stage.plugin,
        slot=_became_of_it(stage, facts, created),
        restored_s=restored_s(series, since),
        swept_s=swept_s(series),
        captured=len(account.captured),
        lost=len(account.lost),
    )


def _became_of_it(stage: Stage, facts: SlotFacts, created: int) -> str:
    if not created:
        return "kept"
    return "recreated" if facts["plugin"] == stage.plugin else f"recreated with {facts['plugin']}"


def _shown(stage: Stage, fault: Fault, before: Moment) -> None:
    """The metrics tell the mode and its reason, for as long as it lasts."""
    reason = str(fault.reason)
    role = "standby" if fault.reason is Reason.SLOT_BUSY else "sweeping"
    stage.wait(lambda: stage.now.ends(reason) > before.ends(reason), f"an end by {reason} is counted")
    stage.wait(lambda: stage.now.role == role and stage.now.unavailable, f"it says that it is {role}")
    if fault.reason is not Reason.STALLED:  # what is tried again at once stalls, is refused, stalls
        stage.wait(lambda: stage.now.unavailable == reason, f"it says {reason}")


def _told(stage: Stage, fault: Fault, log: int) -> None:
    """The log has the reason and the remedy; a stream that is not touched says nothing at all."""
    told = stage.logged_since(log)
    if fault.reason is not None:
        # What the server says last is lost where the link is reset under it.
        reasons = {fault.reason} | ({Reason.NETWORK} if fault.reason is Reason.SERVER_SHUTDOWN else set())
        assert any(reason in reasons and fault.remedy in text for reason, text in told), told
    elif not fault.anew:
        assert told == []
    else:
        assert told
    assert "Traceback" not in stage.process.log


def _accounted(account: Account, fault: Fault) -> None:
    assert account.committed
    assert account.lost == set()
    assert account.out_of_order == []
    assert fault.restarts or account.doubled == 0
    assert all(processed for *_, processed in account.captured)


def restored_s(series: list[Moment], since: float) -> float:
    """From ``since`` to the first wake-up by the slot after the last look at which it did not stream."""
    silent = [number for number, moment in enumerate(series) if moment.role != "streaming"]
    streaming = series[silent[-1] + 1 :] if silent else [moment for moment in series if moment.at >= since]
    notified = next(moment for moment in streaming if moment.notified > streaming[0].notified)
    return max(0.0, notified.at - since)


def swept_s(series: list[Moment]) -> float:
    """The time between two wake-ups by the slot, where it was not streaming at some moment of it.

    Also before it knew: a link may be dead long before one can tell. Without the time in which the process stood still.
    """
    swept = gap = 0.0
    noticed = False
    for earlier, later in pairwise(series):
        length = later.at - earlier.at
        gap += length if length < 1.0 else 0.0
        noticed = noticed or later.role != "streaming"
        if later.notified > earlier.notified:
            swept += gap if noticed else 0.0
            gap, noticed = 0.0, False
    return swept
