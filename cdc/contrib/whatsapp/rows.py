"""Rows of the application's tables as captured, with the columns that handlers read."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class _TableRow(BaseModel):
    # A live system's ids may be numbers.
    model_config = ConfigDict(frozen=True, coerce_numbers_to_str=True, hide_input_in_errors=True)

    id: str


class ReactionRow(_TableRow):
    message_id: str | None = None
    reaction: str | None = None
    """None or "" where a live system keeps the rows of removed reactions."""
    user_id: str | None = None
    chat_id: str | None = None


class MessageRow(_TableRow):
    content: str | None = None
    user_id: str | None = None
    chat_id: str | None = None

    @property
    def asks_for_help(self) -> bool:
        return "help" in (self.content or "").lower()


class TaskRow(_TableRow):
    title: str
    room_id: str | None = None
