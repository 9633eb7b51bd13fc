"""A running consumer's slot holds WAL for seconds, whatever its handlers do; an unread slot holds all of it.

The bounds are seconds with room for a slow machine, and checkpoints are made every two seconds: without them the server
lets go in steps of 15 to 30 s. ``fault_table.py`` measures the same without them, and longer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cdc.contrib.demo.temp_server import TempServer
from cdc.core.model import PLUGINS
from tests.faults.slot_stage import SERVER, Stage, prepare
from tests.faults.wal_held import (
    SETTINGS,
    SHORT,
    Holding,
    Size,
    handlers_blocked,
    large_transaction,
    nothing_tracked,
)

_HELD_S = 10.0
"""Two steps of two seconds, a status update every third of a second, and what a slow machine takes."""
_LEFT = 32 << 20


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Callable[[Callable[[Stage, Size], Holding], str], Holding]]:
    """``hold(scenario, plugin)`` on a server of its own."""
    with TempServer(durable=False, settings=SERVER) as server:
        prepare(server.dsn())

        def run(scenario: Callable[[Stage, Size], Holding], plugin: str) -> Holding:
            with Stage(server, tmp_path, plugin, **SETTINGS) as stage:
                return scenario(stage, SHORT)

        yield run


@pytest.mark.promise("G5")
@pytest.mark.parametrize("plugin", PLUGINS)
def test_with_all_handlers_blocked_under_load_the_slot_holds_seconds_of_wal(hold, plugin: str) -> None:
    holding = hold(handlers_blocked, plugin)
    assert holding.held_s < _HELD_S, holding
    assert holding.unread_s > SHORT.seconds > _HELD_S, holding
    assert holding.held_at_the_end < _LEFT < holding.unread, holding
    assert holding.unhandled > 1000, holding


@pytest.mark.promise("G5")
@pytest.mark.parametrize("plugin", PLUGINS)
def test_where_nothing_tracked_is_written_the_slot_follows_what_other_tables_take(hold, plugin: str) -> None:
    holding = hold(nothing_tracked, plugin)
    assert holding.held_s < _HELD_S, holding
    assert holding.held_at_the_end < _LEFT, holding
    assert holding.unread >= SHORT.megabytes << 20, holding


@pytest.mark.promise("G5")
@pytest.mark.parametrize("plugin", PLUGINS)
def test_a_large_transaction_is_let_go_of_once_it_is_read_and_before_it_is_handled(hold, plugin: str) -> None:
    """While it is open it holds every slot at its beginning."""
    holding = hold(large_transaction, plugin)
    assert holding.held_at_the_end < _LEFT < holding.unread, holding
    assert holding.unhandled > SHORT.rows, holding
