"""Fixtures live in plug-in files, one for each outside thing."""

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
