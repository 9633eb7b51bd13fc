"""The adapter: stores a webhook's events, and triggers nothing. The capture triggers do the rest.

Webhooks come twice, late, and in any order. So each event is compared with what is stored for its key, by its own
timestamp: only a newer one changes anything, and every order of arrival has the same result. Of two with the same
timestamp a removal wins, else the one whose fields sort last: any rule would do, if every order obeys it.
A removed reaction is deleted; ``whatsapp_removed_reactions`` records when, so that an older event cannot revive it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime
from enum import StrEnum

import psycopg
from psycopg import errors, sql

from cdc.contrib.whatsapp.events import InvalidEventError, MessageEvent, ReactionEvent, parse

Connections = Callable[[], AbstractAsyncContextManager[psycopg.AsyncConnection]]
"""Lends an autocommit connection, as a pool's ``connection`` does."""


class Result(StrEnum):
    STORED = "stored"
    STALE = "stale"
    """Already stored, or superseded by a newer event."""
    IGNORED = "ignored"
    """Of a kind that is not stored."""


# One event at a time for each reaction: a transaction that began earlier cannot see what another one removes.
_LOCK = "SELECT pg_advisory_xact_lock(hashtextextended('whatsapp_message_reactions ' || %(key)s, 0))"

_STORE_MESSAGE = """
INSERT INTO {messages} AS known (id, content, user_id, chat_id, sent_at)
VALUES (%(key)s, %(content)s, %(user_id)s, %(chat_id)s, %(timestamp)s)
ON CONFLICT (id) DO UPDATE
SET content = excluded.content, user_id = excluded.user_id, chat_id = excluded.chat_id, sent_at = excluded.sent_at
WHERE (known.sent_at, known.content IS NOT NULL, coalesce(known.content, '') COLLATE "C",
       known.user_id COLLATE "C", known.chat_id COLLATE "C")
    < (excluded.sent_at, excluded.content IS NOT NULL, coalesce(excluded.content, '') COLLATE "C",
       excluded.user_id COLLATE "C", excluded.chat_id COLLATE "C")
RETURNING true
"""
_STORE_REACTION = """
WITH stored AS (
  INSERT INTO {reactions} AS known (id, message_id, reaction, user_id, chat_id, sent_at)
  SELECT %(key)s, %(message_id)s, %(reaction)s, %(user_id)s, %(chat_id)s, %(timestamp)s
  WHERE NOT EXISTS (SELECT FROM {removed} WHERE id = %(key)s AND sent_at >= %(timestamp)s)
  ON CONFLICT (id) DO UPDATE
  SET message_id = excluded.message_id, reaction = excluded.reaction, user_id = excluded.user_id,
      chat_id = excluded.chat_id, sent_at = excluded.sent_at
  WHERE (known.sent_at, known.reaction COLLATE "C", known.message_id COLLATE "C",
         known.user_id COLLATE "C", known.chat_id COLLATE "C")
      < (excluded.sent_at, excluded.reaction COLLATE "C", excluded.message_id COLLATE "C",
         excluded.user_id COLLATE "C", excluded.chat_id COLLATE "C")
  RETURNING id
), forgotten AS (
  DELETE FROM {removed} AS gone USING stored WHERE gone.id = stored.id
)
SELECT true FROM stored
"""
_REMOVE_REACTION = """
WITH gone AS (
  INSERT INTO {removed} AS known (id, sent_at)
  SELECT %(key)s, %(timestamp)s
  WHERE NOT EXISTS (SELECT FROM {reactions} WHERE id = %(key)s AND sent_at > %(timestamp)s)
  ON CONFLICT (id) DO UPDATE SET sent_at = excluded.sent_at WHERE known.sent_at < excluded.sent_at
  RETURNING id
), deleted AS (
  DELETE FROM {reactions} AS known USING gone WHERE known.id = gone.id
)
SELECT true FROM gone
"""


class Adapter:
    """``schema`` holds the tables; nothing is read or written before ``process_webhook`` is called."""

    def __init__(self, connections: Connections, schema: str) -> None:
        self._connections = connections
        names = {
            "messages": sql.Identifier(schema, "whatsapp_messages"),
            "reactions": sql.Identifier(schema, "whatsapp_message_reactions"),
            "removed": sql.Identifier(schema, "whatsapp_removed_reactions"),
        }
        self._store_message = sql.SQL(_STORE_MESSAGE).format(**names)
        self._store_reaction = sql.SQL(_STORE_REACTION).format(**names)
        self._remove_reaction = sql.SQL(_REMOVE_REACTION).format(**names)

    async def process_webhook(self, payload: object, now: datetime | None = None) -> Result:
        """Store the event in ``payload``, decoded JSON; ``now`` is the moment at which it arrived.

        Raises RejectedError for an event that cannot be stored, before any query; psycopg's and the pool's errors
        where the database is unavailable.
        """
        event = parse(payload, now or datetime.now(UTC))
        if event is None:
            return Result.IGNORED
        try:
            stored = await (self._message(event) if isinstance(event, MessageEvent) else self._reaction(event))
        except errors.DataError:
            # Happens only in tables that the application has made: their columns may be narrower.
            raise InvalidEventError("a value does not fit its column") from None
        return Result.STORED if stored else Result.STALE

    async def _message(self, event: MessageEvent) -> bool:
        async with self._connections() as connection:
            return await _changes(connection, self._store_message, event.model_dump())

    async def _reaction(self, event: ReactionEvent) -> bool:
        statement = self._remove_reaction if event.removed else self._store_reaction
        async with self._connections() as connection, connection.transaction():
            await connection.execute(_LOCK, {"key": event.key})
            return await _changes(connection, statement, event.model_dump())


async def _changes(
    connection: psycopg.AsyncConnection, statement: sql.Composed, parameters: Mapping[str, object]
) -> bool:
    return await (await connection.execute(statement, parameters)).fetchone() is not None
