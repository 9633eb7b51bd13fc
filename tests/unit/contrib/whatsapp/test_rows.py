from __future__ import annotations

import pytest

from cdc.contrib.whatsapp.rows import MessageRow, ReactionRow


@pytest.mark.parametrize(
    ("content", "asks"),
    [("help", True), ("Can you HELP me?", True), ("helpful", True), ("hel p", False), ("", False), (None, False)],
)
def test_a_message_asks_for_help_in_any_case_and_without_content_it_does_not(content: str | None, asks: bool) -> None:
    assert MessageRow(id="1", content=content).asks_for_help is asks


def test_a_message_whose_content_is_not_captured_asks_for_nothing() -> None:
    assert not MessageRow.model_validate({"id": "1"}).asks_for_help


def test_ids_of_a_live_system_may_be_numbers() -> None:
    assert ReactionRow.model_validate({"id": 5, "message_id": 7, "reaction": "x"}).id == "5"
