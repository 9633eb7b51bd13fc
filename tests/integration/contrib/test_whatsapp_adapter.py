"""The adapter against webhooks of every kind: what is in the tables is what the latest valid events say."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg_pool import AsyncConnectionPool

from cdc.contrib.whatsapp.adapter import Adapter, Result
from cdc.contrib.whatsapp.events import InvalidEventError
from cdc.postgres import migrations
from tests.eventually import eventually_async

NOW = datetime(2026, 6, 1, tzinfo=UTC)
BEGIN = 1767225600
Payload = dict[str, Any]


def reaction(key: str = "r", emoji: str | None = "✅", at: int = 0, **others: str) -> Payload:
    fields = {"message_id": "m", "from": "u", "chat_id": "c"} | others
    return {"event": "messages.reaction", "key": key, "reaction": emoji, "timestamp": BEGIN + at} | fields


def message(key: str = "m", content: str | None = "hello", at: int = 0, **others: str) -> Payload:
    fields = {"from": "u", "chat_id": "c"} | others
    return {"event": "messages.upsert", "key": key, "content": content, "timestamp": BEGIN + at} | fields


@pytest.fixture
def tables(outbox_db: psycopg.Connection) -> psycopg.Connection:
    migrations.install(outbox_db, "public", ["whatsapp"])
    return outbox_db


@asynccontextmanager
async def adapting(dsn: str, size: int = 1) -> AsyncIterator[Adapter]:
    async with AsyncConnectionPool(dsn, kwargs={"autocommit": True}, min_size=1, max_size=size) as pool:
        yield Adapter(pool.connection, "public")


async def process(dsn: str, payloads: Sequence[object], size: int = 1) -> list[str]:
    """The result of each, or "rejected"; one after the other, or ``size`` at a time."""

    async def one(adapter: Adapter, payload: object) -> str:
        try:
            return await adapter.process_webhook(payload, NOW)
        except InvalidEventError:
            return "rejected"

    async with adapting(dsn, size) as adapter:
        if size == 1:
            return [await one(adapter, payload) for payload in payloads]
        return await asyncio.gather(*(one(adapter, payload) for payload in payloads))


def stored(db: psycopg.Connection) -> dict[str, list[Any]]:
    reactions = db.execute("SELECT id, reaction, message_id, user_id, chat_id FROM whatsapp_message_reactions")
    messages = db.execute("SELECT id, content, user_id, chat_id FROM whatsapp_messages")
    return {f"reaction {key}": rest for key, *rest in reactions} | {f"message {key}": rest for key, *rest in messages}


def expected(payloads: Sequence[Payload]) -> dict[str, list[Any]]:
    """By the latest event of each key, found without the adapter's help."""
    latest: dict[str, tuple[Any, ...]] = {}
    for each in payloads:
        user, chat = each["from"], each["chat_id"]
        if each["event"] == "messages.reaction":
            name = f"reaction {each['key']}"
            if each["reaction"]:
                state = (each["timestamp"], False, [each["reaction"], each["message_id"], user, chat])
            else:
                state = (each["timestamp"], True, [])
        else:
            name = f"message {each['key']}"
            content = each["content"]
            state = (each["timestamp"], content is not None, [content or "", user, chat])
        latest[name] = max(latest.get(name, state), state)
    return {
        name: row if name.startswith("reaction") or flag else [None, *row[1:]]
        for name, (_, flag, row) in latest.items()
        if name.startswith("message") or not flag
    }


def captured(db: psycopg.Connection) -> list[tuple[str, str]]:
    return db.execute("SELECT entity_type, operation FROM entity_changes ORDER BY seq").fetchall()


async def test_an_event_is_stored_once_and_a_repeated_one_changes_nothing(
    outbox: str, tables: psycopg.Connection
) -> None:
    events = [reaction(), message()]
    assert await process(outbox, [*events, *events]) == ["stored", "stored", "stale", "stale"]
    assert stored(tables) == expected(events)
    assert captured(tables) == [("reaction", "INSERT"), ("message", "INSERT")]


async def test_a_removed_reaction_is_deleted_and_an_older_event_that_comes_late_does_not_bring_it_back(
    outbox: str, tables: psycopg.Connection
) -> None:
    results = await process(
        outbox, [reaction(at=1), reaction(emoji="", at=2), reaction(at=1), reaction(emoji="❤️", at=0)]
    )
    assert results == ["stored", "stored", "stale", "stale"]
    assert stored(tables) == {}
    assert captured(tables) == [("reaction", "INSERT"), ("reaction", "DELETE")]


async def test_a_removal_that_comes_first_keeps_what_it_removes_from_being_stored(
    outbox: str, tables: psycopg.Connection
) -> None:
    assert await process(outbox, [reaction(emoji=None, at=2), reaction(at=1)]) == ["stored", "stale"]
    assert captured(tables) == []


async def test_a_reaction_may_come_back_and_then_nothing_remembers_that_it_was_gone(
    outbox: str, tables: psycopg.Connection
) -> None:
    assert await process(outbox, [reaction(emoji="", at=1), reaction(at=2), reaction(emoji="", at=1)]) == [
        "stored", "stored", "stale",
    ]  # fmt: skip
    assert stored(tables) == expected([reaction()])
    assert tables.execute("TABLE whatsapp_removed_reactions").fetchall() == []


async def test_a_late_older_event_does_not_overwrite_a_newer_one(outbox: str, tables: psycopg.Connection) -> None:
    newer = [reaction(emoji="❤️", at=2), message(content="edited", at=2)]
    assert await process(outbox, [*newer, reaction(), message()]) == ["stored", "stored", "stale", "stale"]
    assert stored(tables) == expected(newer)


async def test_of_two_events_with_one_timestamp_the_same_counts_in_either_order(
    outbox: str, tables: psycopg.Connection
) -> None:
    twins = [reaction(emoji="👍"), reaction(emoji="❤️"), reaction("gone"), reaction("gone", None)]
    await process(outbox, twins)
    first = stored(tables)
    tables.execute("TRUNCATE whatsapp_message_reactions, whatsapp_removed_reactions")
    await process(outbox, twins[::-1])
    assert stored(tables) == first == expected(twins)


async def test_what_cannot_be_stored_does_not_reach_the_database(outbox: str) -> None:
    """There are no tables in this one."""
    hostile = [{}, reaction(key="a\0b"), reaction(at=10**8), {"event": "messages.reaction"}, {"event": "other"}]
    assert await process(outbox, hostile) == ["rejected"] * 4 + ["ignored"]


async def test_a_value_that_only_a_live_systems_column_refuses_is_a_rejection(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    outbox_db.execute(
        "CREATE TABLE whatsapp_messages (id varchar(3) PRIMARY KEY, content text, user_id text, chat_id text,"
        " sent_at timestamptz)"
    )
    assert await process(outbox, [message("long"), message("ok")]) == ["rejected", "stored"]


async def test_an_event_waits_for_one_of_the_same_reaction_that_is_being_stored(
    outbox: str, tables: psycopg.Connection
) -> None:
    """Otherwise it would not see the removal, and leave the reaction there for ever."""
    waiting = "SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
    async with await psycopg.AsyncConnection.connect(outbox) as held_open:
        await held_open.execute("SELECT 1")  # the adapter's transaction is a part of this one now

        @asynccontextmanager
        async def lend() -> AsyncIterator[psycopg.AsyncConnection]:
            yield held_open

        assert await Adapter(lend, "public").process_webhook(reaction(emoji=None, at=2), NOW) == "stored"
        late = asyncio.create_task(process(outbox, [reaction(at=1)]))

        async def waits() -> bool:
            return late.done() or bool(tables.execute(waiting).fetchall())

        await eventually_async(waits)
        await held_open.commit()
        assert await late == ["stale"]


async def test_events_of_one_reaction_that_come_at_the_same_time_end_as_in_any_other_order(
    outbox: str, tables: psycopg.Connection
) -> None:
    chance = random.Random(7)
    events = [
        reaction(f"r-{n % 10}", chance.choice(["👍", "❤️", "", None]), chance.randrange(6)) for n in range(300)
    ] + [message(f"m-{n % 10}", chance.choice(["a", "b", None]), chance.randrange(6)) for n in range(200)]
    chance.shuffle(events)
    results = await process(outbox, events, size=8)
    assert set(results) == {"stored", "stale"}
    assert stored(tables) == expected(events)
    revived = "SELECT FROM whatsapp_removed_reactions JOIN whatsapp_message_reactions USING (id)"
    assert tables.execute(revived).fetchall() == [], "there or removed, not both"


_KEYS = st.sampled_from(["a", "b", "Ä", " "])
_TEXT = st.sampled_from(["x", "Z", "é", "😀", "'; DROP TABLE whatsapp_messages; --", "%s", "{}", "\u202e", "\n"])
_AT = st.integers(0, 3)
_REACTIONS = st.builds(
    lambda key, emoji, at, user: reaction(key, emoji, at, **{"from": user}),
    _KEYS, st.none() | st.just("") | _TEXT, _AT, _TEXT,
)  # fmt: skip
_MESSAGES = st.builds(
    lambda key, content, at, chat: message(key, content, at, chat_id=chat), _KEYS, st.none() | _TEXT, _AT, _TEXT
)
_VALID = _REACTIONS | _MESSAGES
_HOSTILE = st.sampled_from([None, 0, True, [], {}, "", "a\0", "\ud83d", "x" * 70_000, float("nan"), -(10**30)])


@st.composite
def _broken(draw: st.DrawFn) -> object:
    """An event with one field that is missing, or holds what cannot be stored."""
    payload = draw(_VALID)
    name = draw(st.sampled_from([name for name in payload if name not in ("event", "reaction", "content")]))
    if draw(st.booleans()):
        return {other: value for other, value in payload.items() if other != name}
    value = draw(_HOSTILE)
    if name == "timestamp" and value == 0:  # 1970, which is none to be refused
        value = "never"
    return payload | {name: value}


_FOREIGN = st.builds(lambda name, payload: payload | {"event": name}, st.sampled_from(["x", "messages.delete"]), _VALID)
_NONSENSE = st.sampled_from([None, 5, "text", [], [{}], {}, {"event": None}, {"event": ["messages.reaction"]}])
_WEBHOOKS = st.lists(
    st.one_of(
        st.tuples(_VALID, st.just("valid")),
        st.tuples(_broken() | _NONSENSE, st.just("rejected")),
        st.tuples(_FOREIGN, st.just("ignored")),
    ),
    max_size=25,
)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(webhooks=_WEBHOOKS, seed=st.integers())
@pytest.mark.timeout(300)
def test_whatever_comes_in_whatever_order_the_tables_hold_what_the_latest_valid_events_say(
    webhooks: list[tuple[Any, str]], seed: int, outbox: str, tables: psycopg.Connection
) -> None:
    tables.execute("TRUNCATE whatsapp_message_reactions, whatsapp_messages, whatsapp_removed_reactions, entity_changes")
    again = random.Random(seed).sample(webhooks, len(webhooks))
    results = asyncio.run(process(outbox, [payload for payload, _ in [*webhooks, *again]]))
    for (payload, kind), result in zip([*webhooks, *again], results, strict=True):
        assert result == kind or (kind == "valid" and result in (Result.STORED, Result.STALE)), payload
    valid = [payload for payload, kind in webhooks if kind == "valid"]
    assert stored(tables) == expected(valid)
    assert set(results[len(webhooks) :]) <= {"stale", "rejected", "ignored"}, "the second time is no news"
    assert len(captured(tables)) <= results.count("stored")
