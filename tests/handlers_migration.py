"""The new side of tests/faults/test_migration.py: what the documented processor does, as handlers."""

from __future__ import annotations

import psycopg

import cdc

POISON = "poison"
"""A row with this text cannot be handled, by whomever."""
ACT = "INSERT INTO effects (entity_type, entity_id, done_by) VALUES (%s, %s, %s)"

router = cdc.Router()


# As many attempts as the documented processor makes.
@router.on("reaction", "INSERT", max_attempts=3)
@router.on("message", "INSERT", max_attempts=3)
@router.on("task", "INSERT", max_attempts=3)
async def act(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
    if change.new["user_id"] == POISON:
        raise ValueError(POISON)
    await connection.execute(ACT, [change.entity_type, change.entity_id, "consumer"])
