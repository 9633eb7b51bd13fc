"""The action service as handlers.

    reaction  ── rules ──> tasks, and messages to be sent     exactly once, in the transaction that marks the reaction
    message   ── "help" ─> the help message is sent           at least once
    task      ───────────> its room is notified               at least once
    outgoing_message ────> it is sent                         at least once

Each message sent carries the id of its change as idempotency key.
"""

from __future__ import annotations

import logging

import psycopg

import cdc
from cdc.contrib.whatsapp.actions import OUTGOING, Actions, Context, standard
from cdc.contrib.whatsapp.rows import MessageRow, ReactionRow, TaskRow
from cdc.contrib.whatsapp.rules import Rules
from cdc.contrib.whatsapp.sender import Outgoing, Sender

log = logging.getLogger(__name__)

_ATTEMPTS = 3
"""As documented: after three errors an action is failed, until ``reprocess_failed_actions()``."""
_CAUSED_BY = "SELECT set_config('cdc.cause', %s, true)"


def make_router(
    sender: Sender, *, help_text: str, schema: str = "public", actions: Actions | None = None
) -> cdc.Router:
    """The handlers of the application. ``schema`` is that of the outbox, and of the table "actionRules".

    ``actions`` are those that rules can name, by default the documented ones.
    """
    router = cdc.Router()
    rules = Rules(schema, actions or standard(help_text))

    @router.on("reaction", model=ReactionRow, max_attempts=_ATTEMPTS)
    async def react(changes: list[cdc.Change], connection: psycopg.AsyncConnection) -> None:
        appeared = [change for change in changes if _appeared(change)]
        meant = await rules.meant_by({change.new.reaction for change in appeared}, connection) if appeared else {}
        for change in appeared:
            if not meant[change.new.reaction]:
                continue
            # For a batch the consumer cannot set a single cause.
            await connection.execute(_CAUSED_BY, [change.cause])
            for rule in meant[change.new.reaction]:
                log.debug("rule %s is followed for change %s", rule.id, change.id)
                await rule.follow(Context(connection, change.new, rule.id, schema))

    @router.on("message", "INSERT", model=MessageRow, max_attempts=_ATTEMPTS)
    async def answer(change: cdc.Change) -> None:
        if change.new.asks_for_help and change.new.chat_id is not None:
            await sender.send(Outgoing(chat_id=change.new.chat_id, text=help_text), str(change.id))

    @router.on("task", "INSERT", model=TaskRow, max_attempts=_ATTEMPTS)
    async def notify(change: cdc.Change) -> None:
        if change.new.room_id is None:
            raise cdc.Discard("the task has no room to write to")
        await sender.send(Outgoing(chat_id=change.new.room_id, text=f"New task: {change.new.title}"), str(change.id))

    @router.on(OUTGOING, model=Outgoing, max_attempts=_ATTEMPTS)
    async def send(change: cdc.Change) -> None:
        await sender.send(change.new, str(change.id))

    return router


def _appeared(change: cdc.Change) -> bool:
    """Whether the emoji is new: a new reaction, or one whose emoji has changed.

    Not only an INSERT, as documented: where the removal in between comes late, the same events are an UPDATE.
    """
    old, new = change.old, change.new
    return new is not None and bool(new.reaction) and (old is None or old.reaction != new.reaction)
