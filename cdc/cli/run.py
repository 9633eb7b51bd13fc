"""cdc run: the consumer."""

from __future__ import annotations

import importlib
import inspect
import sys
import traceback
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from types import ModuleType

import click

from cdc.app.config import DeliverSection, Resolved, Settings
from cdc.app.sections import consumers
from cdc.cli.options import resolved_options
from cdc.core.errors import CdcError, UsageError
from cdc.core.masking import mask
from cdc.core.router import Router
from cdc.runtime.process import Interrupted, interrupted

_EXAMPLE = "write it as package.module:router, for example --handlers myapp.events:router"


@click.command()
@resolved_options(
    "handlers", "deliver.to", "deliver.types", "deliver.batch", "deliver.linger", "deliver.source", "deliver.format",
    "deliver.user", "deliver.password", "deliver.secret", "deliver.previous_secret",
    "only", "except", "subscription", "observe", "dsn", "stream_dsn", "handlers_dsn", "schema", "slot.name",
    "unhandled", "slot.create", "slot.recreate",
    "slot.plugin", "slot.mode", "stream", "http.host", "http.port", "http.page", "http.hosts", "concurrency",
    "threads", "transactions", "window", "window_bytes", "max_attempts", "max_chain_depth", "timeout", "backoff.base",
    "backoff.cap", "drain_time", "sweep_interval", "poll_interval", "retention", "log.level", "log.format",
    "whatsapp.sender_url", "whatsapp.sender_token", "whatsapp.help_text",
)  # fmt: skip
def run(resolved: Resolved) -> None:
    """Hand committed changes to your handlers, or to an application over HTTP.

    \b
        cdc run --dsn postgresql://app@db/app --handlers myapp.events:router
        cdc run --dsn postgresql://app@db/app --deliver-to http://127.0.0.1:3000/changes --type order

    Runs until SIGTERM, SIGHUP or Ctrl-C, then lets running handlers finish and ends with 0. The database needs "cdc db
    install" and "cdc track" first. Where replication is not to be had it works as well: it looks for new changes
    at short intervals instead of being notified.

    Every option is also a variable (--slot-name: CDC_SLOT_NAME) and a line of cdc.toml (name in [slot]). Where cdc.toml
    has sections [subscription.NAME], each with handlers of its own, one process consumes all of these subscriptions.
    """
    several = [each.settings for each in consumers(resolved)]
    for settings in several:
        _refuse_nobody(settings)
    try:
        chosen = [(each, load_router(each.handlers, each) if each.handlers else None) for each in several]
        from cdc.app.serve import serve  # noqa: PLC0415 - --help does not wait for the consumer to load

        serve(chosen)
    except (CdcError, Interrupted):
        if not interrupted():
            raise
        # Nothing ran that could be drained; an error that the interruption caused in the module is not reported.


def _refuse_nobody(settings: Settings) -> None:
    if settings.deliver != DeliverSection() and not settings.deliver.to:
        raise UsageError(
            "a delivery has settings and no URL", hint="--deliver-to URL; or no --type, --batch, CDC_DELIVER_..."
        )
    if not settings.handlers and not settings.deliver.to:
        raise UsageError("no handlers are named", hint=f"--handlers or CDC_HANDLERS: {_EXAMPLE}; or --deliver-to URL")


def load_router(reference: str, settings: Settings) -> Router:
    """The Router that ``package.module:name`` means, looked for where the process starts, then where Python looks.

    The name may also be that of a function, which makes one of the settings: ``def router(settings: Settings)``.
    Raises UsageError in one sentence; for a fault inside the module it names the file, the line and the exception.
    """
    module_name, colon, attribute = reference.partition(":")
    if module_name.endswith(".py") and colon:
        module = ".".join(Path(module_name).with_suffix("").parts)
        raise UsageError(f"{reference!r} names a file; a module is expected", hint=f"write it as {module}:{attribute}")
    if not colon or not all(part.isidentifier() for part in (*module_name.split("."), *attribute.split("."))):
        raise UsageError(f"{mask(reference)!r} is no reference to a router", hint=_EXAMPLE)  # it may be a DSN
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    found = _attribute(_module(module_name), attribute)
    if inspect.isfunction(found):
        found = _made(found, settings, reference)
    if not isinstance(found, Router):
        raise UsageError(
            f"{reference} is a {type(found).__name__}, not a cdc.Router", hint=f"router = cdc.Router(); {_EXAMPLE}"
        )
    return found


def _made(make: Callable[..., object], settings: Settings, reference: str) -> object:
    try:
        return make(settings)
    except CdcError:
        raise
    except Exception as error:  # noqa: BLE001 - see _module
        raise _broken(f"{reference} cannot make a router", error) from None


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except CdcError:
        raise  # two handlers for one change: its message is a sentence already
    except ModuleNotFoundError as missing:
        if missing.name and f"{name}.".startswith(f"{missing.name}."):
            raise UsageError(
                f"there is no module {missing.name}",
                hint=f"start in the folder that holds it, or install it; looked in {Path.cwd()} first",
            ) from None
        raise _broken(f"module {name} cannot be imported", missing) from None
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a user's module may raise anything
        raise _broken(f"module {name} cannot be imported", error) from None


def _broken(what: str, error: BaseException) -> UsageError:
    if isinstance(error, SyntaxError) and error.filename:
        where = f"{error.filename}:{error.lineno}"
    else:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
        where = f"{frames[-1].filename}:{frames[-1].lineno}"
    said = traceback.format_exception_only(error)[-1].strip()
    return UsageError(f"{what}: {said} ({where})", hint="correct the module, then start again")


def _attribute(module: ModuleType, path: str) -> object:
    try:
        return reduce(getattr, path.split("."), module)
    except AttributeError:
        routers = [name for name, value in vars(module).items() if isinstance(value, Router)]
        hint = f"it has {', '.join(routers)}" if routers else "define it there: router = cdc.Router()"
        raise UsageError(f"module {module.__name__} has no {path}", hint=hint) from None
