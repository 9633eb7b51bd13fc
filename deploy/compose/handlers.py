"""What happens after the application's writes: one handler of each kind. The service ``consumer`` runs them."""

import psycopg

import cdc

router = cdc.Router()

_ADD_TASK = "INSERT INTO tasks (id, title, user_id, room_id) VALUES (%s, %s, %s, %s)"


class MessengerError(Exception):
    """The outside world, being itself."""


@router.on("reaction", "INSERT")
async def add_task(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
    """Exactly once: the task is written in the transaction that marks the reaction as processed."""
    if change.new["reaction"] == "✅":
        title = f"Follow up on {change.new['message_id']}"
        await connection.execute(
            _ADD_TASK, [f"task-{change.entity_id}", title, change.new["user_id"], change.new["chat_id"]]
        )


@router.on("message", "INSERT")
async def answer(change: cdc.Change) -> None:
    """The messenger answers one attempt in three: meanwhile the change waits for its next one."""
    if "help" in change.new["content"] and (change.seq + change.attempt) % 3:
        raise MessengerError("the messenger does not answer")


@router.on("task", "INSERT")
def notify(change: cdc.Change) -> None:
    """Not async: it runs in a thread, where it may block."""
