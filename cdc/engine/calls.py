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
from contextvars import Context, ContextVar, copy_context
from decimal import Context as Decimals
from decimal import DefaultContext, getcontext, setcontext
from types import CoroutineType, coroutine
from typing import Any, NamedTuple, TypeVar, cast

from cdc.core.errors import Failed
from cdc.core.model import Change
from cdc.core.router import Handler
from cdc.runtime.cancelling import disregard, has_cancellations, is_being_cancelled

_T = TypeVar("_T")


def _variable_of_decimals() -> ContextVar[Decimals]:
    """In which decimal keeps its settings: the only one that it sets in an empty context."""
    context = Context()
    context.run(getcontext)
    (variable,) = context
    return variable


_DECIMALS = _variable_of_decimals()


class EscapedError(Exception):
    """``error`` was raised. It is no Exception, or one that must not be raised again in the caller."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(type(error).__name__)
        self.error = error


class CutOffError(asyncio.CancelledError):
    """This program has ended the task during the call."""


class Contexts(NamedTuple):
    """Each call runs in a copy of ``template``, with a copy of ``decimals`` unless that is None.

    Decimal's settings are one mutable object, which the copy of a context would share.
    """

    template: Context
    decimals: Decimals | None

    @classmethod
    def current(cls) -> Contexts:
        return cls(copy_context(), getcontext())

    @classmethod
    def current_for_many(cls) -> Contexts:
        """To copy decimal's settings costs more than the rest of a call that does nothing.

        So they are left out here if they are the defaults, which decimal then makes at their first use.
        """
        template, decimals = copy_context(), getcontext()
        if _settings(decimals) != _settings(DefaultContext):
            return cls(template, decimals)
        return cls(_without_decimals(template), None)

    def new(self) -> Context:
        context = self.template.copy()
        if self.decimals is not None:
            context.run(setcontext, self.decimals.copy())
        return context


def begin(
    contexts: Contexts, function: Callable[..., Awaitable[_T]], arguments: Sequence[Any]
) -> Coroutine[Any, Any, _T] | None:
    """Call it, up to its first wait. Returns the rest of the call, to be awaited; None: it has returned."""
    context = contexts.template.copy()
    try:
        call, waits_for = context.run(_first_step, contexts.decimals, function, arguments)
    except StopIteration:
        return None
    except BaseException as error:
        translated = as_exception(error)
        if translated is error:
            raise
        raise translated from error
    return cast("Coroutine[Any, Any, _T]", _rest(context.run, call, waits_for))


@coroutine
def _rest(run: Callable[..., Any], call: Coroutine[Any, Any, _T], waits_for: Any) -> Generator[Any, Any, _T]:
    """A generator: no coroutine could enter a context for each of its steps."""
    while True:
        thrown: BaseException | None = None
        try:
            yield waits_for  # event loops send nothing
        except GeneratorExit:  # the awaiting coroutine is closed
            run(call.close)
            raise
        except BaseException as error:  # noqa: BLE001 - a cancellation above all: it is the call's to handle
            thrown = error
        try:
            waits_for = run(call.send, None) if thrown is None else run(call.throw, thrown)
        except StopIteration as returned:
            return cast("_T", returned.value)
        except BaseException as error:
            translated = as_exception(error)
            if translated is error:
                raise
            raise translated from error


async def call_async(function: Callable[..., Awaitable[object]], *arguments: Any) -> None:
    """Call it, and wait until it has returned."""
    try:
        if rest := begin(Contexts.current(), function, arguments):
            await rest
    finally:
        if has_cancellations():
            await disregard()


def call_here(function: Callable[..., _T], *arguments: Any) -> _T:
    """Call a function that does not wait, in this thread."""
    return call_in(Contexts.current(), function, *arguments)


def call_in(contexts: Contexts, function: Callable[..., _T], *arguments: Any) -> _T:
    """The same where the contexts are known."""
    try:
        context = contexts.template.copy() if contexts.decimals is None else contexts.new()
        return context.run(function, *arguments)
    except BaseException as error:
        translated = as_exception(error)
        if translated is error:
            raise
        raise translated from error


async def call_handler(
    handler: Handler, contexts: Contexts, given: Sequence[Change], *connection: Any, task: asyncio.Task[Any] | None
) -> Mapping[int, BaseException]:
    """Call an async handler. Returns the errors of single changes of a batch, by seq. Raises CutOffError.

    ``task``: the current one, which is the same for many calls; to ask for it costs as much as a call.
    """
    try:
        try:
            if rest := begin(contexts, handler.call, (given, *connection)):  # call_async, without its coroutine
                await rest
        finally:
            if has_cancellations(task):
                await disregard()
    except Failed as failed:
        return _errors(handler, failed, given)
    except asyncio.CancelledError as error:
        if is_being_cancelled():
            raise CutOffError from error
        raise
    return {}


def call_handler_here(
    handler: Handler, contexts: Contexts, given: Sequence[Change], *connection: Any
) -> Mapping[int, BaseException]:
    """The same for a handler that is not async."""
    try:
        call_in(contexts, handler.call, given, *connection)
    except Failed as failed:
        return _errors(handler, failed, given)
    return {}


def _errors(handler: Handler, failed: Failed, given: Sequence[Change]) -> Mapping[int, BaseException]:
    """What was called with several changes in one has the number of another change than it was started for."""
    if handler.latest and (error := failed.errors.get(given[0].seq)):
        raise error
    return {} if handler.latest else failed.errors


def as_exception(error: BaseException) -> BaseException:
    """What to raise instead of ``error``: itself, if the waiting code can catch it without other effects."""
    try:
        passes = isinstance(error, Exception | asyncio.CancelledError) and not isinstance(error, StopIteration)
    except BaseException:  # noqa: BLE001 - its class may be a property, and raise
        passes = False
    return error if passes else EscapedError(error)


def _first_step(
    decimals: Decimals | None, function: Callable[..., Awaitable[_T]], arguments: Sequence[Any]
) -> tuple[Coroutine[Any, Any, _T], Any]:
    """Entering a context costs more than what is done here: it is entered once. Raises StopIteration at a return."""
    if decimals is not None:
        setcontext(decimals.copy())
    try:
        call = function(*arguments)
    except StopIteration as error:  # not a return: the function is no coroutine function and raised it
        raise EscapedError(error) from error
    steps: Any = call if type(call) is CoroutineType else _awaited(call)
    return steps, steps.send(None)


async def _awaited(result: Awaitable[_T]) -> _T:
    return await result


def _settings(decimals: Decimals) -> tuple[object, ...]:
    """All but the flags, which are what happened."""
    return (
        decimals.prec, decimals.rounding, decimals.Emin, decimals.Emax, decimals.capitals, decimals.clamp,
        decimals.traps,
    )  # fmt: skip


def _without_decimals(context: Context) -> Context:
    without = Context()
    for variable, value in context.items():
        if variable is not _DECIMALS:
            without.run(variable.set, value)
    return without
