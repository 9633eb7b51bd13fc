"""The pages: what is asked for is read, and rendered; what is decided is confirmed first.

A form is confirmed on a page that has its count, and carried out with the number of that page: if more match by then,
nothing is done. Each has the token of its person (``access``), and the id of its command: sent twice, it is done once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

from anyio.to_thread import run_sync
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from cdc.contrib.ui import control_pages, forms
from cdc.contrib.ui.access import Doors
from cdc.contrib.ui.documents_diff import columns, text
from cdc.contrib.ui.failures import RequestFailure, described
from cdc.contrib.ui.forms import Fields, one
from cdc.contrib.ui.operations import Operations, Source
from cdc.contrib.ui.places import read_place, written_place
from cdc.contrib.ui.rendering import environment, style
from cdc.core.errors import NotFoundError, UsageError
from cdc.postgres.admin import parse_reference
from cdc.replication.slot_health import assess

log = logging.getLogger("cdc.contrib.ui")

_PAGE = 50
_SEE_OTHER = 303

Page = tuple[str, dict[str, Any]]
"""A template and what it shows."""
Read = Callable[[Operations, Fields, Request], Page]
Act = Callable[[Operations, Fields, Request], "Page | str"]
"""Returns a page, or where to go."""


class Pages:
    def __init__(self, source: Source, doors: Doors) -> None:
        self._source = source
        self._doors = doors
        self._environment = environment()

    def routes(self) -> list[Route]:
        css = style()

        async def styled(_request: Request) -> Response:
            return Response(css, media_type="text/css")

        reads: dict[str, Read] = {
            "/": _overview, "/changes": self._changes, "/changes/{name}": _change, "/pauses": control_pages.pauses,
            "/limits": control_pages.limits, "/actions": _actions, "/backfills": _backfills,
            "/subscriptions": _subscriptions, "/slot": _slot,
        }  # fmt: skip
        acts: dict[str, Act] = {
            "/confirm": _confirm, "/decide": _decide, "/pauses/confirm": control_pages.confirm_pause,
            "/pauses/set": control_pages.pause, "/pauses/keys": control_pages.confirm_keys,
            "/pauses/set-keys": control_pages.pause_keys, "/pauses/end": control_pages.resume,
            "/limits/confirm": control_pages.confirm_limit, "/limits/set": control_pages.set_limit,
            "/limits/end": control_pages.clear_limit, "/backfills/confirm": _confirm_backfill,
            "/backfills/move": _move_backfill, "/doctor": _doctor,
            "/subscriptions/confirm": control_pages.confirm_drop, "/subscriptions/drop": control_pages.drop,
        }  # fmt: skip
        return [
            Route("/style.css", styled),
            *(Route(path, self._reading(read)) for path, read in reads.items()),
            *(Route(path, self._acting(act), methods=["POST"]) for path, act in acts.items()),
        ]

    def _reading(self, read: Read) -> Callable[[Request], Any]:
        async def answer(request: Request) -> Response:
            def page() -> Response:
                try:
                    fields = forms.of_query(request)
                    with self._source.open() as operations:
                        return self._rendered(request, operations, *read(operations, fields, request))
                except Exception as error:  # noqa: BLE001 - every error is shown as a sentence
                    return self._failed(request, error)

            return await run_sync(page)

        return answer

    def _acting(self, act: Act) -> Callable[[Request], Any]:
        async def answer(request: Request) -> Response:
            try:
                fields = await forms.of_form(request)
                self._refuse_forged(request, fields)
            except UsageError as error:
                return self._failed(request, error)

            def page() -> Response:
                try:
                    with self._source.open() as operations:
                        found = act(operations, fields, request)
                        if isinstance(found, str):
                            return RedirectResponse(found, _SEE_OTHER)
                        return self._rendered(request, operations, *found)
                except Exception as error:  # noqa: BLE001 - every error is shown as a sentence
                    return self._failed(request, error)

            return await run_sync(page)

        return answer

    def _refuse_forged(self, request: Request, fields: Fields) -> None:
        if not self._doors.is_token(request.state.person, one(fields, "token") or ""):
            raise UsageError(
                "this form is of another process or person", hint="go back, load the page again, and repeat it"
            )

    def _rendered(self, request: Request, operations: Operations, template: str, shown: dict[str, Any]) -> Response:
        rights = operations.rights()
        page = self._environment.get_template(template).render(
            **shown, rights=rights, schema=self._source.schema, person=request.state.person,
            token=request.state.token, path=request.url.path, handlers=self._source.handlers,
        )  # fmt: skip
        return HTMLResponse(page)

    async def refused(self, request: Request, error: Exception) -> Response:
        """For what is no page."""
        assert isinstance(error, HTTPException)
        failure = RequestFailure(error.status_code, f"there is no such page: {error.detail}", "see the links above")
        return self._failure(request, failure, error.headers)

    def _failed(self, request: Request, error: Exception) -> Response:
        return self._failure(request, described(error))

    def _failure(self, request: Request, failure: RequestFailure, headers: Mapping[str, str] | None = None) -> Response:
        page = self._environment.get_template("failed.html").render(
            failure=failure, schema=self._source.schema, person=request.state.person, rights=None, path="",
            token=request.state.token,
        )  # fmt: skip
        return HTMLResponse(page, failure.status, headers)

    # --- pages that need the source --------------------------------------------------------------------------------

    def _changes(self, operations: Operations, fields: Fields, _request: Request) -> Page:
        state, subscription = forms.state_of(fields), one(fields, "subscription")
        wanted = forms.wanted_of(fields, operations)
        after = one(fields, "after")
        found = operations.search(state, wanted, _PAGE, behind=read_place(after), subscription=subscription)
        filters = forms.filters_of(fields)
        place = written_place(found.next)
        following = forms.query(state=state, subscription=subscription, **filters, after=place) if place else None
        return "changes.html", {
            "state": str(state), "filters": filters, "subscription": subscription, "found": found, "next": following,
            "first": after is None,
        }  # fmt: skip


def _overview(operations: Operations, _fields: Fields, _request: Request) -> Page:
    seen = operations.status()
    types = sorted(seen.outbox.stats.types, key=lambda each: (-each.dead, -each.waiting, -each.fresh))
    return "overview.html", {
        "seen": seen, "types": types, "health": assess(seen.slot) if seen.slot else None,
        "processed": operations.processed(), "failed": operations.failed(), "subscriptions": seen.subscriptions or [],
    }  # fmt: skip


def _change(operations: Operations, fields: Fields, request: Request) -> Page:
    asked, subscription = one(fields, "payload") is not None, one(fields, "subscription")
    shown = operations.show(parse_reference(request.path_params["name"]), subscription=subscription, payload=asked)
    payload = shown.payload
    rows = columns(payload["old"], payload["new"]) if payload else None
    texts = {name: text(payload[name]) for name in ("old", "new", "metadata")} if payload else {}
    return "change.html", {
        "shown": shown, "entry": shown.entry, "rows": rows, "texts": texts, "subscription": subscription,
        "asked": asked, "handler": shown.handler, "held_by": operations.held_by(shown, subscription),
    }  # fmt: skip


def _actions(operations: Operations, fields: Fields, _request: Request) -> Page:
    before = forms.number_of(fields, "before", 2**63 - 1) if one(fields, "before") else None
    found = operations.actions(_PAGE, before)
    return "actions.html", {"found": found, "done": one(fields, "command"), "size": _PAGE}


def _backfills(operations: Operations, _fields: Fields, _request: Request) -> Page:
    return "backfills.html", {"found": operations.backfills() if operations.rights().sees_backfills else None}


def _subscriptions(operations: Operations, _fields: Fields, _request: Request) -> Page:
    found = operations.subscriptions() if operations.rights().sees_subscriptions else None
    return "subscriptions.html", {"found": found}


def _slot(operations: Operations, _fields: Fields, _request: Request) -> Page:
    return _with_findings(operations, None)


def _doctor(operations: Operations, _fields: Fields, _request: Request) -> Page:
    return _with_findings(operations, operations.examine())


def _with_findings(operations: Operations, findings: Any) -> Page:
    slot = operations.slot()
    health = assess(slot) if slot else None
    return "slot.html", {"slot": slot, "health": health, "findings": findings, "name": operations.slot_name}


# --- deciding ------------------------------------------------------------------------------------------------------


def _confirm(operations: Operations, fields: Fields, _request: Request) -> Page:
    decision = forms.decision_of(fields, operations)
    return "confirm.html", {
        "decision": decision, "count": operations.count(decision), "fields": _carried(fields), "command": uuid4(),
        "now": datetime.now(UTC).isoformat(), "filters": forms.filters_of(fields),
    }  # fmt: skip


def _decide(operations: Operations, fields: Fields, request: Request) -> Page | str:
    decision, actor = forms.decision_of(fields, operations), forms.actor_of(fields, request.state.person)
    done = operations.carry_out(decision, actor, at_most=forms.number_of(fields, "at_most", 2**62))
    if done.left:
        return "partly.html", {
            "decision": decision, "done": done, "fields": _carried(fields), "actor": actor,
            "now": one(fields, "decided_at"),
        }  # fmt: skip
    return "/actions?" + forms.query(command=actor.command)


def _carried(fields: Fields) -> list[tuple[str, str]]:
    """What the next form has to say again."""
    names = (*forms.FILTERS, "deed", "scope", "change", "state", "subscription", "latest_per_key")
    return [(name, value) for name in names for value in fields.get(name, ())]


def _backfill(operations: Operations, fields: Fields) -> Any:
    number = forms.number_of(fields, "backfill")
    for each in operations.backfills():
        if each.id == number:
            return each
    raise NotFoundError(f"there is no backfill {number} among the last hundred")


def _confirm_backfill(operations: Operations, fields: Fields, _request: Request) -> Page:
    return "confirm_backfill.html", {"each": _backfill(operations, fields), "to": _to(fields)}


def _move_backfill(operations: Operations, fields: Fields, request: Request) -> str:
    actor = forms.actor_of(fields, request.state.person)
    operations.move_backfill(_backfill(operations, fields).id, _to(fields), actor)
    return "/backfills"


def _to(fields: Fields) -> Any:
    to = one(fields, "to")
    if to not in ("paused", "cancelled"):
        raise UsageError("what is to become of it?", hint="paused or cancelled")
    return to
