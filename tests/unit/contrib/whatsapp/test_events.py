from __future__ import annotations

import contextlib
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cdc.contrib.whatsapp.events import AHEAD_MAX, InvalidEventError, MessageEvent, ReactionEvent, parse

NOW = datetime(2026, 6, 1, tzinfo=UTC)
REACTION = {
    "event": "messages.reaction", "key": "r-1", "message_id": "m-1", "reaction": "✅", "from": "491701234567",
    "chat_id": "c-1", "timestamp": 1767225600,
}  # fmt: skip
MESSAGE = {
    "event": "messages.upsert", "key": "m-1", "content": "Can you help me?", "from": "491701234567", "chat_id": "c-1",
    "timestamp": "2026-01-01T01:00:00+01:00",
}  # fmt: skip


def refusal(payload: object) -> str:
    with pytest.raises(InvalidEventError) as rejected:
        parse(payload, NOW)
    return str(rejected.value)


def test_a_reaction_and_a_message_are_read() -> None:
    reaction, message = parse(REACTION, NOW), parse(MESSAGE, NOW)
    assert isinstance(reaction, ReactionEvent)
    assert (reaction.key, reaction.message_id, reaction.reaction) == ("r-1", "m-1", "✅")
    assert (reaction.user_id, reaction.chat_id, reaction.removed) == ("491701234567", "c-1", False)
    assert isinstance(message, MessageEvent)
    assert message.content == "Can you help me?"
    assert reaction.timestamp == message.timestamp == datetime(2026, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize("nothing", ["", None])
def test_a_reaction_of_nothing_is_a_removed_one(nothing: str | None) -> None:
    removal = parse(REACTION | {"reaction": nothing}, NOW)
    assert isinstance(removal, ReactionEvent)
    assert removal.removed


def test_a_message_need_not_have_text_but_a_field_that_is_not_there_is_not_taken_for_none() -> None:
    picture = parse(MESSAGE | {"content": None}, NOW)
    assert isinstance(picture, MessageEvent)
    assert picture.content is None
    for payload, field in ((REACTION, "reaction"), (MESSAGE, "content")):
        assert refusal({name: value for name, value in payload.items() if name != field}) == f"{field}: field required"


@pytest.mark.parametrize("name", ["messages.update", "", "MESSAGES.REACTION", "\ud800"])
def test_an_event_of_another_name_is_none_of_ours_whatever_is_in_it(name: str) -> None:
    assert parse({"event": name, "key": 5}, NOW) is None


def test_unknown_fields_are_ignored() -> None:
    assert parse(REACTION | {"push_name": "Ada", "deep": [{}]}, NOW) == parse(REACTION, NOW)


@pytest.mark.parametrize(
    "timestamp",
    [1767225600, 1767225600.0, "1767225600", 1767225600000, "2026-01-01T00:00:00Z", "2025-12-31T19:00:00-05:00"],
)
def test_a_timestamp_is_unix_time_or_iso_8601(timestamp: object) -> None:
    event = parse(REACTION | {"timestamp": timestamp}, NOW)
    assert event is not None
    assert event.timestamp == datetime(2026, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("timestamp", "said"),
    [
        ("2026-01-01T00:00:00", "timezone"),
        (-1, "before 1970"),
        ("0001-01-01T00:00:00+14:00", "before 1970"),
        ("9999-12-31T23:59:59-14:00", "future"),
        ((NOW + AHEAD_MAX + timedelta(seconds=1)).isoformat(), "future"),
        (True, "Unix time"),
        (None, "valid datetime"),
        (float("nan"), "valid datetime"),
        (10**40, "valid datetime"),
        ([], "valid datetime"),
        ("soon", "valid datetime"),
    ],
)
def test_a_timestamp_that_is_none_is_refused(timestamp: object, said: str) -> None:
    sentence = refusal(REACTION | {"timestamp": timestamp})
    assert sentence.startswith("timestamp: ")
    assert said.lower() in sentence.lower()


def test_a_clock_may_be_a_little_ahead() -> None:
    assert parse(REACTION | {"timestamp": (NOW + AHEAD_MAX).isoformat()}, NOW)


@pytest.mark.parametrize(
    "change",
    [
        {"key": ""}, {"key": None}, {"key": 5}, {"key": "x" * 201}, {"key": "a\0b"}, {"key": "\ud800"}, {"from": []},
        {"chat_id": {}}, {"message_id": "\0"}, {"reaction": "x" * 65}, {"reaction": 0}, {"reaction": "\udfff"},
    ],
)  # fmt: skip
def test_what_a_column_cannot_hold_is_refused_and_the_field_named_without_its_value(change: dict[str, Any]) -> None:
    [(field, value)] = change.items()
    sentence = refusal(REACTION | change)
    assert sentence.startswith(f"{field}: ")
    if isinstance(value, str) and value:
        assert value not in sentence


@pytest.mark.parametrize("payload", [None, 1, "x", [], [REACTION], {}, {"event": None}, {"event": 5}, {"event": []}])
def test_what_is_no_event_at_all_is_refused(payload: object) -> None:
    assert refusal(payload)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@settings(deadline=None)
@given(st.sampled_from([REACTION, MESSAGE]), st.dictionaries(st.sampled_from([*REACTION, *MESSAGE]), _JSON))
def test_whatever_the_fields_hold_the_answer_is_an_event_nothing_or_a_refusal(
    payload: dict[str, Any], changes: dict[str, Any]
) -> None:
    with contextlib.suppress(InvalidEventError):
        event = parse(payload | changes, NOW)
        assert event is None or isinstance(event, MessageEvent | ReactionEvent)


@settings(deadline=None)
@given(_JSON)
def test_the_same_for_any_json(payload: object) -> None:
    with contextlib.suppress(InvalidEventError):
        assert parse(payload, NOW) is None
