"""A service on the other side of NATS. ``prepare`` makes the stream, once; ``read`` reads it, by a durable consumer."""

import asyncio
import os
import signal
import sys

import nats
from events import Events
from nats.errors import TimeoutError as NothingCameError
from nats.js.api import ConsumerConfig, DiscardPolicy

SERVER = os.environ["BROKER"]
STREAM, SUBJECTS = "SHOP", "shop.>"


async def prepare() -> None:
    """A stream that is there, and is the same, is left as it is."""
    async with await nats.connect(SERVER) as client:
        await client.jetstream().add_stream(
            name=STREAM, subjects=[SUBJECTS], duplicate_window=600, max_bytes=1_000_000_000, discard=DiscardPolicy.NEW
        )


async def read(stopping: asyncio.Event) -> None:
    """One message at a time: what was not acknowledged comes again, before those behind it."""
    async with await nats.connect(SERVER, max_reconnect_attempts=-1) as client:
        reader = await client.jetstream().pull_subscribe(
            SUBJECTS, durable="billing", stream=STREAM, config=ConsumerConfig(max_ack_pending=1)
        )
        events = Events()
        while not stopping.is_set():  # between two messages
            try:
                [message] = await reader.fetch(1, timeout=1)
            except NothingCameError:
                continue
            events.take(message.data)
            await message.ack_sync()


async def main() -> None:
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    await (prepare() if sys.argv[1] == "prepare" else read(stopping))


if __name__ == "__main__":
    asyncio.run(main())
