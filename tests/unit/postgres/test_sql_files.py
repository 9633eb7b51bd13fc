"""Each block of each file of statements is one, or says that it is a piece of others."""

from __future__ import annotations

from importlib.resources import files

import pytest

from cdc.postgres.sql_files import blocks, load

FILES = sorted(each.name for each in files("cdc.postgres").iterdir() if each.name.endswith(".sql"))
SHARED = {
    "wanted": blocks("admin.sql")["wanted"], "totals": blocks("admin.sql")["totals"],
    "matches": blocks("bulk.sql")["matches"], "refusal": blocks("unreadable.sql")["refusal"],
}  # fmt: skip
"""What some files have from others."""
OF_SUBSCRIPTIONS = {"subscription_coalesced.sql": blocks("subscription.sql")}
"""What only one has."""


@pytest.mark.parametrize("file", FILES)
def test_no_statement_is_taken_for_a_piece_because_another_file_has_one_of_that_name(file: str) -> None:
    statements = {name for name, text in blocks(file).items() if not text.startswith("-- Not a statement")}
    pieces = SHARED | OF_SUBSCRIPTIONS.get(file, {})
    assert statements - load(file, "public", instead=pieces).keys() == set()
