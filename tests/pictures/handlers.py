"""Handlers of a shop that has a bad hour, for the picture of the dashboard."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import psycopg

import cdc

router = cdc.Router()
_AWAY = Path(os.environ["PICTURE_AWAY"])
"""While this file is there, the mails' provider is away."""


@router.on("order")
async def invoice(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
    await connection.execute("SELECT pg_sleep(0.002)")


@router.on("customer", "UPDATE")
def search_index(change: cdc.Change) -> None:
    time.sleep(0.005)


@router.on("mail", max_attempts=3, limit=cdc.Limit(rate="30/s"))
async def send_mail(change: cdc.Change) -> None:
    await asyncio.sleep(0.02)
    if _AWAY.exists():
        raise cdc.Unavailable
    if change.new["to"] == "nobody":
        raise cdc.Reject("there is no such address")
