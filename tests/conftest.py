"""Fixtures live in plug-in files, one for each outside thing."""

import signal

pytest_plugins = [
    "tests.fix_db",
    "tests.fix_outbox",
    "tests.fix_slot",
    "tests.fix_stream",
    "tests.fix_proxy",
    "tests.fix_tally",
    "tests.fix_consumer",
    "tests.fix_logs",
    "tests.fix_messenger",
    "tests.fix_webhook",
]


def pytest_configure() -> None:
    # A shell that starts us in the background has us ignore it, and what a test starts would inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
