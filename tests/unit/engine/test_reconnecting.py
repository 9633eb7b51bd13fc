import asyncio

import pytest

from cdc.core.errors import SubscriptionDroppedError
from cdc.core.router import Router
from cdc.engine.reconnecting import Lifecycle, next_pause_s
from cdc.observability.metrics import Metrics


@pytest.mark.parametrize(
    ("before_s", "worked_s", "pause_s"),
    [(0.1, 0, 0.2), (0.2, 9, 0.4), (8, 0, 10), (10, 0, 10), (10, 11, 0.1), (0.1, 3_600, 0.1)],
)
def test_the_pause_doubles_up_to_a_limit_and_is_short_again_after_long_work(
    before_s: float, worked_s: float, pause_s: float
) -> None:
    assert next_pause_s(before_s, worked_s) == pytest.approx(pause_s)


async def _dropped() -> None:
    raise SubscriptionDroppedError("the subscription was dropped")


@pytest.mark.parametrize("at_work", [True, False], ids=["at work", "when it connects"])
async def test_one_that_leaves_ends_when_its_subscription_was_dropped_and_reports_no_interruption(
    at_work: bool, caplog: pytest.LogCaptureFixture
) -> None:
    lifecycle = Lifecycle(Metrics("cdc", Router()).consumer)
    lifecycle.connected.set()
    lifecycle.leaves = lambda: True
    async with asyncio.timeout(10):
        await lifecycle.run(_dropped if at_work else lambda: lifecycle.wait_for_schema(_dropped))
    assert not lifecycle.stopping.is_set()
    assert caplog.messages == []
