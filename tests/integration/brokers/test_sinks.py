"""Handlers that transform and then send, through the sinks of ``cdc.sinks``, to real brokers."""

from __future__ import annotations

import asyncio
import contextlib
import json
from decimal import Decimal
from typing import Any
from urllib.parse import unquote

import psycopg
import pytest

import cdc
from cdc import sinks
from cdc.testing import change as make_change
from tests.eventually import eventually_async
from tests.fix_brokers import BrokerServer, KafkaServer, NatsServer, RedisServer
from tests.fix_consumer import consuming, settled, slot_name, states

_MADE = {"kafka": sinks.kafka, "nats": sinks.nats, "redis": sinks.redis, "amqp": sinks.amqp}
_QUICK: dict[str, Any] = {"backoff_base": 0.01, "backoff_cap": 0.05}


def _publish(db: psycopg.Connection, count: int, keys: int = 1) -> None:
    db.execute(
        "SELECT publish_change('x', 'k' || n %% %s, 'INSERT', jsonb_build_object('n', n))"
        " FROM generate_series(1, %s) AS n",
        [keys, count],
    )


async def _all_settled(db: psycopg.Connection) -> None:
    async def check() -> bool:
        return settled(db)

    await eventually_async(check, what="every change processed or dead", within_s=60.0)


def _sink(broker: BrokerServer) -> sinks.Sink:
    return _MADE[broker.scheme](broker.url().replace("{type}", "x"))


async def test_a_handler_sends_the_event_of_a_change_or_what_it_makes_of_it(
    broker: BrokerServer, outbox: str, outbox_db: psycopg.Connection
) -> None:
    await broker.prepare()
    router = cdc.Router()
    _publish(outbox_db, 2)
    async with _sink(broker) as sink:

        @router.on("x")
        async def forward(change: cdc.Change) -> None:
            if change.new["n"] == 1:
                await sink.send(change)
            else:
                made = sinks.Payload({"total": Decimal("12.50")}, headers={"origin": "test"})
                await sink.send(change, made)

        async with consuming(outbox, router):
            await _all_settled(outbox_db)
    assert states(outbox_db) == {"processed": 2}
    event, made = await broker.received()
    assert event.event["data"]["new"] == {"n": 1}
    assert made.body == b'{"total":12.50}'
    assert made.headers["origin"] == "test"
    assert made.headers["content-type"] == "application/json"
    ids = {name: value for name, value in made.headers.items() if name in {"cdc-id", "cdc_id"}}
    assert set(ids.values()) != {event.event["id"]}
    assert len(ids) == 1


async def test_a_batch_is_sent_together_in_order_and_each_change_has_an_error_of_its_own(
    broker: BrokerServer, outbox: str, outbox_db: psycopg.Connection
) -> None:
    await broker.prepare()
    router = cdc.Router()
    _publish(outbox_db, 300, 7)
    async with _sink(broker) as sink:

        def made(change: cdc.Change) -> sinks.Payload | None:
            number = change.new["n"]
            if number == 100:
                raise ValueError("no total")
            if number == 200:
                raise cdc.Reject("never")
            return None if number == 150 else sinks.Payload([change.entity_id, number])

        @router.on("x", batch=100)
        async def forward(changes: list[cdc.Change]) -> None:
            await sink.send_batch(changes, made)

        async with consuming(outbox, router, max_attempts=2, **_QUICK):
            await _all_settled(outbox_db)
    assert states(outbox_db) == {"processed": 298, "dead": 2}
    read = [json.loads(each.body) for each in await broker.received()]
    assert sorted(number for _, number in read) == [n for n in range(1, 301) if n not in {100, 150, 200}]
    by_key = [[number for key, number in read if key == f"k{n}"] for n in range(7)]
    assert all(numbers == sorted(numbers) for numbers in by_key)


async def test_a_broker_that_is_away_costs_a_handler_no_attempt(
    broker: BrokerServer, outbox: str, outbox_db: psycopg.Connection
) -> None:
    await broker.prepare()
    router = cdc.Router()
    async with _sink(broker) as sink:

        @router.on("x")
        async def forward(change: cdc.Change) -> None:
            await sink.send(change)

        async with consuming(outbox, router, max_attempts=1) as app:
            _publish(outbox_db, 20, 20)
            await _all_settled(outbox_db)
            await asyncio.to_thread(broker.kill)
            _publish(outbox_db, 20, 20)

            async def rests() -> bool:
                return app.status.breakers["forward"].rests

            await eventually_async(rests, what="the handler rests")
            await asyncio.to_thread(broker.start)
            await _all_settled(outbox_db)
    assert states(outbox_db) == {"processed": 40}
    assert len({each.event["id"] for each in await broker.received()}) == 40


async def test_a_message_of_a_handler_that_is_too_large_is_a_dead_letter(
    nats_server: NatsServer, outbox: str, outbox_db: psycopg.Connection
) -> None:
    await nats_server.prepare()
    router = cdc.Router()
    _publish(outbox_db, 3)
    async with _sink(nats_server) as sink:

        @router.on("x")
        async def forward(change: cdc.Change) -> None:
            await sink.send(change, sinks.Payload("x" * (3_000_000 if change.new["n"] == 2 else 3)))

        async with consuming(outbox, router):
            await _all_settled(outbox_db)
    assert states(outbox_db) == {"processed": 2, "dead": 1}
    assert [each.body for each in await nats_server.received()] == [b"xxx", b"xxx"]


async def test_several_messages_of_one_change_go_to_names_and_keys_of_their_own(kafka_server: KafkaServer) -> None:
    await kafka_server.prepare(["x", "order"])
    name = kafka_server.url().rpartition("/")[2]
    change = make_change("x")
    async with sinks.kafka(kafka_server.url()) as sink:
        for part in ("a", "b"):
            to = name.format(type="order")
            await sink.send(change, sinks.Payload(part.encode(), to=to, key=part, id=f"{change.id}/{part}"))
    found = await kafka_server.received()
    assert sorted((each.name, each.key, each.body) for each in found) == [
        (name.format(type="order"), "a", b"a"), (name.format(type="order"), "b", b"b"),
    ]  # fmt: skip


@pytest.mark.parametrize("format_", ["structured", "binary"])
async def test_an_id_and_a_key_of_a_payload_are_those_of_its_headers(format_: str, broker: BrokerServer) -> None:
    if broker.scheme == "redis" and format_ == "binary":
        pytest.skip("there is no binary mode for it")
    await broker.prepare()
    change = make_change("x")
    given: dict[str, Any] = {} if broker.scheme == "redis" else {"format": format_}
    async with _MADE[broker.scheme](broker.url().replace("{type}", "x"), **given) as sink:
        await sink.send(change, sinks.Payload("a", id=f"{change.id}/1"))
        await sink.send(change, sinks.Payload("b", id=f"{change.id}/2", key="by\nanother"))
    found = {each.body: each.headers for each in await broker.received()}
    prefix = ("ce" if format_ == "binary" else "cdc") + ("_" if broker.scheme == "kafka" else "-")
    ids = [found[body][f"{prefix}id"] for body in (b"a", b"b")]
    assert ids == [f"{change.id}/1", f"{change.id}/2"]
    keys = [unquote(found[body][f"{prefix}partitionkey"]) for body in (b"a", b"b")]
    assert keys == ["x/1", "by\nanother"]


async def test_a_debezium_record_of_a_handler_has_the_id_that_it_is_given(kafka_server: KafkaServer) -> None:
    await kafka_server.prepare()
    async with sinks.kafka(kafka_server.url(), format="debezium") as sink:
        await sink.send(make_change("x"), sinks.Payload("a", id="7/1", key="k"))
    [found] = await kafka_server.received()
    assert (found.headers["cdc_id"], found.key) == ("7/1", "k")


@pytest.mark.parametrize("password", ["hunter", lambda: "hunter"], ids=["text", "function"])
async def test_a_sink_logs_in(nats_server: NatsServer, password: Any) -> None:
    await asyncio.to_thread(nats_server.restart, "--user", "app", "--pass", "hunter")
    async with sinks.nats(nats_server.url(), user="app", password=password) as sink:
        with pytest.raises(cdc.Retry, match="no stream of JetStream takes the subject"):
            await sink.send(make_change("x"))


@pytest.mark.parametrize("scheme", ["kafka", "amqp"])
async def test_of_messages_that_are_sent_side_by_side_only_the_one_that_is_too_large_is_rejected(
    scheme: str, request: pytest.FixtureRequest
) -> None:
    broker = request.getfixturevalue({"kafka": "kafka_server", "amqp": "rabbit_server"}[scheme])
    await broker.prepare(**({"max.message.bytes": "20000"} if scheme == "kafka" else {}))
    sizes = [10_000] * 15 + [3_000_000] + [10_000] * 15
    changes = [make_change("x", entity_id=f"k{n}", new={"n": "x" * size}) for n, size in enumerate(sizes)]
    left = changes
    rejected: list[cdc.Change] = []
    async with _sink(broker) as sink:
        while left:  # a loss of the connection ends them all, and they are sent again
            results = await asyncio.gather(*map(sink.send, left), return_exceptions=True)
            rejected += [change for change, found in zip(left, results, strict=True) if isinstance(found, cdc.Reject)]
            left = [change for change, found in zip(left, results, strict=True) if isinstance(found, cdc.Unavailable)]
    assert rejected == [changes[15]]
    assert {each.event["id"] for each in await broker.received()} == {
        str(change.id) for change in changes if change is not changes[15]
    }


async def test_a_function_of_a_sink_names_what_its_change_goes_to_and_a_payload_s_own_name_comes_first(
    redis_server: RedisServer,
) -> None:
    async with sinks.redis(redis_server.url(), name=lambda each: f"of:{each.entity_id}") as sink:
        await sink.send(make_change("x", entity_id="a"))
        await sink.send(make_change("x", entity_id="b"), sinks.Payload("b"))
        await sink.send(make_change("x", entity_id="c"), sinks.Payload("c", to="other"))
    assert [each.name for each in await redis_server.received()] == ["of:a", "of:b", "other"]


def _by_number(change: cdc.Change) -> str | None:
    number = change.new["n"]
    if number == 4:
        raise LookupError("no name")
    return {1: "even", 2: "odd", 3: None}.get(number, "a\nb")


async def test_in_python_a_function_names_what_a_delivery_goes_to_and_its_faults_are_those_of_one_change(
    redis_server: RedisServer, outbox: str, outbox_db: psycopg.Connection
) -> None:
    _publish(outbox_db, 5, 5)
    settings = {"slot_name": slot_name(), "deliver_to": redis_server.url(), "max_attempts": 1}
    work = asyncio.create_task(cdc.run(outbox, None, deliver_name=_by_number, **settings))
    try:
        await _all_settled(outbox_db)
    finally:
        work.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await work
    assert sorted(each.name for each in await redis_server.received()) == ["cdc:x", "even", "odd"]
    errors = outbox_db.execute(
        "SELECT new_data->>'n', last_error FROM entity_changes WHERE dead_at IS NOT NULL"
    ).fetchall()
    assert {number: error.partition(":")[0] for number, error in errors} == {"4": "LookupError", "5": "rejected"}


@pytest.mark.parametrize("settings", [{}, {"deliver_to": "http://127.0.0.1:1/"}], ids=["nothing", "http"])
async def test_a_function_for_names_without_a_broker_is_refused_at_the_start(
    settings: dict[str, Any], outbox: str
) -> None:
    with pytest.raises(cdc.UsageError, match="deliver_name names what a broker has"):
        await cdc.run(outbox, None, deliver_name=str, **settings)
    with pytest.raises(cdc.UsageError, match="deliver_name is for a delivery, and there are routers"):
        await cdc.run(outbox, {"default": cdc.Router()}, deliver_name=str)
