"""A handler whose provider is away while a file is there. What is sent is written with the mark, so it is sent once."""

from __future__ import annotations

import os
from pathlib import Path

import psycopg

import cdc

router = cdc.Router()
OUTAGE = "TEST_OUTAGE"
"""The variable that names the file."""


@router.on("mail", name="send_mail")
async def send_mail(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
    if Path(os.environ[OUTAGE]).exists():
        raise ConnectionError("550: come back later")
    await connection.execute(
        "INSERT INTO sent (change, replay_of, mail) VALUES (%s, %s, %s)",
        [change.id, change.replay_of, change.entity_id],
    )
