"""The handlers of the demo: what the documented processor does, as a user of this package writes it."""

from __future__ import annotations

import psycopg

from cdc.demo.journal import Journal
from cdc.model import Change, Operation
from cdc.routing import Router

UNREACHABLE = "help, is anybody there?"
"""The message whose answer gets through at the third attempt only."""
_TASK_EMOJI = "✅"
_ADD_TASK = "INSERT INTO tasks (id, title, user_id, room_id) VALUES (%s, %s, %s, %s)"


class MessengerError(Exception):
    """The outside world, being itself."""


def make_router(actions: psycopg.AsyncConnection, journal: Journal) -> Router:
    """``actions``: an autocommit connection on which handlers write, and which finds the demo's tables."""
    router = Router()

    @router.on("reaction")
    async def react(change: Change) -> None:
        journey = journal.started(change, "react")
        if change.operation is Operation.INSERT and change.new["reaction"] == _TASK_EMOJI:
            await _create_task(change, shown=journey is not None and journey.shown)

    async def _create_task(change: Change, *, shown: bool) -> None:
        task_id = f"task-{change.entity_id}"
        title = f"Follow up on {change.new['message_id']}"
        journey = journal.sent(("task", task_id, Operation.INSERT), table="tasks", note="of a reaction", shown=shown)
        await actions.execute(_ADD_TASK, [task_id, title, change.new["user_id"], change.new["chat_id"]])
        journal.stored(journey)

    @router.on("message", "INSERT")
    async def answer(change: Change) -> None:
        journal.started(change, "answer")
        content = change.new["content"] or ""
        if content == UNREACHABLE and change.attempt < 3:
            raise MessengerError("the messenger does not answer")
        if "help" in content.lower():
            pass  # here an application sends its help message

    @router.on("task", "INSERT")
    def notify(change: Change) -> None:
        journal.started(change, "notify")  # not async: it runs in a thread, where it may block

    router.on_processed(journal.processed)
    router.on_error(journal.failed)
    return router
