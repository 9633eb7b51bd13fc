"""What a limit says, and whose permits are whose. Whether it holds over consumers: tests/simulation."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import cdc
from cdc import testing
from cdc.core.errors import UsageError
from cdc.core.handler_permits import Limits
from cdc.core.limits import Limit, LimitSetting, along, shares
from cdc.core.router import Router


@pytest.mark.parametrize(
    ("limit", "permits", "rest_s"),
    [
        (Limit("14/s"), 14, 1.0),
        (Limit("14/s", burst=28), 28, 2.0),
        (Limit("100/m", burst=1), 1, 0.6),
        (Limit("5/10s"), 5, 10.0),
        (Limit("0.5/s"), 1, 2.0),
        (Limit(at_once=3), 0, 0.0),
    ],
)
def test_a_limit_is_permits_that_rest(limit: Limit, permits: int, rest_s: float) -> None:
    assert limit.permits == permits
    assert rest_s <= limit.rest_s <= rest_s * 1.01


@pytest.mark.parametrize(
    "fields",
    [
        {}, {"burst": 3}, {"rate": "14"}, {"rate": "0/s"}, {"rate": "14/y"}, {"rate": "20000/s"},
        {"rate": "1/d", "burst": 2},
        {"at_once": 0}, {"at_once": True}, {"rate": "1/s", "burst": 0}, {"rate": "1/s", "by": 3}, {"rate": "3/0s"},
    ],
)  # fmt: skip
def test_what_is_no_limit_is_refused_with_a_hint(fields: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as refused:
        Limit(**fields)
    assert refused.value.hint


def test_a_path_leads_into_the_change() -> None:
    one = testing.change("order", "INSERT", "1", new={"tenant": {"id": 7}})
    assert along(one, "new.tenant.id") == 7
    assert along(one, "new.owner.id") is None
    assert Limit("1/s", by="new.tenant.id").key(one) == "7"
    assert Limit("1/s", by=lambda change: change.new["nothing"]).key(one) == "?"


@given(
    st.integers(0, 200), st.dictionaries(st.text("abc", min_size=1), st.integers(0, 60), max_size=8), st.integers(0, 99)
)
def test_shares_are_all_there_is_and_fair(total: int, wants: dict[str, int], turn: int) -> None:
    got = shares(total, wants, turn)
    assert sum(got.values()) == (total if wants else 0)
    for one, count in got.items():
        for other in got:
            if wants[other] > got[other]:  # nobody who wants less than another has more than that one, but for a rest
                assert count <= max(got[other] + 1, wants[one])
                assert not (count > wants[one]), "more than it wants, while another one wants more"


def test_an_operators_limit_takes_the_place_of_the_one_in_the_code() -> None:
    router = Router()
    router.on("order", name="work", limit=Limit("1/s"))(lambda _: None)
    limits = Limits(router, clock=lambda: 0.0)
    assert limits.become([LimitSetting(1, "work", Limit("2/s")), LimitSetting(2, "other", Limit("3/s"))])
    assert {name: each.limit.rate for name, each in limits.of.items()} == {"work": "2/s"}
    assert limits.become([])
    assert limits.of["work"].limit.rate == "1/s"
    assert not limits.become([])


def test_a_limit_is_part_of_the_public_interface() -> None:
    assert cdc.Limit is Limit
