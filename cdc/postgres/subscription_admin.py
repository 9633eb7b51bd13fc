"""What an operator reads of one subscription, and decides about what waits or is dead in it.

The same as of the default one, by statements that read its own progress. When a change was done, and why it was
discarded, is not kept: a change that is done everywhere leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import psycopg

from cdc.core.errors import NotFoundError, UsageError
from cdc.postgres.actions import Actor
from cdc.postgres.admin import ChangeSummary, Filter, OutboxAdmin, Reference, SearchResult
from cdc.postgres.shard_locks import change_locks
from cdc.postgres.sql_files import blocks, load
from cdc.postgres.subscriptions import Subscription


class SubscriptionAdmin(OutboxAdmin):
    """As ``OutboxAdmin``, for this subscription of the outbox in ``schema``."""

    _by_number = ("number",)

    def __init__(self, schema: str, subscription: Subscription, actor: Actor | None = None) -> None:
        super().__init__(schema, actor)
        self.subscription_name = subscription.name
        admin = blocks("admin.sql")
        shared = {"wanted": admin["wanted"], "totals": admin["totals"], "matches": blocks("bulk.sql")["matches"]}
        own = load("subscription_admin.sql", schema, instead=shared)
        replays = load("bulk.sql", schema, instead=blocks("subscription_admin.sql"))
        self._subscription = subscription
        self.subscription = subscription.number
        self._statements = self._without_barriers = {**self._statements, **own}
        self.selections = {
            **{name: own[name] for name in ("select_dead", "select_waiting")},
            **{name: replays[name] for name in ("select_processed", "select_latest", "replay")},
        }
        types = None if subscription.types is None else list(subscription.types)
        self.given = {
            "subscription": subscription.number,
            "subscription_name": subscription.name,
            "types": types,
            "taken": types,  # where `types` are those of a handler
            "locks": change_locks(schema, subscription.number),
        }

    def find(self, connection: psycopg.Connection, state: str, wanted: Filter, limit: int) -> SearchResult:
        """Raises UsageError for what is processed: a subscription keeps no list of that."""
        if state == "processed":
            raise UsageError(
                f"the subscription {self._subscription.name} keeps no list of what is processed",
                hint="cdc outbox show ID --subscription NAME says it of one change",
            )
        return super().find(connection, state, wanted, limit)

    def discard_before(self, connection: psycopg.Connection, entity_type: str, before: str) -> Iterator[int]:
        """Raises UsageError: to begin later, a subscription is dropped and created."""
        raise UsageError(
            "--before is for the default subscription",
            hint=f"drop {self._subscription.name}, and create it --from that time",
        )

    def _named(self, connection: psycopg.Connection, references: Sequence[Reference]) -> list[ChangeSummary]:
        entries = super()._named(connection, references)
        types = self._subscription.types
        for each in entries:
            if each.subscription not in (None, self.subscription):
                raise self._nothing(each, "it is for another one", hint="cdc outbox show ID says which")
            if types is not None and each.entity_type not in types:
                why = f"it is of the type {each.entity_type}"
                raise self._nothing(each, why, hint=f"it takes {self._subscription.taking}")
        return entries

    def _nothing(self, change: ChangeSummary, why: str, hint: str) -> NotFoundError:
        name = self._subscription.name
        return NotFoundError(f"the change {change.seq} is nothing to the subscription {name}: {why}", hint=hint)
