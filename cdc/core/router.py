"""Which handler gets which change. Pure; ``executor`` calls the handlers.

Rules are slots in a table: (entity type or any, operation or any). A change goes to the most specific slot that is
filled, type before operation, so that at most one handler gets it. A slot filled twice is an error at the declaration
of the second handler.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, fields, replace
from functools import partial
from math import inf
from types import MappingProxyType
from typing import Any, Literal, TypeVar

from cdc.core.change_filter import ChangeFilter
from cdc.core.errors import UsageError
from cdc.core.limits import Limit
from cdc.core.model import OF_TABLES, Change, Operation
from cdc.core.type_filter import EVERYTHING, TypeFilter

ANY = "*"
"""Stands for every entity type, or every operation, that has no rule of its own."""

CONNECTION = "connection"
"""Name of the parameter that makes a handler transactional."""

CHANGES = "changes"
"""Name of the parameter that makes a handler one for batches."""

_BATCH = 100
_GROUP = 50
"""A larger group saves few more round trips, and one failure undoes much."""
_LINGER_MAX_S = 10.0
_QUIET_MAX_S = 3_600.0
_AT_MOST = 10
"""In times of ``settle``, unless it is named: a key that never rests is handled all the same."""

Function = TypeVar("Function", bound=Callable[..., Any])
Hook = Callable[..., Any]


@dataclass(frozen=True, slots=True, eq=False)
class Handler:
    """A function and how to call it. ``max_attempts`` and ``timeout_s`` of None mean the consumer's settings.

    Compared by identity.
    """

    name: str
    function: Callable[..., Any]
    is_async: bool
    transactional: bool = False
    """The function has a parameter ``connection``: it runs in a transaction that marks the change."""
    group: int = 1
    """How many of its changes may share a transaction, each with a call of its own."""
    pauses: bool = False
    """A dead letter of this handler blocks its key."""
    batch: int | None = None
    """The function has a parameter ``changes``: it gets up to this many at once."""
    linger_s: float = 0.0
    """How long, in seconds, a batch that is not full waits for more."""
    model: Any = None
    max_attempts: int | None = None
    timeout_s: float | None = None
    filter: ChangeFilter | None = None
    """Which of the changes that it is matched with it wants; None: all."""
    latest: bool = False
    """One call stands for all the changes of its key that wait."""
    quiet_s: float = 0.0
    """With ``latest``: for how many seconds no further change of the key has come before the call."""
    limit: Limit | None = None
    """How often it may be called, over all consumers."""
    at_most_s: float = 0.0
    """With ``latest``: seconds from the first change after which the call is made in any case."""

    @property
    def single(self) -> bool:
        """It is called with one change and no other argument."""
        return not self.transactional and self.batch is None and not self.latest

    def call(self, changes: Sequence[Change], connection: Any = None) -> Any:
        """Call the function with one change, or with a batch."""
        extra = {CONNECTION: connection} if self.transactional else {}
        if self.batch is None:
            return self.function(changes[0], **extra)
        return self.function(**{CHANGES: list(changes)}, **extra)


@dataclass(frozen=True, slots=True)
class HandledChanges:
    """The changes that one handler gets, by type and operation: those in ``named``, and ``others`` of other types.

    ``others_than``: the types that have a rule of their own.
    """

    named: frozenset[tuple[str, str]]
    others_than: frozenset[str]
    others: frozenset[str]


class Router:
    """Maps changes to handlers.

    >>> router = Router()
    >>> @router.on("reaction", "INSERT")
    ... async def run_rules(change: Change) -> None: ...
    """

    def __init__(self) -> None:
        self._slots: dict[tuple[str, str], Handler] = {}
        self._ignored: set[str] = set()
        self._processed_hooks: list[Hook] = []
        self._error_hooks: list[Hook] = []
        self._wakeup_hooks: list[Hook] = []

    def on(
        self,
        entity_type: str,
        *operations: str,
        changed: Set[str] | None = None,
        when: Callable[[Change], bool] | None = None,
        model: Any = None,
        max_attempts: int | None = None,
        timeout: float | None = None,
        dead: Literal["skip", "pause"] = "skip",
        batch: int | None = None,
        linger: float = 0.0,
        group: int | None = None,
        latest: bool = False,
        settle: float = 0.0,
        at_most: float | None = None,
        limit: Limit | None = None,
        name: str | None = None,
    ) -> Callable[[Function], Function]:
        """Declare the handler of an entity type ("*": of every type without a rule of its own).

        ``operations``: any of INSERT, UPDATE, DELETE, READ for rows of a backfill, and TRUNCATE; none: all but that.
        ``changed`` and ``when`` limit that; the rest is marked processed without a call. ``changed``: names of columns,
        one of which has changed (``Change.changed``); one that a change does not have counts as changed. ``when``: a
        plain function on the event loop, so without I/O; it gets the change as the handler does, and what it raises
        is a failed attempt of the handler. ``model``: a pydantic model (or any type pydantic can validate) that
        ``change.new`` and ``change.old`` become; a row that does not fit is a dead letter at once. ``max_attempts`` and
        ``timeout`` (seconds) override the consumer's settings. ``dead``: what a dead letter does to the later changes
        of its key: they go on ("skip") or are held back until an operator has decided ("pause"). ``name`` is the
        handler's name in metrics and logs.

        The function may be async, or plain: then it runs in a thread. With a parameter named ``changes`` it gets a list
        of up to ``batch`` (default 100), in seq order within a key; one that is not full waits ``linger`` seconds for
        more. With a parameter named ``connection`` it is transactional: it gets a psycopg connection (async or not, as
        it is itself) in a transaction that has locked the change and marks it processed before the commit, so that what
        it writes there happens exactly once. If many such changes wait, up to ``group`` (default 50) share a
        transaction, each with its own call; if one fails, all are rolled back and called again one by one.

        With ``latest`` one call stands for all the changes of its key that wait: ``old`` is of the first, ``new`` and
        all else of the last, and ``change.coalesced`` says how many there were. The call is made when no further one
        has come for ``settle`` seconds, and ``at_most`` seconds (default: ten times ``settle``) after the first in any
        case. ``changed`` and ``when`` are asked about what a call gets. Not for batches. ``limit``: ``cdc.Limit``.
        """
        slots = [(_entity_type(entity_type), operation) for operation in _operations(operations)]
        _numbers(int, max_attempts=max_attempts, batch=batch, group=group)
        _numbers(float, timeout=timeout, linger=linger, settle=settle, at_most=at_most)
        _positive(max_attempts=max_attempts, timeout=timeout, batch=batch, group=group)
        made = partial(
            Handler, pauses=_pauses(dead), linger_s=_linger(linger), model=model, max_attempts=max_attempts,
            timeout_s=timeout, filter=_filter(changed, when), limit=_limit(limit), **_quiet(latest, settle, at_most),
        )  # fmt: skip

        def declare(function: Function) -> Function:
            called = _called(function, batch, group, latest, limit)
            handler = self._named(made(name=name or _name(function), **called), name)
            for slot in slots:
                self._fill(slot, handler)
            return function

        return declare

    def ignore(self, *entity_types: str) -> None:
        """Declare that changes of these types have no handler: each is discarded, and its row says so.

        A change of a type that no handler names and that is not ignored stays fresh, for a consumer that handles it.
        """
        for entity_type in entity_types:
            _entity_type(entity_type)
            if entity_type == ANY or entity_type in self.entity_types:
                raise UsageError(
                    f"router.ignore({entity_type!r}): a handler wants changes of it",
                    hint='to discard whatever has no handler: the setting unhandled = "discard"',
                )
            self._ignored.add(entity_type)

    def ignores(self, entity_type: str) -> bool:
        return entity_type in self._ignored

    @property
    def scope(self) -> TypeFilter:
        """The types that have a rule or are ignored; with a rule for "*", all."""
        if any(entity_type == ANY for entity_type, _ in self._slots):
            return EVERYTHING
        return TypeFilter(tuple(sorted(self.entity_types | self._ignored)), include=True)

    def on_processed(self, hook: Function) -> Function:
        """Call ``hook(change)`` after a change is marked processed. An error in it is logged and changes nothing."""
        self._processed_hooks.append(hook)
        return hook

    def on_error(self, hook: Function) -> Function:
        """Call ``hook(change, error)`` after an attempt failed. An error in it is logged and changes nothing."""
        self._error_hooks.append(hook)
        return hook

    def on_wakeup(self, hook: Function) -> Function:
        """Call ``hook(seqs, at)`` when notifications come in, before the changes are read.

        ``seqs``: the numbers of committed changes, ``Change.seq``, also of those that other consumers own. ``at``: when
        they came in, by ``time.monotonic()``, in seconds. A change that a sweep finds has had no notification; one may
        have two. An error in it is logged and changes nothing.
        """
        self._wakeup_hooks.append(hook)
        return hook

    def match(self, entity_type: str, operation: str) -> Handler | None:
        """The handler of such a change, or None if there is none."""
        slots = self._slots
        if operation in OF_TABLES:
            return slots.get((entity_type, operation)) or slots.get((ANY, operation))
        return (
            slots.get((entity_type, operation))
            or slots.get((entity_type, ANY))
            or slots.get((ANY, operation))
            or slots.get((ANY, ANY))
        )

    def operations(self, entity_type: str, handler: Handler) -> tuple[str, ...]:
        """Those of the type that go to this handler."""
        return tuple(str(each) for each in Operation if self.match(entity_type, each) is handler)

    def handled_by(self, name: str) -> HandledChanges:
        """Which changes the handler of this name gets. Raises UsageError where there is none."""
        if name not in (names := {handler.name for handler in self._slots.values()}):
            raise UsageError(f"there is no handler {name!r}", hint=f"there are {', '.join(sorted(names)) or 'none'}")

        def operations(entity_type: str) -> Iterator[str]:
            for operation in Operation:
                handler = self.match(entity_type, operation)
                if handler and handler.name == name:
                    yield str(operation)

        return HandledChanges(
            frozenset((each, operation) for each in self.entity_types for operation in operations(each)),
            self.entity_types | self._ignored,
            frozenset(operations(ANY)),
        )

    @property
    def handlers(self) -> Mapping[tuple[str, str], Handler]:
        return MappingProxyType(self._slots)

    @property
    def entity_types(self) -> frozenset[str]:
        """The types named by a rule."""
        return frozenset(entity_type for entity_type, _ in self._slots if entity_type != ANY)

    @property
    def processed_hooks(self) -> tuple[Hook, ...]:
        return tuple(self._processed_hooks)

    @property
    def error_hooks(self) -> tuple[Hook, ...]:
        return tuple(self._error_hooks)

    @property
    def wakeup_hooks(self) -> tuple[Hook, ...]:
        return tuple(self._wakeup_hooks)

    def _named(self, handler: Handler, name: str | None) -> Handler:
        """Attempts, models and metrics go by name: handlers of one name must be the same except for the type."""
        module = getattr(_unwrapped(handler.function), "__module__", "")
        qualified = f"{module}.{handler.name}"
        names = [name] if name else [handler.name, qualified, *(f"{qualified}_{n}" for n in range(2, 1_000))]
        for candidate in names:
            named = replace(handler, name=candidate)
            if not any(other.name == candidate and _differ(other, named) for other in self._slots.values()):
                return named
        raise UsageError(
            f"two handlers are called {names[0]}, and are not the same",
            hint="give one another name: router.on(..., name=)",
        )

    def _fill(self, slot: tuple[str, str], handler: Handler) -> None:
        if slot[0] in self._ignored:
            raise UsageError(f"{handler.name} wants changes of {slot[0]!r}, which the router ignores", hint="do either")
        taken = self._slots.setdefault(slot, handler)
        if taken is not handler:
            entity_type, operation = slot
            what = "every operation" if operation == ANY else operation
            raise UsageError(
                f"two handlers for the same change: {taken.name} and {handler.name} both want"
                f" {what} of {entity_type!r}",
                hint="give each its own operation or entity type, or call one from the other",
            )


def _differ(one: Handler, other: Handler) -> bool:
    return any(getattr(one, field.name) != getattr(other, field.name) for field in fields(Handler))


def _entity_type(entity_type: object) -> str:
    if not isinstance(entity_type, str) or not entity_type:
        raise UsageError(
            f"router.on({entity_type!r}): the first argument is the entity type, such as 'reaction'",
            hint="write @router.on('reaction', 'INSERT')",
        )
    return entity_type


def _operations(operations: tuple[str, ...]) -> tuple[str, ...]:
    known = [operation.value for operation in Operation]
    for operation in operations:
        if operation not in known:
            raise UsageError(
                f"router.on(..., {operation!r}): no such operation",
                hint=f"use {', '.join(known)}, or none for all of rows",
            )
    return tuple(str(operation) for operation in operations) or (ANY,)


def _filter(changed: Set[str] | None, when: Callable[[Change], bool] | None) -> ChangeFilter | None:
    if changed is not None and (
        not isinstance(changed, Set) or not changed or not all(isinstance(each, str) and each for each in changed)
    ):
        raise UsageError(
            f"router.on(..., changed={changed!r}): a set of names of columns, at least one",
            hint="write changed={'status'}",
        )
    if when is not None and (not callable(when) or inspect.iscoroutinefunction(_unwrapped(when))):
        raise UsageError(
            f"router.on(..., when={_name(when)}): must be a function that is not async",
            hint="what has to wait belongs into the handler, which may raise cdc.Discard",
        )
    if when is not None and (inspect.isgeneratorfunction(_unwrapped(when)) or not _takes_one(when)):
        raise UsageError(
            f"router.on(..., when={_name(when)}): must take one change, and return whether it is wanted",
            hint="write when=lambda change: change.new['status'] == 'paid'",
        )
    if changed is None and when is None:
        return None
    return ChangeFilter(None if changed is None else frozenset(changed), when)


def _takes_one(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind(None)
    except TypeError:
        return False
    except ValueError:  # one of those in C that do not say what they take
        return True
    return True


def _numbers(kind: type[int | float], **options: object) -> None:
    """A text out of the environment would be a TypeError somewhere below, which names no option."""
    for option, value in options.items():
        allowed = int if kind is int else (int, float)
        if value is not None and (isinstance(value, bool) or not isinstance(value, allowed)):
            expected = "a whole number" if kind is int else "a number of seconds"
            raise UsageError(f"router.on(..., {option}={value!r}): must be {expected}")


def _positive(**options: float | None) -> None:
    for option, value in options.items():
        if value is not None and not value > 0:
            raise UsageError(f"router.on(..., {option}={value!r}): must be above 0")


def _linger(seconds: float) -> float:
    if not 0 <= seconds <= _LINGER_MAX_S:
        raise UsageError(f"router.on(..., linger={seconds!r}): seconds, from 0 to {_LINGER_MAX_S:g}")
    return seconds


def _quiet(latest: bool, settle: float, at_most: float | None) -> dict[str, Any]:
    """The fields of a handler about how long a key is to be quiet."""
    if not latest and (settle or at_most is not None):
        raise UsageError(
            "router.on(..., settle=, at_most=): only a handler with latest=True waits for a key to settle",
            hint="write latest=True, or linger= for a handler of batches",
        )
    if not 0 <= settle <= _QUIET_MAX_S:
        raise UsageError(f"router.on(..., settle={settle!r}): seconds, from 0 to {_QUIET_MAX_S:g}")
    if at_most is None:
        return {"latest": latest, "quiet_s": settle, "at_most_s": _AT_MOST * settle}
    if not settle <= at_most < inf:
        raise UsageError(f"router.on(..., at_most={at_most!r}): seconds, not below settle={settle!r}")
    return {"latest": latest, "quiet_s": settle, "at_most_s": at_most}


def _limit(limit: object) -> Limit | None:
    if limit is not None and not isinstance(limit, Limit):
        raise UsageError(f"router.on(..., limit={limit!r}): no limit", hint='write limit=cdc.Limit(rate="14/s")')
    return limit


def _called(
    function: Callable[..., Any], batch: int | None, group: int | None, latest: bool, limit: Limit | None
) -> dict[str, Any]:
    """The fields of a handler that depend on its function."""
    if latest:
        _refuse_several(function, group)
    if limit is not None and limit.by is not None and CHANGES in inspect.signature(function).parameters:
        raise UsageError(
            f"handler {_name(function)} takes batches, and its limit is by key: a batch has changes of any key",
            hint="write it as def handler(change), or leave by= out",
        )
    return {
        "function": function,
        "is_async": inspect.iscoroutinefunction(_unwrapped(function)),
        "transactional": _takes_connection(function),
        "group": 1 if latest or limit else _group(function, group),
        "batch": _batch(function, batch),
    }


def _refuse_several(function: Callable[..., Any], group: int | None) -> None:
    """A call of a ``latest`` handler stands for the changes of one key, and is a transaction of its own."""
    if CHANGES in inspect.signature(function).parameters:
        raise UsageError(
            f"handler {_name(function)} has latest=True and takes batches: a call is for one key then",
            hint="write it as def handler(change), or leave latest out",
        )
    if group is not None and group != 1:
        raise UsageError(
            f"handler {_name(function)} has latest=True and group={group}: a call has a transaction of its own then",
            hint="leave group out",
        )


def _pauses(dead: str) -> bool:
    if dead not in ("skip", "pause"):
        raise UsageError(f"router.on(..., dead={dead!r}): no such way", hint="use 'skip' or 'pause'")
    return dead == "pause"


def _unwrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function itself, behind functools.partial and behind an object with an async ``__call__``."""
    while hasattr(function, "func"):
        function = function.func
    return function if inspect.isroutine(function) else getattr(function, "__call__", function)  # noqa: B004


def _name(function: Callable[..., Any]) -> str:
    qualified = getattr(_unwrapped(function), "__qualname__", type(function).__name__)
    return str(qualified).rpartition("<locals>.")[2]


def _takes_connection(function: Callable[..., Any]) -> bool:
    """Whether the handler is transactional. Raises at the declaration what would fail at every call."""
    signature = inspect.signature(function)
    asked = {name: object() for name in (CHANGES, CONNECTION) if name in signature.parameters}
    try:
        signature.bind(*([] if CHANGES in asked else [object()]), **asked)
    except TypeError:
        raise UsageError(
            f"handler {_name(function)} cannot be called with one change",
            hint="write it as def handler(change), or def handler(changes) for batches; both may take connection, too",
        ) from None
    return CONNECTION in asked


def _batch(function: Callable[..., Any], batch: int | None) -> int | None:
    takes_many = CHANGES in inspect.signature(function).parameters
    if batch is not None and not takes_many:
        raise UsageError(
            f"handler {_name(function)} has batch={batch} and no parameter named {CHANGES}",
            hint="write it as def handler(changes)",
        )
    return (batch or _BATCH) if takes_many else None


def _group(function: Callable[..., Any], group: int | None) -> int:
    parameters = inspect.signature(function).parameters
    grouped = CONNECTION in parameters and CHANGES not in parameters
    if group is not None and not grouped:
        raise UsageError(
            f"handler {_name(function)} has group={group} and no transaction for one change to share",
            hint="write it as def handler(change, connection); def handler(changes, connection) takes batch= instead",
        )
    return (group or _GROUP) if grouped else 1
