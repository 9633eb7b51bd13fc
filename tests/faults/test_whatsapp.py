"""From webhook to task to notification, while everything on the way is killed. Real processes, kill -9."""

from __future__ import annotations

import contextlib
import http.client
import random
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.types.json import Jsonb

from cdc.postgres import migrations
from tests.eventually import eventually
from tests.fix_consumer import Process, settled, states
from tests.fix_messenger import Messenger
from tests.fix_webhook import Endpoint

_REACTIONS = 300
_RULES = ("first", "second")
_ROUNDS = 3


def _event(n: int) -> dict[str, Any]:
    return {
        "event": "messages.reaction", "key": f"r-{n}", "message_id": f"m-{n}", "reaction": "✅", "from": "ada",
        "chat_id": f"chat-{n % 7}", "timestamp": 1767225600 + n,
    }  # fmt: skip


def _deliver(endpoint: Endpoint, events: list[dict[str, Any]], stop: threading.Event) -> None:
    """As a messenger does: until it is answered with 200, and now and then once more."""
    chance = random.Random(1)
    for event in events:
        for _ in range(1 + (chance.random() < 0.3)):
            while not stop.wait(0.01):
                with contextlib.suppress(OSError, http.client.HTTPException):
                    if endpoint.post(event)[0] == 200:
                        break


@pytest.fixture
def start(outbox: str, processes: list[Process], messenger: Messenger, tmp_path: Path) -> Callable[[], Process]:
    """Starts a consumer with the application's handlers."""

    def one() -> Process:
        log = tmp_path / f"consumer-{len(processes)}.log"
        settings: dict[str, Any] = {"whatsapp_sender_url": messenger.url, "backoff_base": 0.05}
        processes.append(Process(outbox, log, handlers="cdc.contrib.whatsapp:router", **settings))
        return processes[-1]

    return one


@pytest.fixture
def endpoint(outbox: str, outbox_db: psycopg.Connection, endpoints: list[Endpoint], tmp_path: Path) -> Endpoint:
    """One at work, with rules in the database."""
    migrations.install(outbox_db, "public", ["whatsapp"])
    for rule in _RULES:
        config = Jsonb({"trigger_emoji": "✅", "action_type": "create_task"})
        statement = "INSERT INTO \"actionRules\" (id, rule_type, config) VALUES (%s, 'simple_action', %s)"
        outbox_db.execute(statement, [rule, config])
    endpoints.append(Endpoint(outbox, tmp_path / "endpoint.log"))
    return endpoints[-1]


@pytest.mark.promise("G2")
@pytest.mark.timeout(300)
def test_each_reaction_has_exactly_one_task_for_each_rule_whoever_is_killed_in_between(
    outbox_db: psycopg.Connection, endpoint: Endpoint, start: Callable[[], Process], messenger: Messenger
) -> None:
    stop = threading.Event()
    events = [_event(n) for n in range(_REACTIONS)]
    sending = threading.Thread(target=_deliver, args=(endpoint, events, stop))
    sending.start()
    try:
        for _ in range(_ROUNDS):
            consumer = start()
            enough = _tasks(outbox_db) + 20
            eventually(partial(_has_tasks, outbox_db, enough), within_s=60)
            consumer.kill()
            endpoint.kill()
            endpoint.start()
        start()
        sending.join(120)
        assert not sending.is_alive()
        eventually(lambda: settled(outbox_db), within_s=60)
    finally:
        stop.set()
        sending.join()
    assert states(outbox_db) == {"processed": _REACTIONS * (1 + len(_RULES))}
    pairs = outbox_db.execute("SELECT reaction_id, rule_id FROM cortex_projects.tasks").fetchall()
    assert sorted(pairs) == sorted((event["key"], rule) for event in events for rule in _RULES)
    tasks = outbox_db.execute("SELECT id::text FROM entity_changes WHERE entity_type = 'task'").fetchall()
    assert {each.key for each in messenger.received} == {change for (change,) in tasks}, "each task was told of"


def _tasks(db: psycopg.Connection) -> int:
    [(count,)] = db.execute("SELECT count(*) FROM cortex_projects.tasks").fetchall()
    return int(count)


def _has_tasks(db: psycopg.Connection, more_than: int) -> bool:
    return _tasks(db) > more_than
