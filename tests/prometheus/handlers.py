"""Handlers that produce what the alerts are about."""

from __future__ import annotations

import asyncio
import threading

import psycopg

import cdc

router = cdc.Router()


@router.on("good")
async def good(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
    pass


@router.on("bad", max_attempts=1)
async def bad(change: cdc.Change) -> None:
    raise ValueError("it always fails")


@router.on("limited", limit=cdc.Limit(rate="1/h"), name="limited")
async def call(change: cdc.Change) -> None:
    pass


@router.on("removed", "DELETE")
async def remove(change: cdc.Change) -> None:
    pass


@router.on("endless", timeout=None)
async def endless(change: cdc.Change) -> None:
    await asyncio.Event().wait()


@router.on("blocking")
async def blocking(change: cdc.Change) -> None:
    threading.Event().wait(300)


@router.on("away", name="away")
async def find_away(change: cdc.Change) -> None:
    raise cdc.Unavailable
