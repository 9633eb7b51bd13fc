"""Changes delivered to brokers: real servers, that stop, start again, refuse and are full."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest
from cloudevents.core.bindings.kafka import KafkaMessage, from_kafka_event
from cloudevents.core.bindings.rabbitmq import RabbitMQMessage, from_rabbitmq_event

from cdc.app import config, delivery
from cdc.app.secret_file import SecretFile
from cdc.diagnostics.findings import Severity
from cdc.postgres import tracking
from tests.commands import done
from tests.eventually import eventually, eventually_async
from tests.fix_brokers import BrokerServer, KafkaServer, NatsServer, RabbitServer, Received, RedisServer, tls_files
from tests.fix_consumer import Process, consuming, metric, settled, states

_QUICK: dict[str, Any] = {"backoff_base": 0.01, "backoff_cap": 0.05}


def _publish(db: psycopg.Connection, count: int, keys: int = 1, entity_type: str = "x") -> None:
    db.execute(
        "SELECT publish_change(%s, 'k' || n %% %s, 'INSERT', jsonb_build_object('n', n))"
        " FROM generate_series(1, %s) AS n",
        [entity_type, keys, count],
    )


async def _all_settled(db: psycopg.Connection, within_s: float = 30.0) -> None:
    async def check() -> bool:
        return settled(db)

    await eventually_async(check, what="every change processed or dead", within_s=within_s)


async def _true(condition: Any, what: str = "") -> None:
    async def check() -> bool:
        return bool(condition())

    await eventually_async(check, what=what)


def _errors(db: psycopg.Connection) -> set[str]:
    return {
        text for (text,) in db.execute("SELECT DISTINCT last_error FROM entity_changes WHERE last_error IS NOT NULL")
    }


def _attempts(db: psycopg.Connection) -> int:
    [(count,)] = db.execute("SELECT coalesce(sum(error_count), 0) FROM entity_changes").fetchall()
    return int(count)


def _by_key(received: Sequence[Received]) -> dict[str, list[int]]:
    """Numbers of the changes by key, each at its first appearance."""
    found: dict[str, list[int]] = defaultdict(list)
    for event in (each.event for each in received):
        number = int(event["sequence"])
        if number not in found[event["subject"]]:
            found[event["subject"]].append(number)
    return found


def _whole_and_in_order(received: Sequence[Received], count: int) -> bool:
    by_key = _by_key(received)
    return sum(map(len, by_key.values())) == count and all(each == sorted(each) for each in by_key.values())


def _more_than(db: psycopg.Connection, processed: int) -> bool:
    return states(db).get("processed", 0) > processed


async def test_a_change_becomes_a_message_with_its_event(
    broker: BrokerServer, outbox: str, outbox_db: psycopg.Connection
) -> None:
    await broker.prepare()
    outbox_db.execute("CREATE TABLE orders (id int PRIMARY KEY, total numeric)")
    tracking.track(outbox_db, "public", "orders", entity_type="order")
    outbox_db.execute("INSERT INTO orders VALUES (1, 12.50)")
    outbox_db.execute("UPDATE orders SET total = 15")
    async with consuming(outbox, None, deliver_to=broker.url()) as app:
        await _all_settled(outbox_db)
        assert metric(app.metrics.registry, "cdc_delivery_requests_total", result="acknowledged") == 2
    insert, update = await broker.received()
    assert insert.name == broker.url().rpartition("/")[2].format(type="order")
    assert (insert.event["type"], update.event["type"]) == ("cdc.order.insert", "cdc.order.update")
    assert '"total": 12.50' in insert.body.decode(), "no digit of a number is lost"
    assert update.event["data"]["new"] == {"id": 1, "total": 15}
    assert update.event["partitionkey"] == "order/1"
    assert states(outbox_db) == {"processed": 2}


async def test_only_the_types_asked_for_are_delivered(
    broker: BrokerServer, outbox: str, outbox_db: psycopg.Connection
) -> None:
    await broker.prepare()
    _publish(outbox_db, 3, entity_type="wanted")
    _publish(outbox_db, 3, entity_type="other")
    async with consuming(outbox, None, deliver_to=broker.url(), deliver_types=("wanted",)):
        await _true(lambda: states(outbox_db) == {"processed": 3, "fresh": 3})
    assert {each.event["data"]["entity_type"] for each in await broker.received()} == {"wanted"}


async def test_the_changes_of_a_key_arrive_in_their_order_whatever_is_sent_together(
    broker: BrokerServer, outbox: str, outbox_db: psycopg.Connection
) -> None:
    await broker.prepare()
    _publish(outbox_db, 2_000, 7)
    async with consuming(outbox, None, deliver_to=broker.url()):
        await _all_settled(outbox_db)
    received = await broker.received()
    assert len(received) == 2_000
    assert _whole_and_in_order(received, 2_000)


async def test_a_broker_that_is_away_at_the_start_costs_waiting_and_no_attempt(
    broker: BrokerServer, outbox: str, outbox_db: psycopg.Connection
) -> None:
    await broker.prepare()
    broker.kill()
    _publish(outbox_db, 20, 20)
    async with consuming(outbox, None, deliver_to=broker.url(), max_attempts=1) as app:
        await _true(lambda: app.status.breakers["deliver"].rests, what="the delivery rests")
        assert f"cannot be reached ({broker.refused})" in app.status.breakers["deliver"].why
        [check] = [check for check in app.readiness() if check.name == "application"]
        assert not check.ok
        assert states(outbox_db) == {"fresh": 20}
        await asyncio.to_thread(broker.start)
        await _all_settled(outbox_db)
    assert _attempts(outbox_db) == 0
    assert _whole_and_in_order(await broker.received(), 20)


async def test_a_broker_that_is_killed_meanwhile_loses_nothing_and_keeps_the_order(
    broker: BrokerServer, outbox: str, outbox_db: psycopg.Connection
) -> None:
    await broker.prepare()
    async with consuming(outbox, None, deliver_to=broker.url(), max_attempts=1, **_QUICK):
        for _ in range(3):
            _publish(outbox_db, 1_000, 50)
            await _true(lambda: states(outbox_db).get("processed", 0) > 0)
            await asyncio.to_thread(broker.restart)
        await _all_settled(outbox_db, within_s=120.0)  # a round trip to the broker for each of 60 rounds
    assert states(outbox_db) == {"processed": 3_000}
    assert _attempts(outbox_db) == 0
    assert _whole_and_in_order(await broker.received(), 3_000)


def test_a_consumer_that_is_killed_meanwhile_loses_nothing_and_keeps_the_order(
    broker: BrokerServer, outbox: str, outbox_db: psycopg.Connection, tmp_path: Path, processes: list[Process]
) -> None:
    asyncio.run(broker.prepare())
    for n in range(3):
        _publish(outbox_db, 1_000, 50)
        processes.append(Process(outbox, tmp_path / f"{n}.log", deliver_to=broker.url()))
        before = n * 1_000
        eventually(partial(_more_than, outbox_db, before), within_s=120.0, what="some are processed")
        processes[-1].kill()
    processes.append(Process(outbox, tmp_path / "last.log", deliver_to=broker.url()))
    eventually(lambda: settled(outbox_db), within_s=120.0, what="every change processed or dead")
    assert states(outbox_db) == {"processed": 3_000}
    received = asyncio.run(broker.received())
    assert _whole_and_in_order(received, 3_000)
    if broker.scheme == "nats":
        assert len(received) == 3_000, "the stream drops doubles"


async def test_a_broker_that_is_silent_is_away(
    broker: BrokerServer, outbox: str, outbox_db: psycopg.Connection
) -> None:
    await broker.prepare()
    _publish(outbox_db, 1)
    async with consuming(outbox, None, deliver_to=broker.url(), max_attempts=1, timeout=0.5) as app:
        await _all_settled(outbox_db)
        broker.pause()
        _publish(outbox_db, 20, 20)
        await _true(lambda: metric(app.metrics.registry, "cdc_delivery_requests_total", result="broken") >= 1)
        broker.resume()
        await _all_settled(outbox_db)
    assert _attempts(outbox_db) == 0
    assert _whole_and_in_order(await broker.received(), 21)


@pytest.mark.parametrize("timeout", [0.5, 0], ids=["limited", "unlimited"])
async def test_a_broker_that_is_silent_while_more_is_sent_than_the_connection_holds_is_away(
    broker: BrokerServer, outbox: str, outbox_db: psycopg.Connection, timeout: float
) -> None:
    await broker.prepare()
    _publish(outbox_db, 1)
    async with consuming(outbox, None, deliver_to=broker.url(), max_attempts=1, timeout=timeout) as app:
        await _all_settled(outbox_db)
        broker.pause()
        outbox_db.execute(
            "SELECT publish_change('x', 'k' || n, 'INSERT', jsonb_build_object('n', repeat('x', 50000)))"
            " FROM generate_series(1, 300) AS n"
        )
        if timeout:
            await _true(lambda: metric(app.metrics.registry, "cdc_delivery_requests_total", result="broken") >= 1)
            broker.resume()
        else:
            await asyncio.to_thread(broker.restart)
        await _all_settled(outbox_db)
    assert _attempts(outbox_db) == 0
    assert _whole_and_in_order(await broker.received(), 301)


async def test_the_doctor_reaches_the_broker_or_says_why_not(broker: BrokerServer) -> None:
    await broker.prepare()
    settings = config.from_options({"deliver_to": broker.url(), "deliver_types": ("order",)})
    found = await asyncio.to_thread(delivery.examine, settings)
    assert found is not None
    assert found.severity is Severity.OK, found
    assert "is reached; " in found.detail
    broker.kill()
    found = await asyncio.to_thread(delivery.examine, settings)
    assert found is not None
    assert found.severity is Severity.FAIL
    assert broker.refused in found.detail


async def test_with_tls_both_sides_show_their_certificates(
    small_broker: BrokerServer, outbox: str, outbox_db: psycopg.Connection, tmp_path: Path
) -> None:
    await small_broker.prepare()
    files = tls_files(tmp_path)
    await asyncio.to_thread(small_broker.restart, *small_broker.tls_options(files))
    _publish(outbox_db, 20, 20)
    url = small_broker.url().replace("://", "+tls://")
    async with consuming(outbox, None, deliver_to=f"{url}?cert={files.cert}&key={files.key}") as app:
        await _true(lambda: "its certificate: " in app.status.breakers["deliver"].why, what="it is not trusted")
    async with consuming(outbox, None, deliver_to=f"{url}?ca={tmp_path}/missing") as app:
        await _true(lambda: "cannot be read (No such file or directory)" in app.status.breakers["deliver"].why)
    async with consuming(outbox, None, deliver_to=f"{url}?ca={files.ca}&cert={files.cert}&key={files.key}"):
        await _all_settled(outbox_db)
    assert _attempts(outbox_db) == 0
    small_broker.kill()
    small_broker.options = ()
    await asyncio.to_thread(small_broker.start)
    assert _whole_and_in_order(await small_broker.received(), 20)


# --- NATS ----------------------------------------------------------------------------------------------------------


async def test_nats_without_a_stream_is_an_attempt_with_a_sentence_and_then_a_dead_letter(
    nats_server: NatsServer, outbox: str, outbox_db: psycopg.Connection
) -> None:
    _publish(outbox_db, 3, 3)
    async with consuming(outbox, None, deliver_to=nats_server.url(), max_attempts=2, **_QUICK):
        await _all_settled(outbox_db)
    assert states(outbox_db) == {"dead": 3}
    assert _attempts(outbox_db) == 6
    assert _errors(outbox_db) == {"no stream of JetStream takes the subject cdc.x: create one, or correct deliver.to"}
    settings = config.from_options({"deliver_to": nats_server.url(), "deliver_types": ("x",)})
    found = await asyncio.to_thread(delivery.examine, settings)
    assert found is not None
    assert (found.severity, found.detail) == (Severity.FAIL, _errors(outbox_db).pop())


async def test_a_message_that_is_too_large_for_nats_is_a_dead_letter_and_its_key_goes_on(
    nats_server: NatsServer, outbox: str, outbox_db: psycopg.Connection
) -> None:
    await nats_server.prepare(max_msg_size=100_000)
    sizes = "SELECT publish_change('x', 'k', 'INSERT', jsonb_build_object('t', repeat('x', %s)))"
    for size in (10, 200_000, 10, 2_000_000, 10):
        outbox_db.execute(sizes, [size])
    async with consuming(outbox, None, deliver_to=nats_server.url()):
        await _all_settled(outbox_db)
    assert states(outbox_db) == {"processed": 3, "dead": 2}
    by_stream, by_server = sorted(_errors(outbox_db), key=lambda text: "the server takes" in text)
    assert by_stream.startswith("rejected: it is too large for the stream")
    assert by_server.startswith("rejected: it is too large: 2000")
    assert len(await nats_server.received()) == 3


async def test_a_stream_of_nats_that_is_full_is_an_outage(
    nats_server: NatsServer, outbox: str, outbox_db: psycopg.Connection
) -> None:
    await nats_server.prepare(max_msgs=5, discard="new")
    _publish(outbox_db, 20, 20)
    async with consuming(outbox, None, deliver_to=nats_server.url(), max_attempts=1) as app:
        await _true(lambda: app.status.breakers["deliver"].rests, what="the delivery rests")
        assert "the stream takes nothing" in app.status.breakers["deliver"].why
        await nats_server.change(max_msgs=1_000, discard="new")
        await _all_settled(outbox_db)
    assert _attempts(outbox_db) == 0
    assert _whole_and_in_order(await nats_server.received(), 20)


async def test_a_login_without_a_right_to_publish_is_said_and_one_that_is_refused_is_an_outage(
    nats_server: NatsServer, tmp_path: Path, outbox: str, outbox_db: psycopg.Connection
) -> None:
    await nats_server.prepare()
    users = tmp_path / "users.conf"
    users.write_text(
        'authorization { users = [{user: app, password: "hunter", permissions: {publish: ["cdc.y", "$JS.>"]}}] }'
    )
    await asyncio.to_thread(nats_server.restart, "--config", str(users))
    password = tmp_path / "password"
    password.write_text("wrong")
    login: dict[str, Any] = {"deliver_user": "app", "deliver_password": SecretFile(str(password), "X")}
    _publish(outbox_db, 1)
    async with consuming(outbox, None, deliver_to=nats_server.url(), max_attempts=1, **login) as app:
        await _true(lambda: "refuses the login" in app.status.breakers["deliver"].why)
        assert states(outbox_db) == {"fresh": 1}
        password.write_text("hunter")  # it is read again
        await _all_settled(outbox_db)
    assert states(outbox_db) == {"dead": 1}
    assert _errors(outbox_db) == {"the login has no right to publish to the subject cdc.x"}


# --- Redis ---------------------------------------------------------------------------------------------------------


async def test_redis_that_has_no_memory_left_is_an_outage(
    redis_server: RedisServer, outbox: str, outbox_db: psycopg.Connection
) -> None:
    await redis_server.set("maxmemory", "1")
    _publish(outbox_db, 20, 20)
    async with consuming(outbox, None, deliver_to=redis_server.url(), max_attempts=1) as app:
        await _true(lambda: app.status.breakers["deliver"].rests, what="the delivery rests")
        assert "the server takes nothing (OutOfMemoryError)" in app.status.breakers["deliver"].why
        await redis_server.set("maxmemory", "0")
        await _all_settled(outbox_db)
    assert _attempts(outbox_db) == 0
    assert _whole_and_in_order(await redis_server.received(), 20)


async def test_partitions_of_redis_split_by_key_and_maxlen_limits_each(
    redis_server: RedisServer, outbox: str, outbox_db: psycopg.Connection
) -> None:
    _publish(outbox_db, 1_000, 100)
    async with consuming(outbox, None, deliver_to=redis_server.url() + "?partitions=4&maxlen=100000"):
        await _all_settled(outbox_db)
    received = await redis_server.received()
    streams = defaultdict(set)
    for each in received:
        streams[each.name].add(each.headers["cdc-partitionkey"])
    assert sorted(streams) == [f"cdc:x:{n}" for n in range(4)]
    assert sum(map(len, streams.values())) == 100, "a key is in one of them"
    assert _whole_and_in_order(received, 1_000)


async def test_a_key_of_redis_that_is_no_stream_is_an_attempt_with_a_sentence(
    redis_server: RedisServer, outbox: str, outbox_db: psycopg.Connection
) -> None:
    await redis_server.put("cdc:x", "text")
    _publish(outbox_db, 1)
    async with consuming(outbox, None, deliver_to=redis_server.url(), max_attempts=1):
        await _all_settled(outbox_db)
    assert states(outbox_db) == {"dead": 1}
    [text] = _errors(outbox_db)
    assert text.startswith("WRONGTYPE")


async def test_too_few_replicas_are_an_outage(
    redis_server: RedisServer, outbox: str, outbox_db: psycopg.Connection
) -> None:
    _publish(outbox_db, 1)
    async with consuming(outbox, None, deliver_to=redis_server.url() + "?wait=1", max_attempts=1) as app:
        await _true(lambda: metric(app.metrics.registry, "cdc_delivery_requests_total", result="broken") >= 1)
    assert _attempts(outbox_db) == 0
    assert _errors(outbox_db) <= {"fewer than 1 replicas have confirmed it"}
    assert json.loads((await redis_server.received())[0].body)["data"]["new"] == {"n": 1}


# --- Kafka ---------------------------------------------------------------------------------------------------------


async def test_a_record_of_kafka_has_the_key_of_its_change_and_stays_in_one_partition(
    kafka_server: KafkaServer, outbox: str, outbox_db: psycopg.Connection
) -> None:
    await kafka_server.prepare()
    _publish(outbox_db, 200, 20)
    async with consuming(outbox, None, deliver_to=kafka_server.url(), deliver_format="binary"):
        await _all_settled(outbox_db)
    received = await kafka_server.received()
    assert {each.key for each in received} == {f"x/k{n}" for n in range(20)}
    for each in received:
        message = KafkaMessage({name: value.encode() for name, value in each.headers.items()}, each.key, each.body)
        event = from_kafka_event(message)
        assert event.get_type() == "cdc.x.insert"
        assert event.get_extension("partitionkey") == each.key


async def test_a_topic_that_is_not_there_is_an_attempt_with_a_sentence(
    kafka_server: KafkaServer, outbox: str, outbox_db: psycopg.Connection
) -> None:
    await kafka_server.prepare(["x"])
    _publish(outbox_db, 2, 2, entity_type="missing")
    _publish(outbox_db, 2, 2)
    async with consuming(outbox, None, deliver_to=kafka_server.url(), max_attempts=1):
        await _all_settled(outbox_db)
    assert states(outbox_db) == {"processed": 2, "dead": 2}
    [error] = _errors(outbox_db)
    assert error.startswith("there is no topic cdc-")
    settings = config.from_options({"deliver_to": kafka_server.url(), "deliver_types": ("missing",)})
    found = await asyncio.to_thread(delivery.examine, settings)
    assert found is not None
    assert (found.severity, found.detail) == (Severity.FAIL, error)


async def test_a_record_that_is_too_large_is_a_dead_letter_and_its_neighbours_are_not(
    kafka_server: KafkaServer, outbox: str, outbox_db: psycopg.Connection
) -> None:
    await kafka_server.prepare(["x"], **{"max.message.bytes": "20000"})
    outbox_db.execute(
        "SELECT publish_change('x', 'k' || n, 'INSERT', jsonb_build_object('t', repeat('x', n)))"
        " FROM unnest(array_fill(10000, '{30}') || 50000 || 3000000) AS n"
    )
    async with consuming(outbox, None, deliver_to=kafka_server.url(), max_attempts=1):
        await _all_settled(outbox_db)
    assert states(outbox_db) == {"processed": 30, "dead": 2}
    assert all(text.startswith("rejected: it is too large for the topic") for text in _errors(outbox_db))


async def test_debezium_s_envelope_and_a_tombstone_behind_a_delete(
    kafka_server: KafkaServer, outbox: str, outbox_db: psycopg.Connection
) -> None:
    await kafka_server.prepare(["order"])
    outbox_db.execute("CREATE TABLE orders (id int PRIMARY KEY, total numeric)")
    done(outbox, "db", "ddl")
    done(outbox, "track", "orders", "--type", "order", "--ddl", "event")
    outbox_db.execute("ALTER TABLE orders ADD note text; ALTER TABLE orders DROP note")
    for statement in ("INSERT INTO orders VALUES (1, 12.50)", "UPDATE orders SET total = 15", "DELETE FROM orders"):
        outbox_db.execute(statement)
    url = kafka_server.url() + "?tombstones=true"
    async with consuming(outbox, None, deliver_to=url, deliver_format="debezium"):
        await _all_settled(outbox_db)
    *changes, tombstone = await kafka_server.received()
    insert, update, delete = (json.loads(each.body) for each in changes)
    assert [each["op"] for each in (insert, update, delete)] == ["c", "u", "d"]
    assert (insert["before"], insert["after"]) == (None, {"id": 1, "total": 12.5})
    assert (update["before"]["total"], update["after"]["total"]) == (12.5, 15)
    assert (delete["before"], delete["after"]) == ({"id": 1, "total": 15}, None)
    assert (insert["source"]["schema"], insert["source"]["table"]) == ("public", "orders")
    assert (tombstone.key, tombstone.body) == ("order/1", b"")


async def test_kafka_with_tls_and_certificates_or_with_a_login(
    kafka_server: KafkaServer, outbox: str, outbox_db: psycopg.Connection
) -> None:
    await kafka_server.prepare()
    files = kafka_server.files
    secure = kafka_server.url(port=kafka_server.secure_port).replace("://", "+tls://")
    _publish(outbox_db, 20, 20)
    async with consuming(outbox, None, deliver_to=secure) as app:
        await _true(lambda: "cannot be reached (no TLS" in app.status.breakers["deliver"].why, what="it is not trusted")
    async with consuming(outbox, None, deliver_to=f"{secure}?ca={files.ca}&cert={files.cert}&key={files.key}"):
        await _all_settled(outbox_db)
    _publish(outbox_db, 20, 20)
    login: dict[str, Any] = {"deliver_to": kafka_server.url(port=kafka_server.login_port), "deliver_user": "app"}
    async with consuming(outbox, None, **login, deliver_password="wrong") as app:
        await _true(lambda: "refuses the login" in app.status.breakers["deliver"].why)
    async with consuming(outbox, None, **login, deliver_password="hunter"):
        await _all_settled(outbox_db)
    assert _attempts(outbox_db) == 0
    assert _whole_and_in_order(await kafka_server.received(), 40)


# --- RabbitMQ ------------------------------------------------------------------------------------------------------


async def test_a_message_of_rabbitmq_has_its_id_and_routing_key_and_the_sdk_reads_it(
    rabbit_server: RabbitServer, outbox: str, outbox_db: psycopg.Connection
) -> None:
    await rabbit_server.prepare()
    _publish(outbox_db, 20, 20)
    async with consuming(outbox, None, deliver_to=rabbit_server.url("{type}.{operation}"), deliver_format="binary"):
        await _all_settled(outbox_db)
    for each in await rabbit_server.received():
        headers = dict(each.headers)
        event = from_rabbitmq_event(RabbitMQMessage(headers, headers.pop("content-type"), each.body))
        assert (each.name, event.get_type(), event.get_id()) == ("x.insert", "cdc.x.insert", each.key)


async def test_what_no_queue_takes_is_an_attempt_with_a_sentence_and_the_others_go_on(
    rabbit_server: RabbitServer, outbox: str, outbox_db: psycopg.Connection
) -> None:
    await rabbit_server.prepare(bound="wanted")
    _publish(outbox_db, 3, 3, entity_type="wanted")
    _publish(outbox_db, 3, 3, entity_type="other")
    async with consuming(outbox, None, deliver_to=rabbit_server.url(), max_attempts=1):
        await _all_settled(outbox_db)
    assert states(outbox_db) == {"processed": 3, "dead": 3}
    assert _errors(outbox_db) == {"no queue takes the routing key other: bind one, or correct deliver.to"}
    assert len(await rabbit_server.received()) == 3


async def test_an_exchange_that_is_not_there_is_an_attempt_with_a_sentence(
    rabbit_server: RabbitServer, outbox: str, outbox_db: psycopg.Connection
) -> None:
    await rabbit_server.prepare()
    _publish(outbox_db, 3, 3)
    url = f"amqp://{rabbit_server.address}/%2F/missing/x"
    async with consuming(outbox, None, deliver_to=url, max_attempts=2, **_QUICK):
        await _all_settled(outbox_db)
    assert states(outbox_db) == {"dead": 3}
    assert _errors(outbox_db) == {"the exchange is not there: declare it, or correct deliver.to"}
    found = await asyncio.to_thread(delivery.examine, config.from_options({"deliver_to": url}))
    assert found is not None
    assert (found.severity, found.detail) == (
        Severity.FAIL, "there is no exchange missing: declare it, or correct deliver.to",
    )  # fmt: skip


async def test_a_queue_that_is_full_is_an_outage(
    rabbit_server: RabbitServer, outbox: str, outbox_db: psycopg.Connection
) -> None:
    await rabbit_server.prepare(limits={"x-max-length": 5, "x-overflow": "reject-publish"})
    _publish(outbox_db, 20, 20)
    async with consuming(outbox, None, deliver_to=rabbit_server.url(), max_attempts=1) as app:
        await _true(lambda: app.status.breakers["deliver"].rests, what="the delivery rests")
        assert "a queue takes nothing" in app.status.breakers["deliver"].why
        seen: list[Received] = []

        async def read() -> bool:
            seen.extend(await rabbit_server.received())
            return settled(outbox_db)

        await eventually_async(read, what="all are taken as there is room")
    seen += await rabbit_server.received()
    assert _attempts(outbox_db) == 0
    assert _whole_and_in_order(seen, 20)


async def test_rabbitmq_with_tls_and_certificates_or_a_wrong_login(
    rabbit_server: RabbitServer, outbox: str, outbox_db: psycopg.Connection
) -> None:
    await rabbit_server.prepare()
    files = rabbit_server.files
    secure = rabbit_server.url(port=rabbit_server.secure_port).replace("amqp://", "amqps://")
    _publish(outbox_db, 20, 20)
    wrong: dict[str, Any] = {"deliver_user": "guest", "deliver_password": "wrong"}
    async with consuming(outbox, None, deliver_to=rabbit_server.url(), **wrong) as app:
        await _true(lambda: "refuses the login" in app.status.breakers["deliver"].why)
    async with consuming(outbox, None, deliver_to=secure) as app:
        await _true(lambda: "its certificate: " in app.status.breakers["deliver"].why, what="it is not trusted")
    async with consuming(outbox, None, deliver_to=f"{secure}?ca={files.ca}&cert={files.cert}&key={files.key}"):
        await _all_settled(outbox_db)
    assert _attempts(outbox_db) == 0
    assert _whole_and_in_order(await rabbit_server.received(), 20)
