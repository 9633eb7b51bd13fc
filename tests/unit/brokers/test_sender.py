"""Of several servers the first that can be reached is taken."""

from __future__ import annotations

import pytest

from cdc.brokers.sender import first_reached
from cdc.core.deliveries import UnreachedError


@pytest.mark.parametrize("away", [(), ("a",), ("a", "b")])
async def test_they_are_tried_in_their_order_up_to_the_first_that_is_there(away: tuple[str, ...]) -> None:
    tried: list[str] = []

    async def connect(server: str) -> str:
        tried.append(server)
        if server in away:
            raise UnreachedError(f"{server} is away")
        return f"connected to {server}"

    reached = ["a", "b", "c"][len(away)]
    assert await first_reached(["a", "b", "c"], connect) == f"connected to {reached}"
    assert tried == [*away, reached]


async def test_where_none_is_there_the_last_ones_error_is_raised() -> None:
    async def connect(server: str) -> str:
        raise UnreachedError(f"{server} is away")

    with pytest.raises(UnreachedError, match="b is away"):
        await first_reached(["a", "b"], connect)


async def test_any_other_error_ends_the_search() -> None:
    async def connect(server: str) -> str:
        raise ValueError(server)

    with pytest.raises(ValueError, match="a"):
        await first_reached(["a", "b"], connect)
