"""Fixtures live in plug-in files, one for each outside thing."""

import os
import signal

import pytest

from tests import servers

_LONG_ONES = (
    "tests/faults/test_slot_faults.py", "tests/faults/test_ledger.py", "tests/prometheus", "tests/faults",
    "tests/integration/engine/test_isolation.py", "tests/simulation", "tests/test_wheel.py",
    "tests/properties/test_scheduler.py", "tests/integration/app/test_secrets.py",
)  # fmt: skip
"""In this order before all others: one that came last would have the others wait for it. What computes all the time
(the simulation, the scheduler's machine) is not beside the ledger, which has limits for what three consumers do."""

pytest_plugins = [
    "tests.fix_proxy",
    "tests.fix_brokers",
    "tests.fix_db",
    "tests.fix_outbox",
    "tests.fix_slot",
    "tests.fix_stream",
    "tests.fix_tally",
    "tests.fix_consumer",
    "tests.fix_logs",
    "tests.fix_messenger",
    "tests.fix_ui",
    "tests.fix_webhook",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        return next((n for n, name in enumerate(_LONG_ONES) if item.nodeid.startswith(name)), len(_LONG_ONES))

    items.sort(key=place)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--server", type=int, choices=servers.MAJORS, help="run on this major version of PostgreSQL")
    parser.addoption("--encoding", help="make the databases of the tests with this encoding: LATIN1, SQL_ASCII, ...")


def pytest_configure(config: pytest.Config) -> None:
    # A shell that starts us in the background has us ignore it, and what a test starts would inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    major = config.getoption("--server")
    if major and not hasattr(config, "workerinput"):  # workers inherit the environment
        os.environ["PG_BINDIR"] = str(servers.chosen(major).bindir)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if lacks := servers.lacks(name for marker in item.iter_markers("needs") for name in marker.args):
        pytest.skip(lacks)
