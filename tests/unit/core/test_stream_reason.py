import pytest

from cdc.core.stream_reason import Reason


@pytest.mark.parametrize("reason", Reason)
def test_what_a_reason_leaves_behind_is_a_state_that_lasts(reason: Reason) -> None:
    assert reason.lasting.lasting is reason.lasting


def test_what_ends_a_stream_for_a_moment_leaves_the_network_and_a_slot_that_others_read_stays_busy() -> None:
    assert Reason.STALLED.lasting is Reason.NETWORK
    assert Reason.SLOT_BUSY.lasting is Reason.SLOT_BUSY
