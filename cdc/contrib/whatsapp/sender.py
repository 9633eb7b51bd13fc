"""How messages are sent: the interface of a messenger, and one that only records them."""

from __future__ import annotations

from typing import Protocol

from pydantic import BaseModel, ConfigDict


class Outgoing(BaseModel):
    """A message for a chat."""

    model_config = ConfigDict(frozen=True, hide_input_in_errors=True)

    chat_id: str
    text: str


class Sender(Protocol):
    async def send(self, message: Outgoing, key: str) -> None:
        """Send the message. ``key`` is the same at each attempt, and no other message has it.

        Any exception means that it was not sent; it is tried again, so a message may arrive twice. A messenger that
        checks the key sends it once.
        """


class Recorder:
    """Sends nothing, and records what it was given: for demonstrations and tests."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, Outgoing]] = []
        """Each key with its message, in order."""

    async def send(self, message: Outgoing, key: str) -> None:
        self.sent.append((key, message))
