"""What a form or the URL of a page says, as values. A field that is empty was not filled in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any
from urllib.parse import parse_qs, urlencode
from uuid import UUID, uuid4

from starlette.requests import Request

from cdc.contrib.ui.operations import DecisionAsked, Operations
from cdc.core.errors import UsageError
from cdc.core.limits import Limit, LimitSetting, check_handler, check_path
from cdc.core.model import ChangeState
from cdc.core.pauses import Pause
from cdc.core.units import parse_duration, parse_moment
from cdc.postgres.actions import BECAUSE_BYTES, Actor
from cdc.postgres.admin import Reference, parse_reference

FILTERS = ("type", "key", "handler", "error", "text", "since", "until")
BODY_MAX = 256 * 1024
_FIELDS_MAX = 2_000
_TEXT_MAX = 1_000
_CHANGES_MAX = 1_000

Fields = Mapping[str, Sequence[str]]
"""Name to what was filled in, which is never empty."""


def of_query(request: Request) -> Fields:
    return _parsed(request.url.query)


async def of_form(request: Request) -> Fields:
    """Raises UsageError for what no page of ours sends."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > BODY_MAX:
            raise UsageError("the form is too large", hint="choose fewer changes, or all that match")
    return _parsed(body.decode("utf-8", "replace"))


def _parsed(text: str) -> Fields:
    try:
        found = parse_qs(text, max_num_fields=_FIELDS_MAX, errors="replace")
    except ValueError:
        raise UsageError("the form has too many fields") from None
    if any("\0" in value or len(value) > _TEXT_MAX for values in found.values() for value in values):
        raise UsageError("a field is too long, or has a zero byte in it")
    return found


def one(fields: Fields, name: str) -> str | None:
    value = fields.get(name, [""])[0].strip()
    return value or None


def filters_of(fields: Fields) -> dict[str, str]:
    """Those that are filled in."""
    return {name: value for name in FILTERS if (value := one(fields, name)) is not None}


def state_of(fields: Fields) -> ChangeState:
    try:
        return ChangeState(one(fields, "state") or "dead")
    except ValueError:
        raise UsageError("there is no such state", hint="dead, waiting, fresh, processed") from None


def wanted_of(fields: Fields, operations: Operations) -> Any:
    given = filters_of(fields)
    return operations.wanted(
        handler=given.get("handler"), entity_type=given.get("type"), entity_id=given.get("key"),
        error=given.get("error"), text=given.get("text"),
        since=parse_moment(given["since"]) if "since" in given else None,
        until=parse_moment(given["until"]) if "until" in given else None,
    )  # fmt: skip


def decision_of(fields: Fields, operations: Operations) -> DecisionAsked:
    """What a form of changes asks for: those that were chosen, or all that match."""
    deed = one(fields, "deed")
    if deed not in ("retry", "discard", "replay"):
        raise UsageError("what is to be done?", hint="retry, discard or replay")
    changes = references_of(fields) if one(fields, "scope") != "all" else []
    if not changes and one(fields, "scope") != "all":
        raise UsageError("no change was chosen", hint="choose some, or all that match")
    return DecisionAsked(
        deed=deed, changes=changes, state=state_of(fields), wanted=wanted_of(fields, operations),  # type: ignore[arg-type]  # mypy does not narrow by a tuple
        latest_per_key=one(fields, "latest_per_key") is not None, subscription=one(fields, "subscription"),
        since=_moment(one(fields, "decided_at")),
    )  # fmt: skip


def references_of(fields: Fields) -> list[Reference]:
    names = list(dict.fromkeys(fields.get("change", [])))
    if len(names) > _CHANGES_MAX:
        raise UsageError(f"more than {_CHANGES_MAX:,} changes were chosen", hint="choose all that match")
    return [parse_reference(name) for name in names]


def actor_of(fields: Fields, person: str) -> Actor:
    """Raises UsageError without a reason."""
    because = one(fields, "because")
    if because is None or len(because.encode(errors="replace")) > BECAUSE_BYTES:
        raise UsageError("why? a reason is part of the log", hint=f"1 to {BECAUSE_BYTES} bytes")
    try:
        command = UUID(one(fields, "command") or "")
    except ValueError:
        command = uuid4()
    return Actor(person, "ui", because, command)


def pause_of(fields: Fields, actor: Actor) -> tuple[Pause, float | None]:
    given = {name: one(fields, name) for name in ("subscription", "type", "handler", "key")}
    if given["key"] is not None and (given["type"] is None or given["handler"] is not None):
        raise UsageError("a key is named with its type, and without a handler")
    if "*" in (given["type"], given["handler"]):
        raise UsageError("* is no name here", hint="with all fields empty everything is paused")
    target = Pause(
        0, given["subscription"], given["type"], given["handler"], given["key"], actor.because or "", actor.person
    )
    return target, duration_of(fields)


def duration_of(fields: Fields) -> float | None:
    """In seconds; None: no end was given."""
    for_ = one(fields, "for")
    return None if for_ is None else parse_duration(for_)


def limit_of(fields: Fields, actor: Actor) -> LimitSetting:
    """Raises UsageError for what is no limit."""
    by = one(fields, "by")
    limit = Limit(
        one(fields, "rate"),
        number_of(fields, "burst") if one(fields, "burst") else None,
        number_of(fields, "at_once") if one(fields, "at_once") else None,
        None if by is None else check_path(by),
    )
    handler = check_handler(one(fields, "handler") or "")
    return LimitSetting(0, handler, limit, one(fields, "subscription"), actor.because or "", actor.person)


def number_of(fields: Fields, name: str, most: int = 2**31 - 1) -> int:
    return parse_number(name, one(fields, name) or "", most)


def parse_number(name: str, text: str, most: int = 2**62) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 19 and int(text) <= most):
        raise UsageError(f"{name} is no number")
    return int(text)


def query(**fields: object) -> str:
    """A query string of what is not None."""
    return urlencode({name: str(value) for name, value in fields.items() if value is not None})


def _moment(text: str | None) -> datetime | None:
    found = None if text is None else parse_moment(text)
    return found if isinstance(found, datetime) else None
