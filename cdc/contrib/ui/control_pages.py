"""The pages of what operators set while consumers run: pauses and limits, one or several at a time."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request

from cdc.contrib.ui import forms
from cdc.contrib.ui.forms import Fields, one
from cdc.contrib.ui.operations import Operations
from cdc.core.errors import NotFoundError, UsageError
from cdc.postgres.limit_admin import SetLimit

Page = tuple[str, dict[str, Any]]

_PAUSE = ("subscription", "type", "handler", "key", "for", "because")
_LIMIT = ("handler", "subscription", "rate", "burst", "at_once", "by", "because")


def pauses(operations: Operations, fields: Fields, _request: Request) -> Page:
    return "pauses.html", {"controls": operations.controls(), "given": _given(fields, _PAUSE)}


def confirm_pause(operations: Operations, fields: Fields, request: Request) -> Page:
    actor = forms.actor_of(fields, request.state.person)
    target, for_s = forms.pause_of(fields, actor)
    return "confirm_pause.html", {
        "target": target, "for_s": for_s, "command": actor.command, "fields": list(_given(fields, _PAUSE).items()),
        "found": operations.unprocessed(entity_type=target.entity_type, handler=target.handler),
    }  # fmt: skip


def pause(operations: Operations, fields: Fields, request: Request) -> str:
    actor = forms.actor_of(fields, request.state.person)
    operations.pause(*forms.pause_of(fields, actor), actor)
    return "/pauses"


def confirm_keys(operations: Operations, fields: Fields, _request: Request) -> Page:
    """Of changes that were chosen: their keys."""
    changes, subscription = forms.references_of(fields), one(fields, "subscription")
    if not changes:
        raise UsageError("no change was chosen", hint="choose some; a type or a handler is paused on Pauses")
    return "confirm_keys.html", {
        "keys": operations.keys_of(changes, subscription), "subscription": subscription,
        "fields": [("change", name) for name in dict.fromkeys(fields.get("change", ()))]
        + ([("subscription", subscription)] if subscription else []),
    }  # fmt: skip


def pause_keys(operations: Operations, fields: Fields, request: Request) -> str:
    actor, subscription = forms.actor_of(fields, request.state.person), one(fields, "subscription")
    keys = operations.keys_of(forms.references_of(fields), subscription)
    operations.pause_keys(keys, subscription, forms.duration_of(fields), actor)
    return "/pauses"


def resume(operations: Operations, fields: Fields, request: Request) -> Page | str:
    """Those that were chosen, or all."""
    asked, in_force = fields.get("pause", ()), {each.pause.id: each.pause for each in operations.controls()}
    everything = list(asked) == ["all"]
    numbers = [] if everything else [forms.parse_number("pause", text) for text in asked]
    if not everything and not numbers:
        raise UsageError("no pause was chosen")
    chosen = [in_force[number] for number in numbers if number in in_force]
    if numbers and not chosen:
        raise NotFoundError("what was chosen is not paused any more", hint="somebody has ended it, or its time is over")
    if one(fields, "because") is None:
        only = chosen[0] if len(chosen) == 1 else None
        about = {"entity_type": only.entity_type, "handler": only.handler} if only else {}
        return "confirm_resume.html", {
            "targets": list(in_force.values()) if everything else chosen, "numbers": asked, "everything": everything,
            "found": operations.unprocessed(**about),
        }  # fmt: skip
    actor = forms.actor_of(fields, request.state.person)
    if everything:
        operations.resume(None, actor)
    elif len(chosen) == 1:
        operations.resume(chosen[0], actor)
    else:
        operations.resume_these(chosen, actor)
    return "/pauses"


# --- limits --------------------------------------------------------------------------------------------------------


def limits(operations: Operations, fields: Fields, _request: Request) -> Page:
    return "limits.html", {
        "found": operations.limits() if operations.rights().sees_pauses else None, "in_use": operations.limits_in_use(),
        "given": _given(fields, _LIMIT),
    }  # fmt: skip


def confirm_limit(operations: Operations, fields: Fields, request: Request) -> Page:
    actor = forms.actor_of(fields, request.state.person)
    setting = forms.limit_of(fields, actor)
    named = (setting.handler, setting.subscription)
    before = [each for each in operations.limits() if (each.setting.handler, each.setting.subscription) == named]
    return "confirm_limit.html", {
        "setting": setting, "before": before[0] if before else None, "command": actor.command,
        "found": operations.unprocessed(handler=setting.handler), "fields": list(_given(fields, _LIMIT).items()),
    }  # fmt: skip


def set_limit(operations: Operations, fields: Fields, request: Request) -> str:
    actor = forms.actor_of(fields, request.state.person)
    operations.set_limit(forms.limit_of(fields, actor), actor)
    return "/limits"


def clear_limit(operations: Operations, fields: Fields, request: Request) -> Page | str:
    everything, target = one(fields, "limit") == "all", None
    if not everything:
        target = _found_limit(operations.limits(), forms.number_of(fields, "limit", 2**62))
    if one(fields, "because") is None:
        handler = target.setting.handler if target else None
        return "confirm_clear.html", {
            "target": target, "count": len(operations.limits()), "number": one(fields, "limit"),
            "found": operations.unprocessed(handler=handler),
        }  # fmt: skip
    handler, subscription = (target.setting.handler, target.setting.subscription) if target else (None, None)
    operations.clear_limit(handler, subscription, forms.actor_of(fields, request.state.person))
    return "/limits"


# --- subscriptions -------------------------------------------------------------------------------------------------


def confirm_drop(operations: Operations, fields: Fields, _request: Request) -> Page:
    return "confirm_drop.html", {"each": operations.subscription(_subscription(fields))}


def drop(operations: Operations, fields: Fields, request: Request) -> str:
    """The one that was confirmed: its number is not given to another one."""
    actor, number = forms.actor_of(fields, request.state.person), forms.number_of(fields, "number", 2**15 - 1)
    operations.drop_subscription(_subscription(fields), number, actor)
    return "/subscriptions"


def _subscription(fields: Fields) -> str:
    if (name := one(fields, "subscription")) is None:
        raise UsageError("no subscription was chosen")
    return name


def _found_limit(found: list[SetLimit], number: int) -> SetLimit:
    for each in found:
        if each.setting.id == number:
            return each
    raise NotFoundError(f"there is no limit {number}", hint="somebody has changed or removed it")


def _given(fields: Fields, names: tuple[str, ...]) -> dict[str, str]:
    return {name: value for name in names if (value := one(fields, name)) is not None}
