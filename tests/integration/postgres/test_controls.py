"""What is paused is no backlog: how old the oldest change is that could run."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest

from cdc.core.pauses import Pause, Pauses
from cdc.core.type_filter import EVERYTHING, TypeFilter
from cdc.postgres.controls import Controls
from cdc.postgres.outbox import Store


def _age_s(db: psycopg.Connection, *pauses: Pause, scope: TypeFilter = EVERYTHING) -> float:
    return Controls("public").oldest_ready_age_s(db, Pauses(pauses), scope)


@pytest.fixture
def backlog(outbox_db: psycopg.Connection) -> psycopg.Connection:
    """A mail to 1 of an hour ago, one to 2 of half an hour ago, an order of ten minutes ago, and a waiting letter."""
    for entity_type, key, age in (("mail", "1", "1 hour"), ("mail", "2", "30 min"), ("order", "1", "10 min")):
        outbox_db.execute("SELECT publish_change(%s, %s, 'INSERT', '{}')", [entity_type, key])
        outbox_db.execute(
            "UPDATE entity_changes SET changed_at = now() - %s::interval"
            " WHERE seq = (SELECT max(seq) FROM entity_changes)",
            [age],
        )
    outbox_db.execute("SELECT publish_change('letter', '1', 'INSERT', '{}')")
    outbox_db.execute(
        "UPDATE entity_changes SET next_attempt_at = now() - interval '5 min' WHERE entity_type = 'letter'"
    )
    return outbox_db


_MAIL, _ORDER, _LETTER = (Pause(n, entity_type=name) for n, name in enumerate(("mail", "order", "letter")))
_TO_1 = Pause(4, entity_type="mail", entity_id="1")


@pytest.mark.parametrize(
    ("pauses", "minutes"),
    [
        ([], 60), ([_TO_1], 30), ([_MAIL], 10), ([_MAIL, _ORDER], 5), ([_MAIL, _ORDER, _LETTER], 0), ([_ORDER], 60),
        ([_MAIL, _ORDER, Pause(5, entity_type="letter", entity_id="1")], 0), ([Pause(6)], 0),
    ],
)  # fmt: skip
def test_what_is_paused_is_left_out(backlog: psycopg.Connection, pauses: list[Pause], minutes: int) -> None:
    assert _age_s(backlog, *pauses) // 60 == minutes


@pytest.mark.parametrize(
    ("scope", "minutes"), [(TypeFilter(("order", "letter"), include=True), 10), (TypeFilter(("mail",)), 10)]
)
def test_and_so_is_what_the_consumer_does_not_handle(backlog: psycopg.Connection, scope: Any, minutes: int) -> None:
    assert _age_s(backlog, _LETTER, scope=scope) // 60 == minutes


def test_with_nothing_left_out_it_is_that_of_the_figures(backlog: psycopg.Connection) -> None:
    figures = Store("public").figures(backlog)
    assert abs(_age_s(backlog, Pause(9, entity_type="nothing")) - figures.oldest_ready_age_s) < 10
