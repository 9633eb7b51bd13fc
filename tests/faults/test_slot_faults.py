"""Whatever happens to the slot, its stream, its plugin or its server: work goes on, and full service comes back.

Under load, from a running ``cdc run``, and each change that was committed is handled. ``slot_faults.py`` has what
happens, and what must be seen of it; ``fault_table.py`` writes docs/operations/slot.md from the same course.
A plugin that ``output_plugin_libraries`` refuses is told apart in tests/unit/replication/test_refusals.py, by the
fields of an error that a server with that setting gave: the tests cannot count on such a server.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cdc.contrib.demo.temp_server import TempServer
from cdc.core.model import PLUGINS
from tests.faults.fault_table import GUIDE, block
from tests.faults.slot_faults import FAILOVER, FAULTS, Fault, failing_over, suffer
from tests.faults.slot_stage import SERVER, Account, Stage, prepare


@pytest.fixture(scope="module")
def breakable() -> Iterator[TempServer]:
    """A server that all faults of this file happen to, one after another."""
    with TempServer(durable=False, settings=SERVER) as server:
        prepare(server.dsn())
        yield server


@pytest.mark.promise("G1")
@pytest.mark.promise("G9")
@pytest.mark.parametrize(
    ("fault", "plugin"),
    [pytest.param(fault, plugin, id=f"{fault.name}-{plugin}") for fault in FAULTS for plugin in fault.plugins],
)
def test_work_goes_on_and_full_service_comes_back_by_itself(
    fault: Fault, plugin: str, breakable: TempServer, tmp_path: Path
) -> None:
    with Stage(breakable, tmp_path, **{"plugin": plugin, **fault.settings}) as stage:
        outcome = suffer(stage, fault)
    assert outcome.lost == 0


@pytest.mark.promise("G1")
@pytest.mark.promise("G9")
@pytest.mark.parametrize("plugin", PLUGINS)
def test_after_a_failover_to_a_standby_without_the_slot_full_service_comes_back(plugin: str, tmp_path: Path) -> None:
    with failing_over() as (primary, dsn, fault), Stage(primary, tmp_path, plugin, dsn=dsn) as stage:
        outcome = suffer(stage, fault)
    assert outcome.lost == 0


def test_the_account_finds_what_is_lost_doubled_or_out_of_order() -> None:
    captured = [(1, "k", 11, True), (2, "k", 12, True), (3, "other", 13, True), (4, "k", None, True)]
    calls = [(1, "k"), (3, "other"), (2, "k"), (4, "k")]
    fine = Account(frozenset({11, 12, 13}), captured, calls)
    assert (fine.lost, fine.doubled, fine.out_of_order) == (set(), 0, [])
    assert Account(frozenset({11, 14}), captured, calls).lost == {14}, "never captured"
    assert Account(frozenset({11, 12}), captured, [(1, "k"), (4, "k")]).lost == {12}, "marked and not handled"
    assert Account(frozenset({15}), [*captured, (5, "k", 15, False)], [*calls, (5, "k")]).lost == {15}, "not marked"
    assert Account(frozenset({11}), captured, [*calls, (1, "k")]).doubled == 1
    assert Account(frozenset({11}), captured, [(2, "k"), (1, "k"), (2, "k")]).out_of_order == ["k"]


def test_the_table_of_the_operations_guide_has_every_fault() -> None:
    rows = [line.split(" | ")[0].removeprefix("| ") for line in block("faults", GUIDE.read_text("utf-8")).splitlines()]
    assert rows[2:] == [*(fault.name for fault in FAULTS), FAILOVER]
