"""A service on the other side of RabbitMQ. ``prepare`` declares exchange and queue, once; ``read`` reads the queue."""

import asyncio
import os
import signal
import sys

import aio_pika
from aio_pika import ExchangeType
from aio_pika.abc import AbstractIncomingMessage
from events import Events

SERVER = os.environ["BROKER"]
EXCHANGE, QUEUE = "shop", "billing"


async def prepare() -> None:
    """One reader of the queue at a time, so that it keeps the order; a second one takes over from a first that ends."""
    async with await aio_pika.connect(SERVER) as connection:
        channel = await connection.channel()
        exchange = await channel.declare_exchange(EXCHANGE, ExchangeType.TOPIC, durable=True)
        queue = await channel.declare_queue(
            QUEUE, durable=True, arguments={"x-queue-type": "quorum", "x-single-active-consumer": True}
        )
        for routing_key in ("message.*", "reaction.*"):
            await queue.bind(exchange, routing_key)


async def read(stopping: asyncio.Event) -> None:
    async with await aio_pika.connect_robust(SERVER) as connection:
        channel = await connection.channel()
        await channel.set_qos(prefetch_count=100)
        queue = await channel.get_queue(QUEUE)
        events = Events()

        async def take(message: AbstractIncomingMessage) -> None:
            events.take(message.body)
            await message.ack()  # only now: what was not finished comes again

        await queue.consume(take)
        await stopping.wait()


async def main() -> None:
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    await (prepare() if sys.argv[1] == "prepare" else read(stopping))


if __name__ == "__main__":
    asyncio.run(main())
