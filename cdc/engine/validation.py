"""Which changes a handler is called with, and as what: their documents as the model that it names."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from pydantic import TypeAdapter

from cdc.core.model import Change, Outcome
from cdc.core.router import Handler
from cdc.engine.calls import call_here
from cdc.engine.error_policy import ErrorPolicy, TooDeepError


class Validation:
    def __init__(self, handlers: Iterable[Handler], error_policy: ErrorPolicy) -> None:
        self._adapters = {h.name: TypeAdapter(h.model) for h in handlers if h.model is not None}
        self._error_policy = error_policy

    def function(self, handler: Handler) -> Callable[..., Any]:
        """The handler's function, for a change as it was read. Calling it raises what validators raise."""
        adapter = self._adapters.get(handler.name)
        return partial(_call_with_model, handler.function, adapter) if adapter else handler.function

    def split(
        self, handler: Handler, changes: Sequence[Change], outcomes: dict[Change, Outcome]
    ) -> tuple[Sequence[Change], Sequence[Change]]:
        """The changes that may run, as they are and as the handler gets them; sets the outcome of the others."""
        if handler.model is None and not any(change.chain for change in changes):
            return changes, changes
        changes = given = self._split_deep(handler, changes, outcomes)
        if adapter := self._adapters.get(handler.name):
            changes, given = self._validate(handler, adapter, changes, outcomes)
        shut = {change.key for change, outcome in outcomes.items() if handler.transactional or outcome.blocks_key}
        pairs = [(c, g) for c, g in zip(changes, given, strict=True) if c.key not in shut]
        return [c for c, _ in pairs], [g for _, g in pairs]

    def _split_deep(self, handler: Handler, changes: Sequence[Change], outcomes: dict[Change, Outcome]) -> list[Change]:
        outcomes |= {
            change: self._error_policy.on(handler, change, TooDeepError(change)) for change in changes if change.chain
        }
        return [change for change in changes if not change.chain]

    def _validate(
        self, handler: Handler, adapter: TypeAdapter[Any], changes: Sequence[Change], outcomes: dict[Change, Outcome]
    ) -> tuple[list[Change], list[Change]]:
        fitting: list[Change] = []
        given: list[Change] = []
        for change in changes:
            try:
                given.append(call_here(_with_model, adapter, change))
                fitting.append(change)
            except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - validators are the handler's code, too
                outcomes[change] = self._error_policy.on(handler, change, error)
        return fitting, given


def _call_with_model(function: Callable[..., Any], adapter: TypeAdapter[Any], change: Change) -> Any:
    return function(_with_model(adapter, change))


def _with_model(adapter: TypeAdapter[Any], change: Change) -> Change:
    new = None if change.new is None else adapter.validate_python(change.new)
    old = None if change.old is None else adapter.validate_python(change.old)
    return replace(change, new=new, old=old)
