"""What the handlers that are named want, for commands that only look."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cdc.app.config import Resolved
from cdc.cli.run import load_router
from cdc.core.errors import UsageError
from cdc.core.router import Router
from cdc.core.type_filter import EVERYTHING, TypeFilter

WANTED_SETTINGS = ("handlers", "deliver.to", "deliver.types")
"""What a command takes that asks for it."""


@dataclass(frozen=True, slots=True)
class HandledTypes:
    """``scope``: the types that something is said about. ``handles``: whether a type and operation has a handler."""

    scope: TypeFilter
    handles: Callable[[str, str], bool]


def named_router(resolved: Resolved) -> Router:
    """The router that --handlers or CDC_HANDLERS names. Raises UsageError where none is named, or it cannot be loaded.

    As of ``handled_types``, a settings file that was merely found here does not count.
    """
    settings = resolved.settings
    if not settings.handlers or _found_here(resolved):
        raise UsageError(
            "which types the handler gets is not known", hint="name the handlers: --handlers package.module:router"
        )
    return load_router(settings.handlers, settings)


def handled_types(resolved: Resolved) -> HandledTypes | None:
    """None where no handlers are named. Raises CdcError where they cannot be loaded.

    To load them runs their code: not of a module that a settings file names which was merely found here.
    """
    settings = resolved.settings
    if settings.deliver.to:
        types = settings.deliver.types
        scope = EVERYTHING if types is None else TypeFilter(tuple(types), include=True)
        return HandledTypes(scope, lambda entity_type, _operation: scope.has(entity_type))
    if not settings.handlers or _found_here(resolved):
        return None
    router = load_router(settings.handlers, settings)
    return HandledTypes(
        router.scope,
        lambda entity_type, operation: router.ignores(entity_type) or router.match(entity_type, operation) is not None,
    )


def _found_here(resolved: Resolved) -> bool:
    """Whether the handlers are named by a settings file that nobody named."""
    return bool(resolved.found) and " in " in resolved.sources["handlers"]
