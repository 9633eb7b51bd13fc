"""The same over HTTP and JSON, with an OpenAPI document at ``/api/openapi.json``.

A person is known as for the pages, and the role's grants decide what is done. An error is an object with ``error`` and
``hint``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Path, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

from cdc import __version__
from cdc.app.documents import (
    action_document,
    backfill_document,
    change_document,
    control_document,
    finding_document,
    limit_document,
    status_document,
    subscription_document,
)
from cdc.contrib.ui import models
from cdc.contrib.ui.failures import RequestFailure, described
from cdc.contrib.ui.operations import DecisionAsked, Deed, Done, Operations, Source
from cdc.contrib.ui.places import read_place, written_place
from cdc.core.limits import LimitSetting
from cdc.core.model import ChangeState
from cdc.core.pauses import Pause
from cdc.postgres.actions import Actor
from cdc.postgres.admin import parse_reference
from cdc.postgres.bulk import Wanted

_PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": models.Problem, "description": description}
    for status, description in (
        (400, "it does not make sense"), (401, "nobody is logged in"), (403, "the role may not, or another site asks"),
        (404, "it is not there"), (409, "it is refused"), (413, "the body is too large"),
        (421, "the interface has no such name"), (422, "it does not fit this document"),
        (503, "the database does not answer, or takes too long"),
    )
}  # fmt: skip


class _FailedError(Exception):
    def __init__(self, failure: RequestFailure) -> None:
        super().__init__(failure.sentence)
        self.failure = failure


def make_api(source: Source) -> FastAPI:
    """An ASGI application; ``access`` stands before it."""
    api = FastAPI(
        title="cdc", version=__version__, docs_url=None, redoc_url=None, openapi_url="/openapi.json",
        responses=_PROBLEMS, servers=[{"url": "/api"}], root_path_in_servers=False,
        description="What `cdc ui` shows and does. See docs/guides/web-interface.md.",
    )  # fmt: skip
    api.add_exception_handler(RequestValidationError, _does_not_fit)
    api.add_exception_handler(_FailedError, _failed)
    api.add_exception_handler(StarletteHTTPException, problem)
    api.state.source = source
    _reading(api)
    _reading_the_rest(api)
    _deciding(api)
    _controlling(api)
    return api


def _opened(request: Request) -> Iterator[Operations]:
    source: Source = request.app.state.source
    try:
        with source.open() as operations:
            yield operations
    except (RequestValidationError, HTTPException):
        raise
    except Exception as error:  # noqa: BLE001 - every error is a sentence; what is unexpected is logged
        raise _FailedError(described(error)) from None


def _actor(request: Request) -> Callable[[str], Actor]:
    return lambda because: Actor(request.state.person, "api", because)


Opened = Annotated[Operations, Depends(_opened)]
Who = Annotated[Callable[[str], Actor], Depends(_actor)]
Number = Annotated[int, Path(ge=1, le=2**31 - 1)]


def _reading(api: FastAPI) -> None:

    @api.get("/status")
    def status(operations: Opened) -> dict[str, Any]:
        """Who works, how fast, and what is not processed: as `cdc status --json`."""
        return status_document(operations.status(), operations.schema)

    @api.get("/activity", response_model=models.ActivityFound)
    def activity(operations: Opened) -> dict[str, Any]:
        """What was processed of late by type and operation, and what failed by handler and kind of error."""
        failed = operations.failed()
        return {
            "processed": [{"handler": handler, **asdict(each)} for handler, each in operations.processed()],
            "failed": None if failed is None else [asdict(each) for each in failed],
        }

    @api.get("/changes", response_model=models.Changes)
    def changes(
        operations: Opened,
        *,
        asked: Annotated[models.ChangesAsked, Query()],
    ) -> dict[str, Any]:
        """A page of the changes in one state, without their payload."""
        found = operations.search(
            ChangeState(asked.state),
            asked.wanted(operations),
            asked.limit,
            behind=read_place(asked.after),
            subscription=asked.subscription,
        )
        shown = [change_document(each) for each in found.entries]
        complete = found.next is None and not found.cut
        return {"changes": shown, "complete": complete, "next": written_place(found.next)}

    @api.get("/changes/{name}", response_model=models.OneChange, response_model_exclude_unset=True)
    def change(
        operations: Opened, name: str, *, payload: bool = False, subscription: models.Text | None = None
    ) -> dict[str, Any]:
        """One change by its seq or id, and what led to it; with `payload` its data, if the role sees that."""
        shown = operations.show(parse_reference(name), subscription=subscription, payload=payload)
        fields = {**change_document(shown.entry), **_parsed(shown.payload or {})}
        others = {
            "chain": [asdict(each) for each in shown.chain],
            "attempts": [asdict(each) for each in shown.attempts],
        }
        return {"change": fields | others}


def _reading_the_rest(api: FastAPI) -> None:
    @api.get("/controls", response_model=models.ControlsInForce)
    def controls(operations: Opened) -> dict[str, Any]:
        """What is paused and limited."""
        return {"controls": [control_document(each) for each in operations.controls()],
                "limits": [limit_document(each) for each in operations.limits()]}  # fmt: skip

    @api.get("/limits", response_model=models.LimitsInForce)
    def limits(operations: Opened) -> dict[str, Any]:
        """The limits that are set, and what consumers have leased of all limits."""
        used = operations.limits_in_use()
        return {"limits": [limit_document(each) for each in operations.limits()],
                "in_use": None if used is None else [asdict(each) for each in used]}  # fmt: skip

    @api.get("/actions", response_model=models.ActionsTaken)
    def actions(
        operations: Opened,
        limit: Annotated[int, Query(ge=1, le=1_000)] = 50,
        before: Annotated[models.Seq | None, Query(description="The `id` of the last one of the page before.")] = None,
    ) -> dict[str, Any]:
        """What operators have done, the latest first."""
        return {"actions": [action_document(each) for each in operations.actions(limit, before)]}

    @api.get("/backfills")
    def backfills(operations: Opened) -> dict[str, list[dict[str, Any]]]:
        """The last hundred, the latest first."""
        return {"backfills": [backfill_document(each) for each in operations.backfills()]}

    @api.get("/subscriptions")
    def subscriptions(operations: Opened) -> dict[str, list[dict[str, Any]]]:
        """Those beside the default one, and how far they are."""
        return {"subscriptions": [subscription_document(each) for each in operations.subscriptions()]}

    @api.post("/doctor", response_model=models.Findings)
    def doctor(operations: Opened) -> dict[str, Any]:
        """What `cdc doctor` finds with the role of this interface. It changes nothing, and may take a minute."""
        return {"findings": [finding_document(each) for each in operations.examine()]}


def _deciding(api: FastAPI) -> None:

    @api.post("/changes/retry", response_model=models.Decided)
    def retry(operations: Opened, who: Who, given: models.StateDecisionGiven) -> dict[str, Any]:
        """Try changes again now that wait or are dead."""
        return _decide(operations, who(given.because), given, "retry", state=given.state)

    @api.post("/changes/discard", response_model=models.Decided)
    def discard(operations: Opened, who: Who, given: models.StateDecisionGiven) -> dict[str, Any]:
        """Mark changes processed that wait or are dead: nothing is to be done about them."""
        return _decide(operations, who(given.because), given, "discard", state=given.state)

    @api.post("/changes/replay", response_model=models.Decided)
    def replay(operations: Opened, who: Who, given: models.ReplayGiven) -> dict[str, Any]:
        """Have processed changes handled once more.

        To go on where `left` is not 0, repeat it with `unless_replayed_since`.
        """
        since = given.unless_replayed_since or datetime.now(UTC)
        decided = _decide(
            operations, who(given.because), given, "replay", latest_per_key=given.latest_per_key, since=since
        )
        return {**decided, "unless_replayed_since": since}


def _controlling(api: FastAPI) -> None:

    @api.post("/pauses", response_model=models.Paused)
    def pause(operations: Opened, who: Who, given: models.PauseGiven) -> dict[str, Any]:
        """Let consumers start nothing of this, until it is resumed. A pause of the same replaces the one before."""
        actor = who(given.because)
        target = Pause(0, given.subscription, given.type, given.handler, given.key, given.because, actor.person)
        return {"paused": control_document(operations.pause(target, given.for_s, actor))}

    @api.post("/pauses/resume", response_model=models.Resumed)
    def resume(operations: Opened, who: Who, given: models.ResumeGiven) -> dict[str, Any]:
        """End a pause, named as it was set; with nothing named the one of everything."""
        target = Pause(0, given.subscription, given.type, given.handler, given.key)
        ended = operations.resume(None if given.all else target, who(given.because))
        return {"resumed": [control_document(each) for each in ended],
                "left": [control_document(each) for each in operations.controls()]}  # fmt: skip

    @api.post("/limits", response_model=models.LimitSet)
    def set_limit(operations: Opened, who: Who, given: models.LimitGiven) -> dict[str, Any]:
        """Limit a handler over all consumers, in place of another limit of it."""
        actor = who(given.because)
        setting = LimitSetting(0, given.handler, given.limit, given.subscription, given.because, actor.person)
        return {"limit": limit_document(operations.set_limit(setting, actor))}

    @api.post("/limits/clear", response_model=models.LimitsCleared)
    def clear_limit(operations: Opened, who: Who, given: models.ClearGiven) -> dict[str, Any]:
        """End a limit that was set, or all. One in the handler's code holds again, if there is one."""
        ended = operations.clear_limit(given.handler, given.subscription, who(given.because))
        return {"cleared": [limit_document(each) for each in ended]}

    @api.post("/backfills/{number}/pause")
    def pause_backfill(operations: Opened, who: Who, number: Number, given: models.BecauseGiven) -> dict[str, Any]:
        """Stop it after its page."""
        return {"backfill": backfill_document(operations.move_backfill(number, "paused", who(given.because)))}

    @api.post("/backfills/{number}/cancel")
    def cancel_backfill(operations: Opened, who: Who, number: Number, given: models.BecauseGiven) -> dict[str, Any]:
        """End it for good. What it has written is handled."""
        return {"backfill": backfill_document(operations.move_backfill(number, "cancelled", who(given.because)))}

    @api.post("/subscriptions/{name}/drop")
    def drop_subscription(
        operations: Opened, who: Who, name: Annotated[str, Path(max_length=63)], given: models.DropGiven
    ) -> dict[str, Any]:
        """Drop it for good, with its progress and its dead letters. No change is lost to others."""
        return {"subscription": asdict(operations.drop_subscription(name, given.number, who(given.because)))}


def _parsed(payload: Mapping[str, Any]) -> dict[str, Any]:
    """As Python reads it; as its text where Python cannot."""
    return {name: json.loads(value) if isinstance(value, bytes) else value for name, value in payload.items()}


def _decide(
    operations: Operations, actor: Actor, given: models.DecisionGiven, deed: Deed, **described_by: Any
) -> dict[str, Any]:
    if "state" in described_by:
        described_by["state"] = ChangeState(described_by["state"])
    decision = DecisionAsked(
        deed=deed, changes=given.changes or (), subscription=given.subscription,
        wanted=given.filters.wanted(operations) if given.filters else Wanted(), **described_by,
    )  # fmt: skip
    if given.dry_run:
        count = operations.count(decision)
        return {"matching": count, "done": 0, "others": 0, "left": count, "command": None}
    done = operations.carry_out(decision, actor, at_most=given.at_most)
    return _decided(done, actor)


def _decided(done: Done, actor: Actor) -> dict[str, Any]:
    others = done.looked_at - done.done
    return {"matching": done.count, "done": done.done, "others": others, "left": done.left, "command": actor.command}


async def problem(_request: Request, error: Exception) -> JSONResponse:
    """What no path or method is."""
    assert isinstance(error, StarletteHTTPException)
    return JSONResponse({"error": str(error.detail), "hint": "see /api/openapi.json"}, error.status_code, error.headers)


def _does_not_fit(_request: Request, error: Exception) -> JSONResponse:
    """Without what was given: it may be anything."""
    assert isinstance(error, RequestValidationError)
    said = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()[:5])
    return JSONResponse({"error": said[:1_000], "hint": "see /api/openapi.json"}, 422)


def _failed(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, _FailedError)
    failure = error.failure
    return JSONResponse({"error": failure.sentence, "hint": failure.hint}, failure.status)
