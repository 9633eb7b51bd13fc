"""A web application that also consumes: its processes share the work, and each shows what came to it.

uvicorn main:app
"""

import asyncio
import os
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from fastapi import FastAPI, HTTPException, Request

import cdc

router = cdc.Router()
seen: deque[str] = deque(maxlen=100)


@router.on("order", "INSERT")
async def note(change: cdc.Change) -> None:
    seen.append(change.entity_id)


@asynccontextmanager
async def consuming(app: FastAPI) -> AsyncIterator[None]:
    app.state.consumer = consumer = asyncio.create_task(cdc.run(os.environ["CDC_DSN"], router, slot_name="web"))
    try:
        yield
    finally:
        consumer.cancel()  # running handlers finish first, for up to ten seconds
        with suppress(asyncio.CancelledError):
            await consumer


app = FastAPI(lifespan=consuming)


@app.get("/orders/seen")
async def orders_seen() -> list[str]:
    return list(seen)


@app.get("/healthz")
async def healthz(request: Request) -> str:
    """A consumer outlives lost servers and links; what ends it is a setting that cannot work."""
    if request.app.state.consumer.done():
        raise HTTPException(503, "the consumer has ended")
    return "ok"
