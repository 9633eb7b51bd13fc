"""The new side of tests/faults/test_migration.py: what the documented processor does, as handlers."""

from __future__ import annotations

import psycopg

import cdc

POISON = "poison"
"""A row with this text cannot be handled, by whomever."""
ACT = "INSERT INTO effects (entity_type, entity_id, done_by) VALUES (%s, %s, %s)"

router = cdc.Router()


@router.on("reaction", "INSERT")
@router.on("message", "INSERT")
@router.on("task", "INSERT")
async def act(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
    if change.new["user_id"] == POISON:
        raise ValueError(POISON)
    await connection.execute(ACT, [change.entity_type, change.entity_id, "consumer"])
