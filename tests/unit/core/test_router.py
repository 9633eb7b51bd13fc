from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from datetime import timedelta

import pytest

from cdc.core.errors import UsageError
from cdc.core.model import Change, Operation
from cdc.core.router import Router


async def _async(change: Change) -> None: ...


def _sync(change: Change) -> None: ...


def _yields(_change: Change) -> Iterator[bool]:
    yield True


def test_the_most_specific_rule_gets_the_change_type_before_operation() -> None:
    router = Router()
    for rule in [("reaction", "INSERT"), ("reaction",), ("*", "DELETE"), ("*",)]:
        router.on(*rule, name="/".join(rule))(_sync)

    def name(entity_type: str, operation: str) -> str:
        handler = router.match(entity_type, operation)
        return handler.name if handler else "nobody"

    assert name("reaction", "INSERT") == "reaction/INSERT"
    assert name("reaction", "DELETE") == "reaction"
    assert name("message", "DELETE") == "*/DELETE"
    assert name("message", "UPDATE") == "*"


def test_a_change_of_an_unwanted_type_matches_no_handler() -> None:
    router = Router()
    router.on("reaction", "INSERT")(_sync)
    assert router.match("reaction", "UPDATE") is None
    assert router.match("message", "INSERT") is None


def test_a_row_of_a_backfill_reaches_a_handler_for_reads_or_for_everything_and_no_other() -> None:
    router = Router()
    router.on("order", "INSERT", name="inserted")(_sync)
    assert router.match("order", "READ") is None
    router.on("order", name="everything")(_sync)
    everything = router.match("order", "READ")
    router.on("order", "READ", name="existing")(_sync)
    existing = router.match("order", "READ")
    assert everything is not None
    assert existing is not None
    assert (everything.name, existing.name) == ("everything", "existing")
    assert router.handled_by("existing").named == {("order", "READ")}


def test_two_handlers_for_the_same_change_are_refused_and_both_named() -> None:
    router = Router()
    router.on("task", "INSERT", "UPDATE")(_sync)
    with pytest.raises(UsageError, match=r"_sync and _async both want UPDATE of 'task'"):
        router.on("task", "UPDATE")(_async)


def test_one_function_may_serve_several_rules() -> None:
    router = Router()
    router.on("task")(router.on("message", max_attempts=5)(_async))
    task, message = router.match("task", "INSERT"), router.match("message", "INSERT")
    assert task is not None
    assert message is not None
    assert (task.max_attempts, message.max_attempts) == (None, 5)


class _Callable:
    async def __call__(self, change: Change) -> None: ...

    async def method(self, change: Change) -> None: ...


@pytest.mark.parametrize(
    ("function", "is_async"),
    [
        (_async, True),
        (_sync, False),
        (functools.partial(_async), True),
        (functools.partial(_sync), False),
        (_Callable(), True),
        (_Callable().method, True),
        (lambda change: None, False),
    ],
)
def test_whether_a_handler_is_async_is_seen_through_partials_methods_and_objects(
    function: object, is_async: bool
) -> None:
    router = Router()
    router.on("task")(function)  # type: ignore[type-var]
    handler = router.match("task", "INSERT")
    assert handler is not None
    assert handler.is_async is is_async


@pytest.mark.parametrize(
    ("declare", "sentence"),
    [
        (lambda router: router.on(_sync), r"the first argument is the entity type"),
        (lambda router: router.on(""), r"the first argument is the entity type"),
        (lambda router: router.on("task", "insert"), r"'insert'.*no such operation"),
        (lambda router: router.on("task", max_attempts=0), r"max_attempts=0"),
        (lambda router: router.on("task", timeout=-1), r"timeout=-1"),
        (lambda router: router.on("task", changed="status"), r"changed='status'.*a set of names of columns"),
        (lambda router: router.on("task", changed=set()), r"a set of names of columns, at least one"),
        (lambda router: router.on("task", changed={1}), r"a set of names of columns"),
        (lambda router: router.on("task", when=_async), r"when=_async.*must be a function that is not async"),
        (lambda router: router.on("task", when=lambda: True), "must take one change, and return whether"),
        (lambda router: router.on("task", when=lambda _one, _two: True), "must take one change, and return whether"),
        (lambda router: router.on("task", when=_yields), "must take one change, and return whether"),
        (lambda router: router.on("task", when=True), r"must be a function"),
        (lambda router: router.on("task")(lambda: None), r"cannot be called with one change"),
        (lambda router: router.on("task")(lambda change, more: None), r"cannot be called with one change"),
    ],
)
def test_a_rule_that_cannot_work_is_refused_where_it_is_declared(declare: object, sentence: str) -> None:
    assert callable(declare)
    with pytest.raises(UsageError) as refused:
        declare(Router())
    assert re.search(sentence, str(refused.value))


def test_two_handlers_that_differ_have_names_of_their_own() -> None:
    router = Router()

    async def handle(change: Change) -> None: ...

    async def other(change: Change) -> None: ...

    router.on("a", model=int)(handle)
    router.on("b", model=int)(handle)  # the same but for the type
    router.on("c", model=str)(handle)
    router.on("d", model=float)(handle)
    with pytest.raises(UsageError, match="two handlers are called handle, and are not the same"):
        router.on("e", model=int, name="handle")(other)
    names = {entity_type: handler.name for (entity_type, _), handler in router.handlers.items()}
    qualified = f"{__name__}.handle"
    assert names == {"a": "handle", "b": "handle", "c": qualified, "d": f"{qualified}_2"}


@pytest.mark.parametrize("name", ["one", "two", "any", "rest"])
def test_which_changes_a_handler_gets_is_what_it_is_matched_with(name: str) -> None:
    router = Router()
    for slot, handler in {("a", "INSERT"): "one", ("a",): "two", ("*", "DELETE"): "any", ("*",): "rest"}.items():
        router.on(*slot, name=handler)(_sync)
    router.on("b", "UPDATE", name="any")(_sync)
    router.ignore("ignored")
    handled = router.handled_by(name)
    found = set()
    for entity_type in ("a", "b", "other"):
        for operation in Operation:
            described = (entity_type, operation) in handled.named or (
                entity_type not in handled.others_than and operation in handled.others
            )
            matched = router.match(entity_type, operation)
            assert described == (matched is not None and matched.name == name)
            found |= {(entity_type, operation)} if described else set()
    assert found
    assert "ignored" in handled.others_than


@pytest.mark.parametrize("operation", ["TRUNCATE", "SCHEMA"])
def test_only_a_handler_that_names_it_gets_what_is_about_no_row(operation: str) -> None:
    router = Router()
    router.on("a")(_sync)
    router.on("*", name="others")(_sync)
    assert router.match("a", operation) is None
    assert router.match("b", operation) is None

    def any_type(change: Change) -> None: ...

    def its_type(change: Change) -> None: ...

    router.on("*", operation)(any_type)
    router.on("b", "INSERT", operation)(its_type)
    matched = [router.match(entity_type, operation) for entity_type in "ab"]
    assert [handler and handler.function for handler in matched] == [any_type, its_type]


def test_a_handler_of_the_latest_is_no_more_than_ten_times_as_late_as_its_key_has_to_be_quiet() -> None:
    router = Router()
    router.on("product", latest=True, settle=5)(_async)
    router.on("stock", latest=True, settle=5, at_most=60)(_sync)
    router.on("order")(_sync)
    found = {key: (each.latest, each.quiet_s, each.at_most_s) for (key, _), each in router.handlers.items()}
    assert found == {"product": (True, 5, 50), "stock": (True, 5, 60), "order": (False, 0, 0)}


def test_the_operations_that_go_to_a_handler_are_those_that_no_more_special_one_gets() -> None:
    router = Router()
    router.on("product", "DELETE")(_sync)
    router.on("product", latest=True)(_async)
    handler = router.match("product", "INSERT")
    assert handler is not None
    assert router.operations("product", handler) == ("INSERT", "UPDATE", "READ")
    assert router.operations("order", handler) == ()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"settle": 5}, "latest=True"),
        ({"at_most": 5}, "latest=True"),
        ({"latest": True, "settle": -1}, "settle=-1"),
        ({"latest": True, "settle": float("nan")}, "settle=nan"),
        ({"latest": True, "settle": 3_601}, "from 0 to 3600"),
        ({"latest": True, "settle": 5, "at_most": 4}, "at_most=4"),
        ({"latest": True, "settle": 5, "at_most": float("inf")}, "at_most=inf"),
    ],
)
def test_times_of_a_key_to_settle_that_make_no_sense_are_refused(options: dict[str, float], named: str) -> None:
    with pytest.raises(UsageError, match=re.escape(named)):
        Router().on("product", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("option", ["timeout", "linger", "settle", "at_most", "max_attempts", "batch", "group"])
@pytest.mark.parametrize("value", ["5", b"5", True, [5], timedelta(seconds=5)])
def test_a_number_that_is_none_is_refused_by_the_name_of_its_option(option: str, value: object) -> None:
    with pytest.raises(UsageError, match=re.escape(f"{option}={value!r}): must be a")):
        Router().on("product", **{"latest": option in ("settle", "at_most"), option: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("option", ["max_attempts", "batch", "group"])
def test_a_count_is_a_whole_number(option: str) -> None:
    with pytest.raises(UsageError, match=re.escape(f"{option}=2.5): must be a whole number")):
        Router().on("product", **{option: 2.5})  # type: ignore[arg-type]


def test_a_call_for_the_latest_of_a_key_takes_no_batch_and_shares_no_transaction() -> None:
    def batch(changes: list[Change]) -> None: ...

    def transactional(change: Change, connection: object) -> None: ...

    with pytest.raises(UsageError, match="latest=True and takes batches"):
        Router().on("product", latest=True)(batch)
    with pytest.raises(UsageError, match="latest=True and group=2"):
        Router().on("product", latest=True, group=2)(transactional)
    router = Router()
    router.on("product", latest=True)(transactional)
    [handler] = router.handlers.values()
    assert (handler.transactional, handler.group) == (True, 1)
