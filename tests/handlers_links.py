"""Handlers that are at work when something happens to the link, or to the process. Each says so in the log."""

from __future__ import annotations

import asyncio
import logging
import threading

import psycopg

import cdc

log = logging.getLogger("tests.handlers")
router = cdc.Router()


@router.on("sleeps", timeout=600)
async def sleeps(change: cdc.Change) -> None:
    log.info("a handler is at work")
    await asyncio.Event().wait()


@router.on("transactional", timeout=600)
async def transactional(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
    log.info("a handler is at work")
    await connection.execute("SELECT pg_sleep(600)")


@router.on("uncancellable", timeout=1)
async def uncancellable(change: cdc.Change) -> None:
    """It swallows its cancellation, as a loop around everything does."""
    log.info("a handler is at work")
    while True:
        try:
            await asyncio.wait_for(asyncio.Event().wait(), 1)
        except BaseException:
            log.info("it goes on")


@router.on("blocks", timeout=1)
async def blocks(change: cdc.Change) -> None:
    """No other task runs any more."""
    log.info("a handler is at work")
    threading.Event().wait()
