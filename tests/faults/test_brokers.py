"""Deliveries to real brokers while brokers, links and consumers break: the ledger has the broker as its other side."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest

from cdc.app.application import App
from cdc.app.secret_file import SecretFile
from tests.eventually import eventually, eventually_async
from tests.faults.broker_ledger import Captured, Read, judge
from tests.faults.kafka_nodes import KafkaNodes
from tests.fix_brokers import BrokerServer, KafkaServer, NatsServer
from tests.fix_consumer import ROOT, Process, consuming, metric, settled, states
from tests.fix_proxy import Proxy
from tests.forked import Forked
from tests.small_disk import SmallDisk

pytestmark = pytest.mark.timeout(900)  # several waits of _SETTLED_S

_KEYS = 30
_SETTLED_S = 240.0
"""For a thousand changes after the last fault; Kafka that is killed three times takes 46 s with nothing beside it."""
_QUICK: dict[str, Any] = {"backoff_base": 0.01, "backoff_cap": 0.05}


def _publish(db: psycopg.Connection, count: int, size: int = 10) -> None:
    db.execute(
        "SELECT publish_change('x', 'k' || n %% %s, 'INSERT', jsonb_build_object('n', repeat('x', %s)))"
        " FROM generate_series(1, %s) AS n",
        [_KEYS, size, count],
    )


def _violations(
    db: psycopg.Connection, broker: BrokerServer | KafkaNodes, copies_max: int | None = None, after: int = 0
) -> list[str]:
    """``after``: the number of the last change that is not asked for."""
    rows = db.execute(
        "SELECT seq, entity_id, id::text, CASE WHEN processed THEN 'processed' WHEN dead_at IS NOT NULL THEN 'dead'"
        " WHEN next_attempt_at IS NOT NULL THEN 'waiting' ELSE 'fresh' END FROM entity_changes WHERE seq > %s",
        [after],
    ).fetchall()
    received = broker.received()
    events = [each.event for each in (received if isinstance(received, list) else asyncio.run(received))]
    read = [Read(int(event["sequence"]), event["subject"], event["id"]) for event in events]
    if isinstance(broker, NatsServer):
        copies_max = 1  # the stream drops the others
    return judge([Captured(*row) for row in rows], read, copies_max=copies_max)


async def _until(condition: Callable[[], object], what: str, within_s: float = _SETTLED_S) -> None:
    async def check() -> bool:
        return bool(condition())

    await eventually_async(check, what=what, within_s=within_s)


def _processed_more_than(db: psycopg.Connection, count: int) -> bool:
    return states(db).get("processed", 0) > count


def _failed(app: App) -> float:
    """Messages that did not reach the broker, or without an acknowledgement."""
    count = partial(metric, app.metrics.registry, "cdc_delivery_requests_total")
    return count(result="broken") + count(result="unreached")


@pytest.fixture
def link(broker: BrokerServer) -> Iterator[Proxy]:
    running = broker.proxy()
    running.start()
    yield running
    running.stop()


async def _killed(app: App, broker: BrokerServer, link: Proxy) -> None:
    await asyncio.to_thread(broker.kill)
    link.cut()
    before = _failed(app)
    await _until(lambda: _failed(app) > before, "nothing reaches the broker")
    await asyncio.to_thread(broker.start)


async def _cut(app: App, broker: BrokerServer, link: Proxy) -> None:
    before = link.accepted
    link.cut()
    await _until(lambda: link.accepted > before, "it connects again")


async def _unreachable(app: App, broker: BrokerServer, link: Proxy) -> None:
    before = _failed(app)
    link.refuse()
    await _until(lambda: _failed(app) > before, "nothing reaches the broker")


async def _frozen(app: App, broker: BrokerServer, link: Proxy) -> None:
    before = _failed(app)
    link.hold()
    await _until(lambda: _failed(app) > before, "no acknowledgement comes")


async def _way_gone(app: App, broker: BrokerServer, link: Proxy) -> None:
    before = _failed(app)
    link.swallow()
    await _until(lambda: _failed(app) > before, "no acknowledgement comes")
    link.cut()  # the network is back, and knows nothing of the connections


async def _answer_lost(app: App, broker: BrokerServer, link: Proxy) -> None:
    before = link.lost
    link.lose()
    await _until(lambda: link.lost > before, "an answer is lost")


_Fault = Callable[[App, BrokerServer, Proxy], Awaitable[None]]


@pytest.mark.promise("G1")
@pytest.mark.promise("G3")
@pytest.mark.parametrize(
    "fault", [_killed, _cut, _unreachable, _frozen, _way_gone, _answer_lost], ids=lambda fault: fault.__name__[1:]
)
async def test_a_broker_that_fails_while_changes_come_gets_each_of_them_in_the_order_of_its_key(
    fault: _Fault, broker: BrokerServer, link: Proxy, outbox: str, outbox_db: psycopg.Connection
) -> None:
    await broker.prepare()
    url = broker.url(port=link.port)
    async with consuming(outbox, None, deliver_to=url, max_attempts=1, timeout=1, deliver_batch=50, **_QUICK) as app:
        for _ in range(3):
            more = partial(_processed_more_than, outbox_db, states(outbox_db).get("processed", 0))
            _publish(outbox_db, 300)
            await _until(more, "some arrive", within_s=_SETTLED_S)
            _publish(outbox_db, 100)
            await fault(app, broker, link)
            link.open()
        await _until(lambda: settled(outbox_db), "every change is processed or dead", within_s=_SETTLED_S)
    assert states(outbox_db) == {"processed": 1_200}
    assert await asyncio.to_thread(_violations, outbox_db, broker) == []


@pytest.mark.promise("G1")
@pytest.mark.promise("G3")
@pytest.mark.parametrize(
    "point",
    ["deliver.before_send", "deliver.after_send", "run.after_handler", "settle.before_commit", "settle.after_commit"],
)
def test_a_consumer_that_is_killed_around_a_send_or_its_mark_loses_nothing_and_keeps_the_order(
    point: str,
    broker: BrokerServer,
    outbox_db: psycopg.Connection,
    tmp_path: Path,
    processes: list[Process],
) -> None:
    asyncio.run(broker.prepare())
    _publish(outbox_db, 3_600)  # a settle has up to 1,000: the third one comes
    outbox, log = outbox_db.info.dsn, tmp_path / "crashing.log"
    log.touch()
    options = ["--deliver-to", broker.url(), "--batch", "50", "--slot-name", "crashing", "--http-port", "0"]
    crashing = Forked(
        "tests.faults.crashing",
        [point, "3", "run", *options],
        cwd=ROOT,
        environment={**os.environ, "CDC_DSN": outbox},
        log=log,
    )
    try:
        assert crashing.wait(_SETTLED_S) == -signal.SIGKILL, log.read_text()
    finally:
        crashing.kill()
        crashing.wait()
    _publish(outbox_db, 200)
    processes.append(Process(outbox, tmp_path / "clean.log", deliver_to=broker.url()))
    eventually(lambda: settled(outbox_db), what="the clean consumer finishes", within_s=_SETTLED_S)
    processes[-1].terminate()
    assert states(outbox_db) == {"processed": 3_800}
    assert _violations(outbox_db, broker, copies_max=2) == []
    outbox_db.execute(
        "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = 'crashing'"
    )


@pytest.mark.promise("G1")
async def test_what_is_taken_away_from_under_a_delivery_and_made_again_gets_all_that_came_since(
    broker: BrokerServer, outbox: str, outbox_db: psycopg.Connection
) -> None:
    await broker.prepare()
    async with consuming(outbox, None, deliver_to=broker.url(), max_attempts=1_000, **_QUICK):
        _publish(outbox_db, 100)
        await _until(lambda: settled(outbox_db), "the first ones arrive", within_s=_SETTLED_S)
        await broker.remove()
        _publish(outbox_db, 200)
        if broker.scheme != "redis":  # whose first entry makes a stream
            refused = "SELECT FROM entity_changes WHERE error_count > 0 LIMIT 1"
            await _until(lambda: outbox_db.execute(refused).fetchall(), "an attempt fails", within_s=_SETTLED_S)
            assert states(outbox_db)["processed"] == 100
            await broker.prepare_again()
        await _until(lambda: settled(outbox_db), "every change is processed or dead", within_s=_SETTLED_S)
    assert states(outbox_db) == {"processed": 300}
    assert await asyncio.to_thread(_violations, outbox_db, broker, None, 100) == []


@pytest.fixture
def kafka_on_small_disk(kafka: KafkaServer, tmp_path: Path) -> Iterator[tuple[KafkaServer, SmallDisk]]:
    """``kafka`` skips where there is none."""
    with contextlib.ExitStack() as undo:
        try:
            disk = undo.enter_context(SmallDisk())
        except OSError as refused:
            pytest.skip(f"a small disk cannot be mounted here: {refused}")
        server = KafkaServer(tmp_path, {"log.dirs": str(disk.folder / "data"), "log.segment.bytes": "1048576"})
        server.start()
        undo.callback(server.end)
        yield server, disk


@pytest.mark.promise("G1")
@pytest.mark.promise("G3")
async def test_a_broker_that_is_full_has_changes_wait_until_there_is_room_and_no_attempt_is_counted(
    broker: BrokerServer, outbox: str, outbox_db: psycopg.Connection
) -> None:
    """The stream of NATS at its limit, Redis at its memory's, RabbitMQ with an alarm about its disk."""
    if isinstance(broker, KafkaServer):
        pytest.skip("it ends when its disk is full: the next test")
    await broker.prepare()
    async with consuming(outbox, None, deliver_to=broker.url(), max_attempts=1, timeout=1, **_QUICK) as app:
        _publish(outbox_db, 200)
        await _until(lambda: settled(outbox_db), "the first ones arrive", within_s=_SETTLED_S)
        await broker.fill()
        try:
            _publish(outbox_db, 300)
            before = _failed(app)
            await _until(lambda: _failed(app) > before, "nothing is taken", within_s=_SETTLED_S)
            await _until(lambda: app.status.breakers["deliver"].rests, "the delivery rests", within_s=_SETTLED_S)
        finally:
            await broker.make_room()
        await _until(lambda: settled(outbox_db), "every change is processed or dead", within_s=_SETTLED_S)
    assert states(outbox_db) == {"processed": 500}
    assert await asyncio.to_thread(_violations, outbox_db, broker) == []


@pytest.mark.promise("G1")
@pytest.mark.promise("G3")
async def test_kafka_ends_when_its_disk_is_full_and_gets_all_that_waited_when_it_is_back(
    kafka_on_small_disk: tuple[KafkaServer, SmallDisk], outbox: str, outbox_db: psycopg.Connection
) -> None:
    broker, disk = kafka_on_small_disk
    await broker.prepare()
    async with consuming(outbox, None, deliver_to=broker.url(), max_attempts=1, timeout=5, **_QUICK):
        _publish(outbox_db, 200)
        await _until(lambda: settled(outbox_db), "the first ones arrive", within_s=_SETTLED_S)
        disk.fill()
        _publish(outbox_db, 300, size=20_000)
        await _until(lambda: broker.has_ended, "it ends", within_s=_SETTLED_S)
        disk.free()
        await asyncio.to_thread(broker.restart)
        await _until(lambda: settled(outbox_db), "every change is processed or dead", within_s=_SETTLED_S)
    assert states(outbox_db) == {"processed": 500}
    assert await asyncio.to_thread(_violations, outbox_db, broker) == []


@pytest.mark.promise("G1")
@pytest.mark.promise("G3")
async def test_a_password_that_is_replaced_under_load_is_used_from_the_next_connection_on(
    broker: BrokerServer, outbox: str, outbox_db: psycopg.Connection, tmp_path: Path
) -> None:
    """First in the broker, then in the file: between the two its login is refused, which is an outage."""
    await broker.prepare()
    await broker.let_in("rotating", "the first")
    (password := tmp_path / "password").write_text("the first")
    login: dict[str, Any] = {"deliver_user": "rotating", "deliver_password": SecretFile(str(password), "X")}
    url = broker.login_url()
    async with consuming(outbox, None, deliver_to=url, max_attempts=1, timeout=5, **login, **_QUICK) as app:
        _publish(outbox_db, 300)
        await _until(lambda: _processed_more_than(outbox_db, 0), "some arrive", within_s=_SETTLED_S)
        await broker.let_in("rotating", "the second")
        _publish(outbox_db, 300)
        refused = lambda: "refuses the login" in app.status.breakers["deliver"].why  # noqa: E731
        await _until(refused, "the login is refused", within_s=_SETTLED_S)
        password.write_text("the second")
        await _until(lambda: settled(outbox_db), "every change is processed or dead", within_s=_SETTLED_S)
    assert states(outbox_db) == {"processed": 600}
    assert await asyncio.to_thread(_violations, outbox_db, broker) == []


@pytest.mark.promise("G4")
async def test_a_message_that_is_too_large_is_a_dead_letter_and_takes_no_other_with_it(
    broker: BrokerServer, outbox: str, outbox_db: psycopg.Connection
) -> None:
    await broker.prepare()
    _publish(outbox_db, 40)
    outbox_db.execute(
        "SELECT publish_change('x', 'k' || n, 'INSERT', jsonb_build_object('n', repeat('x', 3000000)))"
        " FROM generate_series(1, 3) AS n"
    )
    _publish(outbox_db, 40)
    async with consuming(outbox, None, deliver_to=broker.url(), max_attempts=1):
        await _until(lambda: settled(outbox_db), "every change is processed or dead", within_s=_SETTLED_S)
    large = 0 if broker.scheme == "redis" else 3  # which takes 512 MB
    assert states(outbox_db).get("dead", 0) == large
    assert await asyncio.to_thread(_violations, outbox_db, broker) == []


@pytest.fixture
def kafka_nodes(kafka: KafkaServer, tmp_path: Path) -> Iterator[KafkaNodes]:
    """``kafka`` skips where there is none."""
    nodes = KafkaNodes(tmp_path)
    try:
        nodes.start(0, 1, 2)
        nodes.make_topic()
        yield nodes
    finally:
        nodes.end()


@pytest.mark.promise("G1")
@pytest.mark.promise("G3")
async def test_a_partition_whose_leader_goes_under_load_has_each_change_once_and_in_order(
    kafka_nodes: KafkaNodes, outbox: str, outbox_db: psycopg.Connection
) -> None:
    """The producer stays, and its retries go to the new leader, which knows what the old one has taken of it."""
    url = f"kafka://{kafka_nodes.servers}/cdc.{{type}}"
    async with consuming(outbox, None, deliver_to=url, max_attempts=1, deliver_batch=50, **_QUICK) as app:
        for _ in range(2):
            more = partial(_processed_more_than, outbox_db, states(outbox_db).get("processed", 0))
            _publish(outbox_db, 600)
            await _until(more, "some arrive", within_s=_SETTLED_S)
            before = await asyncio.to_thread(kafka_nodes.leader)
            await asyncio.to_thread(kafka_nodes.kill, before)
            await _until(lambda: settled(outbox_db), "all arrive without it", within_s=_SETTLED_S)
            assert await asyncio.to_thread(kafka_nodes.leader) != before
            kafka_nodes.start(before)
            await asyncio.to_thread(
                eventually, lambda: kafka_nodes.in_sync() == 3, within_s=_SETTLED_S, what="it has caught up"
            )
        assert _failed(app) == 0
    assert states(outbox_db) == {"processed": 1_200}
    assert await asyncio.to_thread(_violations, outbox_db, kafka_nodes, 1) == []


_ROWS = [Captured(1, "a", "one", "processed"), Captured(2, "a", "two", "processed")]
_ONE, _TWO = Read(1, "a", "one"), Read(2, "a", "two")


@pytest.mark.parametrize(
    ("read", "verdict"),
    [
        ([_ONE, _TWO], []),
        ([_ONE, _ONE, _TWO, _ONE], []),
        ([_ONE], ["lost"]),
        ([_TWO, _ONE], ["out of order"]),
        ([_ONE, _TWO, Read(3, "a", "three")], ["not what was captured"]),
        ([_ONE, _ONE, _ONE, _ONE, _TWO], ["4 copies"]),
    ],
)
def test_the_judge_sees_a_loss_a_stranger_disorder_and_too_many_copies(read: list[Read], verdict: list[str]) -> None:
    assert [each.partition(":")[0] for each in judge(_ROWS, read, copies_max=3)] == verdict


def test_the_judge_sees_what_is_not_settled_and_a_dead_letter_that_is_there() -> None:
    rows = [Captured(1, "a", "one", "dead"), Captured(2, "a", "two", "waiting")]
    found = [each.partition(":")[0] for each in judge(rows, [_ONE])]
    assert found == ["a dead letter, and there", "not settled"]
