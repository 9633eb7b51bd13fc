"""What the handlers that are named want, for commands that only look."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cdc.app.config import Resolved
from cdc.cli.run import load_router
from cdc.core.type_filter import EVERYTHING, TypeFilter

WANTED_SETTINGS = ("handlers", "deliver.to", "deliver.types")
"""What a command takes that asks for it."""


@dataclass(frozen=True, slots=True)
class HandledTypes:
    """``scope``: the types that something is said about. ``handles``: whether a type and operation has a handler."""

    scope: TypeFilter
    handles: Callable[[str, str], bool]


def handled_types(resolved: Resolved) -> HandledTypes | None:
    """None where no handlers are named. Raises CdcError where they cannot be loaded.

    To load them runs their code: not of a module that a settings file names which was merely found here.
    """
    settings = resolved.settings
    if settings.deliver.to:
        types = settings.deliver.types
        scope = EVERYTHING if types is None else TypeFilter(tuple(types), include=True)
        return HandledTypes(scope, lambda entity_type, _operation: scope.has(entity_type))
    if not settings.handlers or (resolved.found and " in " in resolved.sources["handlers"]):
        return None
    router = load_router(settings.handlers, settings)
    return HandledTypes(
        router.scope,
        lambda entity_type, operation: router.ignores(entity_type) or router.match(entity_type, operation) is not None,
    )
