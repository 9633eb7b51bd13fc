"""What a handler gets for a change: its filter may leave it out, and its rows become the handler's model.

For whoever calls handlers: a consumer (``validation``), a dry run (``shadow``), a test of handlers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from functools import partial
from typing import Any

from pydantic import TypeAdapter

from cdc.core.model import OF_TABLES, Change, ModelChange
from cdc.core.router import Handler

Prepare = Callable[[Change], Change | None]
"""What the handler gets for a change; None: its filter leaves it out. Raises whatever filter and model raise."""

_FIELDS = tuple(field.name for field in fields(Change) if field.name not in ("old", "new"))


def preparations(handlers: Iterable[Handler]) -> Mapping[str, Prepare]:
    """By name, for the handlers that do not get each change as it was read."""
    made = {handler.name: preparation(handler) for handler in handlers}
    return {name: prepare for name, prepare in made.items() if prepare is not None}


def preparation(handler: Handler) -> Prepare | None:
    """How a change becomes what the handler gets; None: it gets each as it was read."""
    validate = None if handler.model is None else partial(_with_model, TypeAdapter(handler.model))
    return validate if handler.filter is None else partial(handler.filter.apply, validate)


def _with_model(adapter: TypeAdapter[Any], change: Change) -> Change:
    if change.operation in OF_TABLES:
        return change
    new = None if change.new is None else adapter.validate_python(change.new)
    old = None if change.old is None else adapter.validate_python(change.old)
    rest = {name: getattr(change, name) for name in _FIELDS}
    return ModelChange(old=old, new=new, captured=change, **rest)
