"""Contexts of calls: the program's, and none of another call."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import ContextVar, copy_context
from decimal import Context, DefaultContext, getcontext, setcontext

import pytest

from cdc.engine.calls import Contexts, begin
from cdc.engine.dispatcher import OtherTasks

_tenant: ContextVar[str] = ContextVar("tenant", default="nobody")


async def _in_a_task_of(program: Callable[[], None], contexts_of: Callable[[], Contexts]) -> list[tuple[str, int]]:
    """What each of three calls finds of the program's context, which each of them changes before and after a wait."""
    found: list[tuple[str, int]] = []

    async def handle(name: str) -> None:
        found.append((_tenant.get(), getcontext().prec))
        _tenant.set(name)
        getcontext().prec = 3
        await OtherTasks()
        assert (_tenant.get(), getcontext().prec) == (name, 3)

    program()
    of_program = _tenant.get(), getcontext().prec
    contexts = contexts_of()
    for name in ("a", "b", "c"):
        rest = begin(contexts, handle, [name])
        assert rest is not None
        await rest
    assert (_tenant.get(), getcontext().prec) == of_program
    return found


def _with_defaults() -> None:
    setcontext(DefaultContext.copy())


def _with_settings() -> None:
    _tenant.set("the program")
    setcontext(Context(prec=7))


@pytest.mark.parametrize("contexts_of", [Contexts.current, Contexts.current_for_many])
@pytest.mark.parametrize(
    ("program", "expected"), [(_with_defaults, ("nobody", 28)), (_with_settings, ("the program", 7))]
)
async def test_each_call_has_the_programs_context_and_nothing_of_another_call(
    program: Callable[[], None], expected: tuple[str, int], contexts_of: Callable[[], Contexts]
) -> None:
    task = asyncio.create_task(_in_a_task_of(program, contexts_of), context=copy_context())
    assert await task == [expected] * 3
