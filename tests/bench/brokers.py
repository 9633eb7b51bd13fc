"""Draining into a broker, beside a no-op handler and the broker's own client: ``python -m tests.bench.brokers``

The client sends the same bytes as one would send them by hand: Kafka all at once, Redis in pipelines of 500, NATS and
RabbitMQ with 500 acknowledgements open. Rates are of one machine that does all of it; their ratios are what counts.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aio_pika
import nats
from confluent_kafka import Producer
from redis.asyncio import Redis

from cdc.contrib.demo.temp_server import TempServer
from cdc.core.broker_messages import Encoding, Message
from cdc.testing import change
from tests.bench.database import drained, fresh_outbox, preload, rest, settled
from tests.bench.processes import Consumer
from tests.fix_brokers import BrokerServer, KafkaServer, NatsServer, RabbitServer, RedisServer

_TOGETHER = 500
_KEYS = 5_000
_WITHIN_S = 600.0


def messages(count: int, name: str) -> list[Message]:
    encoding, at = Encoding("structured", None, separator="-"), datetime.now(UTC)
    row = {"id": 1, "title": "task number 1", "status": "open", "user_id": 1}
    return [
        encoding.message(change("task", "INSERT", str(n % _KEYS), new=row, table="tasks", changed_at=at), name)
        for n in range(count)
    ]


async def _kafka(server: BrokerServer, sent: list[Message]) -> None:
    producer = Producer({
        "bootstrap.servers": server.address, "acks": "all", "enable.idempotence": True, "linger.ms": 1,
        "queue.buffering.max.messages": 1_000_000,
    })  # fmt: skip
    for each in sent:
        producer.produce(each.name, each.body, each.key, headers=list(each.headers.items()))
        producer.poll(0)
    await asyncio.to_thread(producer.flush)


async def _redis(server: BrokerServer, sent: list[Message]) -> None:
    async with Redis(port=server.port) as client:
        for first in range(0, len(sent), _TOGETHER):
            pipeline = client.pipeline(transaction=False)
            for each in sent[first : first + _TOGETHER]:
                fields: dict[Any, Any] = {**each.headers, "event": each.body}
                pipeline.xadd(each.name, fields)
            await pipeline.execute()


async def _nats(server: BrokerServer, sent: list[Message]) -> None:
    async with await nats.connect(f"nats://{server.address}") as client:
        stream = client.jetstream(publish_async_max_pending=_TOGETHER)
        for each in sent:
            await stream.publish_async(each.name, each.body, headers={**each.headers, "Nats-Msg-Id": each.id})
        await stream.publish_async_completed()


async def _amqp(server: BrokerServer, sent: list[Message]) -> None:
    exchange_name, name = server.url("x").split("/")[-2:]
    async with await aio_pika.connect(f"amqp://guest:guest@{server.address}/") as connection:
        channel = await connection.channel(publisher_confirms=True)
        exchange = await channel.get_exchange(exchange_name, ensure=False)
        for first in range(0, len(sent), _TOGETHER):
            made = [
                aio_pika.Message(each.body, delivery_mode=aio_pika.DeliveryMode.PERSISTENT, headers={**each.headers})
                for each in sent[first : first + _TOGETHER]
            ]
            await asyncio.gather(*(exchange.publish(each, name) for each in made))


_CLIENTS: dict[str, tuple[type[BrokerServer], Callable[[BrokerServer, list[Message]], Awaitable[None]]]] = {
    "amqp": (RabbitServer, _amqp),
    "kafka": (KafkaServer, _kafka),
    "nats": (NatsServer, _nats),
    "redis": (RedisServer, _redis),
}


def _drain(server: TempServer, changes: int, **settings: object) -> tuple[float, float]:
    """Changes a second, and the consumer's time of a processor for one, in microseconds."""
    with fresh_outbox(server) as connection:
        preload(connection, changes=changes, keys=_KEYS)
        rest(connection)
        with Consumer(connection.info.dsn, "noop", **settings) as consumer:
            consumer.until(lambda: drained(connection), within_s=_WITHIN_S)
            cpu_s = consumer.cpu_s
        return settled(connection).rate, cpu_s / changes * 1e6


def measure(server: TempServer, scheme: str, changes: int) -> None:
    kind, send = _CLIENTS[scheme]
    with tempfile.TemporaryDirectory() as folder:
        broker = kind(Path(folder))
        broker.start()
        try:
            asyncio.run(broker.prepare())
            name = broker.url().rpartition("/")[2].format(type="x")
            made = messages(changes, name)
            began = time.monotonic()
            asyncio.run(_sent(send, broker, made))
            client = changes / (time.monotonic() - began)
            noop, noop_us = _drain(server, changes)
            rate, us = _drain(server, changes, deliver_to=broker.url().replace("{type}", "x"))
        finally:
            broker.end()
    print(
        f"{scheme:<6} drain {rate:>7,.0f}/s {us:>4.0f} us; client alone {client:>7,.0f}/s ({rate / client:.2f});"
        f" no-op {noop:>7,.0f}/s {noop_us:>4.0f} us ({rate / noop:.2f})"
    )


async def _sent(
    send: Callable[[BrokerServer, list[Message]], Awaitable[None]], server: BrokerServer, made: list[Message]
) -> None:
    await send(server, made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--changes", type=int, default=30_000)
    parser.add_argument("brokers", nargs="*", default=sorted(_CLIENTS))
    arguments = parser.parse_args()
    with TempServer() as server:
        for scheme in arguments.brokers:
            measure(server, scheme, arguments.changes)


if __name__ == "__main__":
    main()
