"""A consumer inside a program of one's own, beside whatever else it does, until Ctrl-C or SIGTERM."""

import asyncio
import contextlib
import logging
import os
import signal

import cdc

router = cdc.Router()
seen: asyncio.Queue[str] = asyncio.Queue(maxsize=100)


@router.on("order", "INSERT")
async def note(change: cdc.Change) -> None:
    await seen.put(change.entity_id)  # where the rest of the program is behind, this waits


async def print_seen() -> None:
    while True:
        print("new order", await seen.get(), flush=True)


async def main() -> None:
    logging.basicConfig(level=logging.INFO)
    async with asyncio.TaskGroup() as group:
        printer = group.create_task(print_seen())
        consumer = group.create_task(cdc.run(os.environ["CDC_DSN"], router, slot_name="embedded"))
        for number in (signal.SIGINT, signal.SIGTERM):
            # Cancelled, it lets running handlers finish, for up to ten seconds.
            asyncio.get_running_loop().add_signal_handler(number, consumer.cancel)
        with contextlib.suppress(asyncio.CancelledError):
            await consumer
        printer.cancel()


asyncio.run(main())
