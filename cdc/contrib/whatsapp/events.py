"""A webhook's events, as values. Pure: the time is an argument, and no database is used.

    {"event": "messages.reaction", "key": "r-1", "message_id": "m-1", "reaction": "✅",
     "from": "491701234567", "chat_id": "c-1", "timestamp": 1767225600}
    {"event": "messages.upsert", "key": "m-1", "content": "Can you help me?",
     "from": "491701234567", "chat_id": "c-1", "timestamp": "2026-01-01T00:00:00Z"}

``key`` identifies the reaction or the message. A reaction that is null or "" has been removed. Other fields of an event
are ignored, and so are events of another name.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Annotated, Literal

from pydantic import AfterValidator, AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

AHEAD_MAX = timedelta(hours=1)
"""How far a sender's clock may be ahead of ours. An event from the far future would never be superseded."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class InvalidEventError(Exception):
    """The payload can never be stored. The text names the fault, without values."""


def _storable(text: str) -> str:
    if "\0" in text:
        raise ValueError("a NUL character cannot be stored")
    return text  # pydantic refuses half of a surrogate pair as a string; it could not be stored either


def _no_truth(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("Unix time or ISO 8601 with a time zone, please")  # noqa: TRY004 - pydantic wants a ValueError
    return value


def _since_the_epoch(moment: datetime) -> datetime:
    if moment < _EPOCH:
        raise ValueError("it lies before 1970")
    return moment


Name = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_storable)]
Emoji = Annotated[str, Field(max_length=64), AfterValidator(_storable)]
Content = Annotated[str, Field(max_length=65_536), AfterValidator(_storable)]
Moment = Annotated[AwareDatetime, BeforeValidator(_no_truth), AfterValidator(_since_the_epoch)]
"""Unix time in seconds or milliseconds, as a number or in a string, or ISO 8601 with a time zone."""


class _Event(BaseModel):
    model_config = ConfigDict(frozen=True, hide_input_in_errors=True)

    key: Name
    user_id: Name = Field(alias="from")
    chat_id: Name
    timestamp: Moment


class ReactionEvent(_Event):
    event: Literal["messages.reaction"]
    message_id: Name
    reaction: Emoji | None

    @property
    def removed(self) -> bool:
        return not self.reaction


class MessageEvent(_Event):
    event: Literal["messages.upsert"]
    content: Content | None
    """None where there is no text, such as for a picture."""


_KINDS: dict[str, type[ReactionEvent | MessageEvent]] = {
    "messages.reaction": ReactionEvent,
    "messages.upsert": MessageEvent,
}


def parse(payload: object, now: datetime) -> ReactionEvent | MessageEvent | None:
    """The event in ``payload``; None for one of a kind that is not stored. Raises RejectedError."""
    if not isinstance(payload, dict):
        raise InvalidEventError("the payload is not a JSON object")
    name = payload.get("event")
    if not isinstance(name, str):
        raise InvalidEventError("event: a string is required")
    kind = _KINDS.get(name)
    if kind is None:
        return None
    try:
        event = kind.model_validate(payload)
    except ValidationError as invalid:
        raise InvalidEventError(_sentence(invalid)) from None
    if event.timestamp > now + AHEAD_MAX:
        raise InvalidEventError("timestamp: it lies in the future")
    return event


def _sentence(invalid: ValidationError) -> str:
    """``from: field required; timestamp: ...``: the faults, never the values."""
    found = invalid.errors(include_url=False, include_input=False, include_context=False)
    return "; ".join(f"{'.'.join(map(str, each['loc']))}: {_said(each['msg'])}" for each in found)


def _said(message: str) -> str:
    message = message.removeprefix("Value error, ")
    return message[:1].lower() + message[1:]
