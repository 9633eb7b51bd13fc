"""Fixtures live in plug-in files, one for each outside thing."""

pytest_plugins = ["tests.fix_db"]
