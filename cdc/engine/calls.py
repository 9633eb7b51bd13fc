"""Calls of foreign code: each in a context of its own, and whatever it raises arrives as an Exception.

A ContextVar that a handler sets is seen by no other call, although many share a task, a thread or a transaction; nor
are its decimal settings.

A raised object that is no Exception (SystemExit, GeneratorExit, a class of the handler's own) would end the waiting
task or thread instead of being caught there, and its change would have no outcome. It arrives as an EscapedError. A
CancelledError passes: the caller knows whether this program has cancelled its task (``cancelling``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Generator, Mapping, Sequence
from contextvars import Context, copy_context
from decimal import Context as Decimals
from decimal import getcontext, setcontext
from functools import partial
from types import CoroutineType
from typing import Any, Generic, TypeVar, cast

from cdc.core.errors import Failed
from cdc.core.model import Change
from cdc.core.router import Handler
from cdc.runtime.cancelling import disregard, has_cancellations, is_being_cancelled

_T = TypeVar("_T")


class EscapedError(Exception):
    """``error`` was raised. It is no Exception, or one that must not be raised again in the caller."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(type(error).__name__)
        self.error = error


class CutOffError(asyncio.CancelledError):
    """This program has ended the task during the call."""


class StartedCall(Generic[_T]):
    """Awaiting it goes on with a coroutine that has been sent up to its first wait, in the same task.

    ``started`` on the monotonic clock. ``error``: the call has failed before its first wait; awaiting raises it.
    ``context``: the coroutine runs in it; None: in the awaiting one.
    """

    def __init__(
        self,
        coroutine: Coroutine[Any, Any, _T] | None,
        waits_for: Any,
        started: float,
        error: BaseException | None = None,
        context: Context | None = None,
    ) -> None:
        self._coroutine = coroutine
        self._waits_for = waits_for
        self.started = started
        self._error = error
        self._context = context

    def __await__(self) -> Generator[Any, Any, _T]:
        if self._error is not None:
            raise as_exception(self._error)
        coroutine, waits_for = self._coroutine, self._waits_for
        assert coroutine is not None
        run: Callable[..., Any] = _run_here if self._context is None else self._context.run
        send: Callable[[Any], Any] = coroutine.send if self._context is None else partial(run, coroutine.send)
        while True:
            thrown = sent = None
            try:
                sent = yield waits_for
            except GeneratorExit:  # the awaiting coroutine is closed
                run(coroutine.close)
                raise
            except BaseException as error:  # noqa: BLE001 - a cancellation above all: it is the coroutine's to handle
                thrown = error
            try:
                waits_for = run(coroutine.throw, thrown) if thrown else send(sent)
            except StopIteration as returned:
                return cast("_T", returned.value)
            except BaseException as error:
                translated = as_exception(error)
                if translated is error:
                    raise
                raise translated from error


def own_context() -> Context:
    """A copy of the current context, and of decimal's settings in it: one mutable object, which a copy would share."""
    context = copy_context()
    context.run(setcontext, getcontext().copy())
    return context


def begin(started: float, function: Callable[..., Awaitable[object]], *arguments: Any) -> StartedCall[object] | None:
    """Call it, up to its first wait. None: it has returned."""
    context = copy_context()
    try:
        call, waits_for = context.run(_first_step, getcontext().copy(), function, arguments)
    except StopIteration:
        return None
    except BaseException as error:  # noqa: BLE001 - raised where the call is awaited
        return StartedCall(None, None, started, error)
    return StartedCall(call, waits_for, started, context=context)


async def call_async(function: Callable[..., Awaitable[object]], *arguments: Any) -> None:
    """Call it, and wait until it has returned."""
    try:
        if begun := begin(0.0, function, *arguments):
            await begun
    finally:
        if has_cancellations():
            await disregard()


def call_here(function: Callable[..., _T], *arguments: Any) -> _T:
    """Call a function that does not wait, in this thread."""
    try:
        return own_context().run(function, *arguments)
    except BaseException as error:
        translated = as_exception(error)
        if translated is error:
            raise
        raise translated from error


async def call_handler(handler: Handler, given: Sequence[Change], *connection: Any) -> Mapping[int, BaseException]:
    """Call an async handler. Returns the errors of single changes of a batch, by seq. Raises CutOffError."""
    try:
        try:  # call_async, without a coroutine of its own to be resumed at each wait
            if begun := begin(0.0, handler.call, given, *connection):
                await begun
        finally:
            if has_cancellations():
                await disregard()
    except Failed as failed:
        return failed.errors
    except asyncio.CancelledError as error:
        if is_being_cancelled():
            raise CutOffError from error
        raise
    return {}


def call_handler_here(handler: Handler, given: Sequence[Change], *connection: Any) -> Mapping[int, BaseException]:
    """The same for a handler that is not async."""
    try:
        call_here(handler.call, given, *connection)
    except Failed as failed:
        return failed.errors
    return {}


def as_exception(error: BaseException) -> BaseException:
    """What to raise instead of ``error``: itself, if the waiting code can catch it without other effects."""
    try:
        passes = isinstance(error, Exception | asyncio.CancelledError) and not isinstance(error, StopIteration)
    except BaseException:  # noqa: BLE001 - its class may be a property, and raise
        passes = False
    return error if passes else EscapedError(error)


def _first_step(
    decimals: Decimals, function: Callable[..., Awaitable[_T]], arguments: Sequence[Any]
) -> tuple[Coroutine[Any, Any, _T], Any]:
    """Entering a context costs more than what is done here: it is entered once. Raises StopIteration at a return."""
    setcontext(decimals)
    try:
        call = function(*arguments)
    except StopIteration as error:  # not a return: the function is no coroutine function and raised it
        raise EscapedError(error) from error
    coroutine = cast("Coroutine[Any, Any, _T]", call) if type(call) is CoroutineType else _awaited(call)
    return coroutine, coroutine.send(None)


async def _awaited(result: Awaitable[_T]) -> _T:
    return await result


def _run_here(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)
