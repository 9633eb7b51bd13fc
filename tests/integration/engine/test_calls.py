"""Whatever a handler, its model or its error does: its change has an outcome, and others have their place."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextvars import ContextVar
from decimal import Decimal, getcontext
from typing import Any

import psycopg
import pytest
from pydantic import BaseModel, field_validator

import cdc
from cdc.core.router import Router
from cdc.engine.dispatcher import OtherTasks
from tests.eventually import eventually_async
from tests.fix_consumer import consuming, settled, states

pytestmark = pytest.mark.server

_FEW: dict[str, Any] = {"threads": 2, "concurrency": 4, "transactions": 2, "max_attempts": 1}
_tenant: ContextVar[str] = ContextVar("tenant", default="nobody")


_PUBLISH_KINDS = """
SELECT publish_change('x', k || n, new_data => jsonb_build_object('kind', k))
FROM unnest(%s::text[]) AS k, generate_series(1, 3) AS n
"""


class _OwnError(BaseException):
    pass


class _UnspeakableError(Exception):
    def __str__(self) -> str:
        raise RecursionError("in __str__")

    __repr__ = __str__


class _WronglyClassedError(Exception):
    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        raise ValueError("in a property")


class _Unnamed(type):
    def __getattribute__(cls, name: str) -> Any:
        if name in {"__name__", "__qualname__"}:
            raise RuntimeError("in a metaclass")
        return super().__getattribute__(name)


class _UnnamedError(Exception, metaclass=_Unnamed):
    pass


class _EndlessRetry(cdc.Retry):
    def __init__(self) -> None:
        super().__init__()
        self.after = "soon"  # type: ignore[assignment]


def _deep() -> None:
    _deep()


def _raise(error: Callable[[], BaseException]) -> None:
    raise error()


_RAISED: dict[str, Callable[[], BaseException]] = {
    "generator-exit": GeneratorExit,
    "own": _OwnError,
    "base-group": lambda: BaseExceptionGroup("several", [SystemExit(1), ValueError()]),
    "keyboard": KeyboardInterrupt,
    "cancelled": asyncio.CancelledError,
    "memory": MemoryError,
    "unspeakable": _UnspeakableError,
    "wrong-class": _WronglyClassedError,
    "unnamed": _UnnamedError,
    "retry": _EndlessRetry,
    "stop-async": StopAsyncIteration,
}


def _plain(router: Router, raising: Callable[[str], None]) -> None:
    @router.on("x")
    async def handle(change: cdc.Change) -> None:
        raising(change.entity_id)


def _waiting(router: Router, raising: Callable[[str], None]) -> None:
    @router.on("x")
    async def handle(change: cdc.Change) -> None:
        await OtherTasks()
        raising(change.entity_id)


def _batch(router: Router, raising: Callable[[str], None]) -> None:
    @router.on("x", batch=5)
    async def handle(changes: list[cdc.Change]) -> None:
        for change in changes:
            raising(change.entity_id)


def _transactional(router: Router, raising: Callable[[str], None]) -> None:
    @router.on("x")
    async def handle(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
        await connection.execute("SELECT 1")
        raising(change.entity_id)


def _transactional_batch(router: Router, raising: Callable[[str], None]) -> None:
    @router.on("x", batch=5)
    async def handle(changes: list[cdc.Change], connection: psycopg.AsyncConnection) -> None:
        for change in changes:
            raising(change.entity_id)


def _thread(router: Router, raising: Callable[[str], None]) -> None:
    @router.on("x")
    def handle(change: cdc.Change) -> None:
        raising(change.entity_id)


def _transactional_thread(router: Router, raising: Callable[[str], None]) -> None:
    @router.on("x")
    def handle(change: cdc.Change, connection: psycopg.Connection) -> None:
        raising(change.entity_id)


_KINDS = [_plain, _waiting, _batch, _transactional, _transactional_batch, _thread, _transactional_thread]


def _until_settled(db: psycopg.Connection) -> Any:
    async def check() -> bool:
        return settled(db)

    return eventually_async(check, what="every change processed or dead")


@pytest.mark.parametrize("declare", _KINDS)
async def test_whatever_a_handler_raises_is_an_outcome_and_its_places_are_free_again(
    declare: Callable[[Router, Callable[[str], None]], None], outbox: str, outbox_db: psycopg.Connection
) -> None:
    router = Router()

    def raising(entity_id: str) -> None:
        kind, _, _ = entity_id.partition(" ")
        if kind == "deep":
            _deep()
        if kind in _RAISED:
            raise _RAISED[kind]()

    declare(router, raising)
    # What a batch raises as Retry is about all that is in it.
    kinds = [kind for kind in (*_RAISED, "deep") if not (kind == "retry" and "batch" in declare.__name__)]
    outbox_db.execute(
        "SELECT publish_change('x', k || ' ' || n) FROM unnest(%s::text[]) k, generate_series(1, 3) n", [kinds]
    )
    outbox_db.execute("SELECT publish_change('x', 'fine ' || n) FROM generate_series(1, 3) n")
    async with consuming(outbox, router, **_FEW):
        await _until_settled(outbox_db)
        outbox_db.execute("SELECT publish_change('x', 'fine later')")
        await _until_settled(outbox_db)
    assert states(outbox_db) == {"dead": 3 * len(kinds), "processed": 4}


class _Validated(BaseModel):
    kind: str

    @field_validator("kind")
    @classmethod
    def refuse(cls, kind: str) -> str:
        _tenant.set(kind)
        errors: dict[str, Callable[[], BaseException]] = {
            **_RAISED, "key": KeyError, "type": TypeError, "attribute": AttributeError, "stop": StopIteration,
        }  # fmt: skip
        if kind == "deep":
            _deep()
        if kind == "cancels" and (task := asyncio.current_task()):
            task.cancel()
        if kind in errors:
            raise errors[kind]()
        return kind


@pytest.mark.parametrize("kind", ["plain", "batch", "thread", "transactional"])
async def test_whatever_a_model_raises_is_an_outcome_and_its_places_are_free_again(
    kind: str, outbox: str, outbox_db: psycopg.Connection
) -> None:
    router = Router()
    if kind == "plain":

        @router.on("x", model=_Validated)
        async def plain(change: cdc.Change) -> None: ...

    elif kind == "batch":

        @router.on("x", model=_Validated)
        async def batch(changes: list[cdc.Change]) -> None: ...

    elif kind == "thread":

        @router.on("x", model=_Validated)
        def thread(change: cdc.Change) -> None: ...

    else:

        @router.on("x", model=_Validated)
        async def transactional(change: cdc.Change, connection: psycopg.AsyncConnection) -> None: ...

    kinds = [*_RAISED, "key", "type", "attribute", "stop", "deep"]
    nested = "SELECT publish_change('x', n::text, new_data => (repeat('[', 1200) || repeat(']', 1200))::jsonb)"
    outbox_db.execute(_PUBLISH_KINDS, [kinds])
    outbox_db.execute(nested + " FROM generate_series(1, 5) AS n")
    async with consuming(outbox, router, **_FEW):
        await _until_settled(outbox_db)
        outbox_db.execute(_PUBLISH_KINDS, [["fine"]])
        await _until_settled(outbox_db)
    assert states(outbox_db) == {"dead": 3 * len(kinds) + 5, "processed": 3}


async def test_an_observer_goes_on_whatever_a_row_does_to_a_model(
    outbox: str, outbox_db: psycopg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    router = Router()

    @router.on("x", model=_Validated)
    async def handle(change: cdc.Change) -> None: ...

    outbox_db.execute("SELECT publish_change('x', '0', new_data => '{\"kind\": \"cancels\"}')")
    outbox_db.execute("SELECT publish_change('x', '1', new_data => (repeat('[', 1200) || repeat(']', 1200))::jsonb)")
    outbox_db.execute("SELECT publish_change('x', '2', new_data => ('{\"kind\": ' || repeat('9', 5000) || '}')::jsonb)")
    outbox_db.execute("SELECT publish_change('x', '3', new_data => '{\"kind\": \"own\"}')")
    outbox_db.execute("SELECT publish_change('x', '4', new_data => '{\"kind\": 4}')")

    async def told() -> bool:
        return sum("does not fit the model" in record.message for record in caplog.records) == 4

    with caplog.at_level(logging.WARNING):
        async with consuming(outbox, router, observe=True):
            await eventually_async(told)


async def test_a_failed_change_of_a_batch_has_the_error_that_the_handler_named(
    outbox: str, outbox_db: psycopg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    router = Router()

    @router.on("x")
    async def handle(changes: list[cdc.Change]) -> None:
        raise cdc.Failed(dict.fromkeys(changes, "the index has no room for Ada"))

    outbox_db.execute("SELECT publish_change('x', '1')")
    async with consuming(outbox, router, **_FEW):
        await _until_settled(outbox_db)
    assert outbox_db.execute("SELECT last_error FROM entity_changes").fetchone() == ("the index has no room for Ada",)
    assert "Ada" not in caplog.text
    assert "handle: the handler named it as failed on change" in caplog.text


@pytest.mark.parametrize("group", [1, 10])
async def test_what_one_call_sets_in_a_context_variable_no_other_call_sees(
    group: int, outbox: str, outbox_db: psycopg.Connection
) -> None:
    seen: list[str] = []

    def note(change: cdc.Change, *_: Any) -> None:
        seen.append(_tenant.get())
        _tenant.set(change.entity_id)

    async def note_at_once(change: cdc.Change) -> None:
        note(change)

    async def note_and_wait(change: cdc.Change) -> None:
        note(change)
        await OtherTasks()
        seen.append("nobody" if _tenant.get() == change.entity_id else "somebody else")

    async def note_many(changes: list[cdc.Change]) -> None:
        note(changes[0])

    async def note_in_transaction(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
        note(change)
        await connection.execute("SELECT 1")
        seen.append("nobody" if _tenant.get() == change.entity_id else "somebody else")

    def note_in_thread(change: cdc.Change) -> None:
        note(change)

    def note_in_transaction_in_thread(change: cdc.Change, connection: psycopg.Connection) -> None:
        note(change)

    router = Router()
    router.on("at once")(note_at_once)
    router.on("waits")(note_and_wait)
    router.on("batch")(note_many)
    router.on("transaction", group=group)(note_in_transaction)
    router.on("thread")(note_in_thread)
    router.on("transaction in a thread", group=group)(note_in_transaction_in_thread)
    router.on_processed(note)
    types = sorted(router.entity_types)
    outbox_db.execute(
        "SELECT publish_change(t, n::text) FROM unnest(%s::text[]) AS t, generate_series(1, 40) AS n", [types]
    )
    _tenant.set("nobody")
    async with consuming(outbox, router, threads=2, concurrency=4, transactions=1):
        await _until_settled(outbox_db)
    assert set(seen) == {"nobody"}
    assert states(outbox_db) == {"processed": 240}


@pytest.mark.parametrize("group", [1, 10])
async def test_how_one_call_rounds_decimals_is_no_other_calls_matter(
    group: int, outbox: str, outbox_db: psycopg.Connection
) -> None:
    third = Decimal(1) / 3
    seen: list[Decimal] = []

    def divide(change: cdc.Change, *_: Any) -> None:
        seen.append(Decimal(1) / 3)
        getcontext().prec = 3

    async def divide_at_once(change: cdc.Change) -> None:
        divide(change)

    async def divide_many(changes: list[cdc.Change]) -> None:
        divide(changes[0])

    async def divide_in_transaction(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
        divide(change)

    def divide_in_thread(change: cdc.Change) -> None:
        divide(change)

    router = Router()
    router.on("at once")(divide_at_once)
    router.on("batch")(divide_many)
    router.on("transaction", group=group)(divide_in_transaction)
    router.on("thread")(divide_in_thread)
    router.on_processed(divide)
    outbox_db.execute(
        "SELECT publish_change(t, n::text) FROM unnest(%s::text[]) AS t, generate_series(1, 10) AS n",
        [sorted(router.entity_types)],
    )
    async with consuming(outbox, router, threads=2, concurrency=4, transactions=1):
        await _until_settled(outbox_db)
    assert set(seen) == {third}
    assert Decimal(1) / 3 == third


async def test_a_context_variable_of_the_program_around_the_consumer_is_seen_by_every_handler(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    seen: dict[str, str] = {}
    router = Router()

    @router.on("x")
    async def on_loop(change: cdc.Change) -> None:
        seen["on loop"] = _tenant.get()

    @router.on("y")
    def in_thread(change: cdc.Change) -> None:
        seen["in thread"] = _tenant.get()

    outbox_db.execute("SELECT publish_change('x', '1'), publish_change('y', '1')")
    _tenant.set("the program")
    async with consuming(outbox, router):
        await _until_settled(outbox_db)
    assert seen == {"on loop": "the program", "in thread": "the program"}
