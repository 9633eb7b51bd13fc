"""Names that a function of Python chooses, before the template of a URL."""

from __future__ import annotations

import pytest

from cdc.core import broker_url
from cdc.core.deliveries import RejectedError
from cdc.core.model import Change
from cdc.core.name_template import NameFunction
from cdc.testing import change

_URLS = {
    "kafka": "kafka://h/cdc.{type}",
    "nats": "nats://h/cdc.{type}",
    "redis": "redis://h/0/cdc.{type}",
    "amqp": "amqp://h/v/e/cdc.{type}",
}


def _named(scheme: str, function: NameFunction, found: Change | None = None) -> str:
    return broker_url.parse(_URLS[scheme]).names(function).name(found or change("order", entity_id="7"))


@pytest.mark.parametrize("scheme", _URLS)
def test_a_function_names_by_whatever_a_change_has_and_none_is_the_template_s(scheme: str) -> None:
    assert _named(scheme, lambda each: f"shop.{each.entity_id}") == "shop.7"
    assert _named(scheme, lambda _: None) == "cdc.order"


@pytest.mark.parametrize(
    ("scheme", "name"),
    [
        ("kafka", "a b"), ("kafka", ".."), ("kafka", "x" * 250), ("nats", "a..b"), ("nats", "a.*"), ("nats", "$JS.x"),
        ("nats", "a\r\nPUB b"), ("redis", "a\nb"), ("redis", "x" * 1_025), ("amqp", "x" * 256), ("amqp", "a\0b"),
        *((each, "") for each in _URLS),
    ],
)  # fmt: skip
def test_a_function_s_name_that_the_protocol_does_not_allow_is_rejected_each_time_and_not_quoted(
    scheme: str, name: str
) -> None:
    names = broker_url.parse(_URLS[scheme]).names(lambda _: name)
    for _ in range(2):
        with pytest.raises(RejectedError, match=r"^the function's name for it cannot be one") as refused:
            names.name(change("order"))
        assert not name or name not in str(refused.value)


def test_what_is_no_text_is_an_error_of_the_function() -> None:
    with pytest.raises(TypeError, match="returned bytes, not a text or None"):
        _named("kafka", lambda _: b"x")  # type: ignore[arg-type, return-value]


def test_where_a_function_chooses_no_name_is_known_before_a_change_comes() -> None:
    target = broker_url.parse(_URLS["kafka"])
    assert target.names().all_known(["order"]) == ["cdc.order"]
    assert target.names(lambda _: "x").all_known(["order"]) == []


@pytest.mark.parametrize(
    ("template", "types", "names"),
    [
        ("shop.{type}.{operation}", ["order", "task"], ["shop.order.insert", "shop.task.insert"]),
        ("shop.{operation}", [], ["shop.insert"]),
        ("shop", [], ["shop"]),
        ("shop.{type}", [], []),
        ("shop.{schema}.{type}", ["order"], []),
        ("shop.{table}.{operation}", ["order"], []),
    ],
)
def test_an_operation_is_that_of_an_insert_before_a_change_comes_and_a_table_is_not_known(
    template: str, types: list[str], names: list[str]
) -> None:
    assert broker_url.parse(f"nats://h/{template}").names().all_known(types) == names
