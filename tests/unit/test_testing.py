"""``cdc.testing`` without a server."""

from __future__ import annotations

import asyncio
import threading

import pydantic
import pytest

import cdc
from cdc import testing
from cdc.core.errors import UsageError


class Order(pydantic.BaseModel):
    total: int


async def test_a_change_goes_to_the_handler_that_a_consumer_would_call() -> None:
    router, seen = cdc.Router(), []

    @router.on("order", "INSERT", name="welcome")
    async def _(change: cdc.Change) -> None:
        seen.append(change)

    made = testing.change("order", new={"id": 7})
    assert await testing.handle(router, made) == "welcome"
    assert await testing.handle(router, testing.change("order", "DELETE", old={"id": 7})) is None
    assert seen == [made]
    assert made.key == ("order", "7")


async def test_a_row_of_a_backfill_is_a_change_like_any_other() -> None:
    router = cdc.Router()

    @router.on("order", "READ", name="load")
    async def _(change: cdc.Change) -> None: ...

    assert await testing.handle(router, testing.change("order", "READ", new={"id": 7})) == "load"
    assert await testing.handle(router, testing.change("order", "INSERT", new={"id": 7})) is None


async def test_what_the_handler_raises_reaches_the_test() -> None:
    router = cdc.Router()

    @router.on("order")
    def refuse(_: cdc.Change) -> None:
        raise cdc.Discard("nothing to do")

    with pytest.raises(cdc.Discard, match="nothing to do"):
        await testing.handle(router, testing.change("order"))


async def test_a_change_that_the_handlers_filter_leaves_out_has_no_handler() -> None:
    router, seen = cdc.Router(), []

    @router.on("order", "UPDATE", changed={"total"}, when=lambda change: change.new.total > 10, model=Order, name="big")
    async def _(change: cdc.Change) -> None:
        seen.append(change.changed)

    def update(old: int, new: int) -> cdc.Change:
        return testing.change("order", "UPDATE", old={"total": old, "x": 1}, new={"total": new, "x": 2})

    assert await testing.handle(router, update(20, 20)) is None
    assert await testing.handle(router, update(5, 6)) is None
    assert await testing.handle(router, update(5, 20)) == "big"
    assert seen == [{"total", "x"}]


async def test_a_row_becomes_the_handlers_model_and_a_misfit_is_an_error() -> None:
    router, totals = cdc.Router(), []

    @router.on("order", model=Order)
    async def count(change: cdc.Change) -> None:
        totals.append((change.old.total, change.new.total))

    await testing.handle(router, testing.change("order", "UPDATE", old={"total": 1}, new={"total": "2"}))
    with pytest.raises(pydantic.ValidationError):
        await testing.handle(router, testing.change("order", new={"total": "many"}))
    assert totals == [(1, 2)]


async def test_a_plain_function_runs_in_a_thread_and_a_batch_handler_gets_a_batch_of_one() -> None:
    router, calls = cdc.Router(), []

    @router.on("order")
    def index(changes: list[cdc.Change]) -> None:
        calls.append((len(changes), threading.current_thread() is threading.main_thread()))

    await testing.handle(router, testing.change("order"))
    assert calls == [(1, False)]


async def test_an_async_handlers_own_time_limit_holds() -> None:
    router = cdc.Router()

    @router.on("order", timeout=0.01)
    async def hang(_: cdc.Change) -> None:
        await asyncio.Event().wait()

    with pytest.raises(TimeoutError):
        await testing.handle(router, testing.change("order"))


async def test_a_transactional_handler_gets_the_callers_connection_and_is_not_called_without() -> None:
    router, given = cdc.Router(), []

    @router.on("order")
    async def write(_: cdc.Change, connection: object) -> None:
        given.append(connection)

    with pytest.raises(UsageError, match="asks for a connection"):
        await testing.handle(router, testing.change("order"))
    await testing.handle(router, testing.change("order"), connection="mine")
    assert given == ["mine"]


def test_changes_made_by_hand_are_distinct_and_take_any_field() -> None:
    first, second = testing.change("order"), testing.change("order", "DELETE", "9", old={"id": 9}, attempt=2)
    assert first.id != second.id
    assert first.seq < second.seq
    assert (first.entity_id, second.entity_id, second.attempt) == ("1", "9", 2)
    with pytest.raises(TypeError, match="colour"):
        testing.change("order", colour="red")
