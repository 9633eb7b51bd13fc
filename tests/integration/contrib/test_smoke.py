"""``cdc whatsapp smoke``: one reaction all the way on a live installation, and nothing of it stays."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner, Result
from psycopg.types.json import Jsonb

from cdc.cli import cdc as root_command
from cdc.contrib.whatsapp import make_router
from cdc.contrib.whatsapp.sender import Recorder
from cdc.postgres import migrations
from tests.eventually import eventually, eventually_async
from tests.fix_consumer import consuming, metric, slot_name


@pytest.fixture
def tables(outbox_db: psycopg.Connection) -> psycopg.Connection:
    """With a rule for a task, one for a message, and something of everybody else's."""
    migrations.install(outbox_db, "public", ["whatsapp"])
    for name, emoji, action in (("r1", "📣", "create_task"), ("r2", "📣", "notify"), ("r3", "✅", "create_task")):
        config = Jsonb({"trigger_emoji": emoji, "action_type": action})
        outbox_db.execute(
            "INSERT INTO \"actionRules\" (id, rule_type, config) VALUES (%s, 'simple_action', %s)", [name, config]
        )
    outbox_db.execute("INSERT INTO cortex_projects.tasks (id, title) VALUES ('mine', 'mine')")
    return outbox_db


def _smoke(dsn: str, *options: str) -> Result:
    return CliRunner().invoke(root_command, ["whatsapp", "smoke", "--dsn", dsn, *options])


def _left(db: psycopg.Connection) -> dict[str, Any]:
    """What is in the tables: nothing but what was there before."""
    return {
        "reactions": db.execute("SELECT count(*) FROM whatsapp_message_reactions").fetchone()[0],
        "tasks": [row[0] for row in db.execute("SELECT id FROM cortex_projects.tasks")],
        "changes": [row[0] for row in db.execute("SELECT entity_id FROM entity_changes")],
    }


_NOTHING = {"reactions": 0, "tasks": ["mine"], "changes": ["mine"]}


@pytest.mark.parametrize("stream", [True, False])
async def test_with_a_consumer_at_work_every_step_is_seen_and_nothing_is_left_behind(
    stream: bool, outbox: str, tables: psycopg.Connection
) -> None:
    sender, slot = Recorder(), slot_name()
    async with consuming(
        outbox, make_router(sender, help_text="?"), stream=stream, slot_name=slot, poll_interval=0.05
    ) as app:

        async def ready() -> bool:
            registry = app.metrics.registry
            return metric(registry, "cdc_shards_owned") == 64 and metric(registry, "cdc_stream_connected") == stream

        await eventually_async(ready)
        done = await asyncio.to_thread(_smoke, outbox, "--json", "--slot-name", slot)
    told = json.loads(done.stdout)
    assert done.exit_code == 0, done.output
    assert (told["ok"], told["emoji"], told["findings"]) == (True, "✅", [])
    steps = {step["name"]: step for step in told["steps"]}
    assert list(steps) == ["captured", "woken", "processed", "task"]
    assert {name: step["ok"] for name, step in steps.items()} == {
        "captured": True, "woken": True if stream else None, "processed": True, "task": True,
    }  # fmt: skip
    assert steps["woken"]["detail"].startswith("the reader of the slot" if stream else "no consumer reads the slot")
    assert 0 < steps["processed"]["after_s"] < 10
    assert [message.chat_id for _, message in sender.sent] == ["cdc-smoke"], "the task's notification, and nothing else"
    assert _left(tables) == _NOTHING
    if stream:
        tables.execute("SELECT pg_drop_replication_slot(%s)", [slot])


def test_without_a_consumer_it_says_what_is_missing_and_why_and_cleans_up(
    outbox: str, tables: psycopg.Connection
) -> None:
    done = _smoke(outbox, "--timeout", "0.3", "--slot-name", slot_name())
    assert done.exit_code == 1
    lines = done.stdout.splitlines()
    assert lines[0].startswith("✓ captured")
    assert [line.split()[:2] for line in lines[1:4]] == [["✗", "woken"], ["✗", "processed"], ["✗", "task"]]
    assert "after 0.3 s the change is fresh" in lines[2]
    causes = done.output[done.output.index("what cdc doctor finds:") :].splitlines()
    assert causes[1].split() == ["fail", "consumers", "no", "consumer", "is", "running"]
    assert _left(tables) == _NOTHING


def test_without_a_trigger_nothing_is_captured(outbox: str, tables: psycopg.Connection) -> None:
    tables.execute("ALTER TABLE whatsapp_message_reactions DISABLE TRIGGER USER")
    done = _smoke(outbox, "--timeout", "0.3", "--json")
    told = json.loads(done.stdout)
    assert (done.exit_code, [step["ok"] for step in told["steps"]]) == (1, [False] * 4)
    assert _left(tables) == _NOTHING


def test_ctrl_c_leaves_nothing_behind(outbox: str, tables: psycopg.Connection) -> None:
    smoke = subprocess.Popen(
        [sys.executable, "-m", "cdc", "whatsapp", "smoke", "--dsn", outbox, "--timeout", "60"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    eventually(lambda: _left(tables)["reactions"] == 1, what="the reaction is written")
    smoke.send_signal(signal.SIGINT)
    smoke.communicate()
    assert smoke.returncode == 130
    assert _left(tables) == _NOTHING


def test_without_the_tables_or_a_rule_it_is_one_sentence(outbox: str, outbox_db: psycopg.Connection) -> None:
    done = _smoke(outbox)
    assert done.exit_code == 1
    assert done.stderr.splitlines() == [
        "Error: there is no table public.whatsapp_message_reactions",
        "  run: cdc db install --with whatsapp",
    ]
    migrations.install(outbox_db, "public", ["whatsapp"])
    done = _smoke(outbox)
    assert done.exit_code == 4
    assert "no emoji has active rules that create tasks and do nothing else" in done.stderr
