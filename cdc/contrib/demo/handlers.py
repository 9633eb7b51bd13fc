"""The application's handlers, with records of their calls, and a messenger that sends nothing."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

from cdc.app.config import Settings
from cdc.contrib.demo.tracker import Journey, Tracker
from cdc.contrib.whatsapp import make_router as make_application
from cdc.contrib.whatsapp.sender import Outgoing, Recorder
from cdc.core.model import Change, Operation
from cdc.core.router import ANY, Handler, Router

FAR_AWAY = "far-away"
"""The chat whose messages are sent at the third attempt only."""
TASK_EMOJI = "✅"
"""The emoji that has a rule."""


class MessengerError(Exception):
    """A failure as an external service has them."""


class Messenger(Recorder):
    def __init__(self) -> None:
        super().__init__()
        self._refused: Counter[str] = Counter()

    async def send(self, message: Outgoing, key: str) -> None:
        if message.chat_id == FAR_AWAY and self._refused[key] < 2:
            self._refused[key] += 1
            raise MessengerError("the messenger does not answer")
        await super().send(message, key)


def make_router(schema: str, messenger: Messenger, tracker: Tracker) -> Router:
    """The handlers of the application in this schema, with the tracker as their hooks."""
    application = make_application(messenger, schema=schema, help_text=Settings().whatsapp.help_text)
    router = Router()
    watch = _Watch(tracker)
    for (entity_type, operation), handler in application.handlers.items():
        operations = () if operation == ANY else (operation,)
        options = {"model": handler.model, "batch": handler.batch, "max_attempts": handler.max_attempts}
        declare = router.on(entity_type, *operations, **options, name=handler.name)
        declare(watch.noting(handler))
    router.on_processed(watch.processed)
    router.on_error(tracker.failed)
    router.on_wakeup(tracker.notified)
    return router


class _Watch:
    """Follows each change, and after a check mark also the task that its rule will create."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self._expected: dict[str, Journey] = {}
        """The journeys of tasks, by the id of their reaction."""

    def noting(self, handler: Handler) -> Any:
        @functools.wraps(handler.function)
        async def noted(*one: Change, **given: Any) -> None:
            for change in one or given["changes"]:
                self._started(change, handler.name)
            await handler.function(*one, **given)

        return noted

    def _started(self, change: Change, handler: str) -> None:
        if change.entity_type == "task":
            self._tracker.known_as(("task", change.new.title, Operation.INSERT), change)
        journey = self._tracker.started(change, handler)
        if _makes_a_task(change) and change.entity_id not in self._expected:
            # The task's id is not known yet, but its title is.
            mark = ("task", f"Follow up on {change.new.message_id}", Operation.INSERT)
            shown = journey is not None and journey.shown
            self._expected[change.entity_id] = self._tracker.sent(
                mark, table="tasks", note="of a reaction", shown=shown
            )

    def processed(self, change: Change) -> None:
        if change.entity_type == "reaction" and (journey := self._expected.pop(change.entity_id, None)):
            self._tracker.stored(journey)  # the transaction that marked the reaction has written the task
        self._tracker.processed(change)


def _makes_a_task(change: Change) -> bool:
    return (
        change.entity_type == "reaction" and change.operation is Operation.INSERT and change.new.reaction == TASK_EMOJI
    )
