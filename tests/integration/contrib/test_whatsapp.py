"""The application's handlers under a consumer: rules, tasks, help, and what is sent."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo
from psycopg.types.json import Jsonb

from cdc.app import config
from cdc.contrib.whatsapp import make_router, router
from cdc.contrib.whatsapp.actions import Actions, Config, Context, standard
from cdc.contrib.whatsapp.sender import Outgoing, Recorder
from cdc.core.errors import UsageError
from cdc.postgres import grants, migration_scripts, migrations
from tests.eventually import eventually_async
from tests.fix_consumer import consuming, settled, states
from tests.fix_messenger import Messenger

HELP = "React with ✅."
_QUICK: dict[str, Any] = {"backoff_base": 0.01, "backoff_cap": 0.05, "stream": False, "poll_interval": 0.02}


@pytest.fixture
def tables(outbox_db: psycopg.Connection) -> psycopg.Connection:
    migrations.install(outbox_db, "public", ["whatsapp"])
    return outbox_db


def add_rule(db: psycopg.Connection, identity: str, emoji: str = "✅", *, active: bool = True, **config: Any) -> None:
    given = {"trigger_emoji": emoji, "action_type": "create_task"} | config
    db.execute(
        'INSERT INTO "actionRules" (id, rule_type, config, active) VALUES (%s, %s, %s, %s)',
        [identity, "simple_action", Jsonb(given), active],
    )


def react(db: psycopg.Connection, identity: str = "r-1", emoji: str = "✅") -> None:
    db.execute(
        "INSERT INTO whatsapp_message_reactions (id, message_id, reaction, user_id, chat_id)"
        " VALUES (%s, 'm-1', %s, 'ada', 'chat')",
        [identity, emoji],
    )


def write(db: psycopg.Connection, content: str | None, identity: str = "m-1") -> None:
    db.execute(
        "INSERT INTO whatsapp_messages (id, content, user_id, chat_id) VALUES (%s, %s, 'ada', 'chat')",
        [identity, content],
    )


def tasks(db: psycopg.Connection) -> list[tuple[Any, ...]]:
    return db.execute(
        "SELECT reaction_id, rule_id, title, user_id, room_id FROM cortex_projects.tasks ORDER BY reaction_id, rule_id"
    ).fetchall()


async def work_off(
    dsn: str, db: psycopg.Connection, sender: Any, actions: Actions | None = None, **settings: Any
) -> None:
    made = make_router(sender, help_text=HELP, actions=actions)
    async with consuming(dsn, made, **(_QUICK | settings)):
        await until(lambda: settled(db))


async def until(condition: Callable[[], Any]) -> None:
    async def check() -> Any:
        return condition()

    await eventually_async(check)


class Down(Recorder):
    """A messenger that refuses its first messages."""

    def __init__(self, refusals: int) -> None:
        super().__init__()
        self.refusals = refusals
        self.tried: list[str] = []

    async def send(self, message: Outgoing, key: str) -> None:
        self.tried.append(key)
        if len(self.tried) <= self.refusals:
            raise ConnectionError("nobody is there")
        await super().send(message, key)


async def test_a_reaction_becomes_a_task_for_each_active_rule_and_each_room_gets_a_message(
    outbox: str, tables: psycopg.Connection
) -> None:
    add_rule(tables, "a")
    add_rule(tables, "b", title="{user_id} checked {message_id}")
    add_rule(tables, "off", active=False)
    add_rule(tables, "other", "👍")
    tables.execute(
        "INSERT INTO \"actionRules\" (rule_type, config) VALUES ('another', %s)",
        [Jsonb({"trigger_emoji": "✅", "action_type": "create_task"})],
    )
    react(tables)
    sender = Recorder()
    await work_off(outbox, tables, sender)
    assert tasks(tables) == [
        ("r-1", "a", "Follow up on m-1", "ada", "chat"),
        ("r-1", "b", "ada checked m-1", "ada", "chat"),
    ]
    assert {message.text for _, message in sender.sent} == {"New task: Follow up on m-1", "New task: ada checked m-1"}
    [(reaction,)] = tables.execute("SELECT id FROM entity_changes WHERE entity_type = 'reaction'").fetchall()
    chain = tables.execute("SELECT id::text, caused_by FROM entity_changes WHERE entity_type = 'task'").fetchall()
    assert [cause for _, cause in chain] == [reaction, reaction], "a chain reaction"
    assert {key for key, _ in sender.sent} == {key for key, _ in chain}, "the change's id is the idempotency key"


@pytest.mark.parametrize(("content", "answers"), [("Can you HELP me?", [HELP]), ("Hello", []), (None, [])])
async def test_a_message_that_asks_for_help_is_answered(
    content: str | None, answers: list[str], outbox: str, tables: psycopg.Connection
) -> None:
    write(tables, content)
    sender = Recorder()
    await work_off(outbox, tables, sender)
    assert [message.text for _, message in sender.sent] == answers
    assert states(tables) == {"processed": 1}


async def test_a_messenger_that_is_away_is_tried_again_with_the_same_key(
    outbox: str, tables: psycopg.Connection
) -> None:
    write(tables, "help")
    sender = Down(refusals=2)
    await work_off(outbox, tables, sender)
    assert len(sender.tried) == 3
    assert len(set(sender.tried)) == 1
    assert [message.text for _, message in sender.sent] == [HELP]


async def test_a_rule_that_says_something_does_so_after_the_commit_and_holds_up_no_task(
    outbox: str, tables: psycopg.Connection
) -> None:
    add_rule(tables, "task")
    add_rule(tables, "tell", action_type="notify", text="{user_id}: {reaction}", chat_id="boss")
    add_rule(tables, "help", action_type="send_help_message")
    react(tables)
    sender = Down(refusals=10_000)
    await work_off(outbox, tables, sender)
    assert len(tasks(tables)) == 1
    dead = "SELECT entity_type, count(*) FROM entity_changes WHERE dead_at IS NOT NULL GROUP BY 1 ORDER BY 1"
    assert tables.execute(dead).fetchall() == [("outgoing_message", 2), ("task", 1)]
    tables.execute("SELECT reprocess_failed_actions()")
    sender.refusals = 0
    await work_off(outbox, tables, sender)
    said = {(message.chat_id, message.text) for _, message in sender.sent}
    assert said == {("boss", "ada: ✅"), ("chat", HELP), ("chat", "New task: Follow up on m-1")}


async def test_bad_rules_are_reported_once_each_and_stop_nothing_else(
    outbox: str, tables: psycopg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    add_rule(tables, "a", action_type="creat_task")
    add_rule(tables, "b", title="{secret_text}")
    add_rule(tables, "c")
    for n in range(5):
        react(tables, f"r-{n}")
    with caplog.at_level(logging.ERROR, "cdc.contrib.whatsapp"):
        await work_off(outbox, tables, Recorder(), concurrency=1)
    reports = [record.getMessage() for record in caplog.records if record.name.startswith("cdc.contrib.whatsapp.")]
    assert [report.split(":")[0] for report in reports] == ["rule a is left out", "rule b is left out"]
    assert "secret_text" not in "".join(reports)
    assert [task[:2] for task in tasks(tables)] == [(f"r-{n}", "c") for n in range(5)]
    assert states(tables) == {"processed": 10}


async def test_a_rule_counts_from_the_moment_it_is_stored(outbox: str, tables: psycopg.Connection) -> None:
    async with consuming(outbox, make_router(Recorder(), help_text=HELP), **_QUICK):
        react(tables, "before")
        await until(lambda: settled(tables))
        add_rule(tables, "a")
        react(tables, "after")
        await until(lambda: tasks(tables))
        tables.execute('UPDATE "actionRules" SET active = false')
        react(tables, "later")
        await until(lambda: settled(tables))
    assert [task[0] for task in tasks(tables)] == ["after"]


async def test_each_task_knows_which_reaction_it_came_of_also_where_many_are_handled_at_once(
    outbox: str, tables: psycopg.Connection
) -> None:
    add_rule(tables, "a")
    for n in range(20):
        react(tables, f"r-{n}")
    await work_off(outbox, tables, Recorder())
    causes = tables.execute(
        "SELECT task.new_data ->> 'reaction_id', cause.entity_id FROM entity_changes AS task"
        " JOIN entity_changes AS cause ON cause.id = task.caused_by WHERE task.entity_type = 'task'"
    ).fetchall()
    assert len(causes) == 20
    assert [reaction for reaction, _ in causes] == [cause for _, cause in causes]


async def test_a_reaction_that_was_removed_and_comes_back_has_its_task_already(
    outbox: str, tables: psycopg.Connection
) -> None:
    add_rule(tables, "a")
    react(tables)
    tables.execute("DELETE FROM whatsapp_message_reactions")
    react(tables)
    await work_off(outbox, tables, Recorder())
    assert len(tasks(tables)) == 1
    assert "dead" not in states(tables)


async def test_an_emoji_that_became_another_follows_its_rules_and_one_that_stayed_does_not(
    outbox: str, tables: psycopg.Connection
) -> None:
    add_rule(tables, "thumb", "👍", action_type="notify")
    add_rule(tables, "check")
    react(tables, emoji="👍")
    tables.execute("UPDATE whatsapp_message_reactions SET reaction = '✅'")
    tables.execute("UPDATE whatsapp_message_reactions SET message_id = 'm-2'")
    tables.execute("ALTER TABLE whatsapp_message_reactions ALTER reaction DROP NOT NULL")
    tables.execute("UPDATE whatsapp_message_reactions SET reaction = NULL")
    sender = Recorder()
    await work_off(outbox, tables, sender)
    assert [task[1] for task in tasks(tables)] == ["check"]
    assert [message.text for _, message in sender.sent if "reacted" in message.text] == ["ada reacted with 👍"]
    assert "dead" not in states(tables)


async def test_an_action_that_fails_takes_back_what_the_other_rules_of_its_reaction_did_and_is_tried_again(
    outbox: str, tables: psycopg.Connection
) -> None:
    actions = standard(HELP)
    calls: list[str] = []

    @actions.register("once_more")
    async def once_more(context: Context, config: Config) -> None:
        calls.append(context.reaction.id)
        if calls.count(context.reaction.id) < 3 and context.reaction.id == "bad":
            raise LookupError("not yet")

    add_rule(tables, "a")
    add_rule(tables, "b", action_type="once_more")
    add_rule(tables, "c")
    for identity in ("good-1", "bad", "good-2"):
        react(tables, identity)
    await work_off(outbox, tables, Recorder(), actions)
    assert [task[:2] for task in tasks(tables)] == [
        (reaction, rule) for reaction in ("bad", "good-1", "good-2") for rule in ("a", "c")
    ]
    attempts = "SELECT entity_id, error_count FROM entity_changes WHERE entity_type = 'reaction' ORDER BY 1"
    assert tables.execute(attempts).fetchall()[0][0] == "bad"
    assert [count for _, count in tables.execute(attempts).fetchall()[1:]] == [0, 0]


async def test_for_a_task_without_a_room_no_message_is_sent(outbox: str, tables: psycopg.Connection) -> None:
    tables.execute("INSERT INTO cortex_projects.tasks (title) VALUES ('made by hand')")
    sender = Recorder()
    await work_off(outbox, tables, sender)
    assert (sender.sent, states(tables)) == ([], {"processed": 1})


async def test_it_works_in_another_schema_and_as_a_role_that_has_the_granted_rights_and_no_others(
    db: psycopg.Connection, database: str, messenger: Messenger
) -> None:
    name = 'Tenant "7"; é'
    role = f"consumer_{uuid.uuid4().hex[:8]}"
    migrations.install(db, name, ["whatsapp"])
    db.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(role)))
    try:
        scripts = [migration_scripts.consumer_rights("whatsapp", name, role)]
        for _ in range(2):
            [granted] = grants.grant(db, name, [grants.consumer(role, scripts=scripts)])
        assert granted.excess == "", "what the set asks for is no excess"
        db.execute(sql.SQL("SET search_path = {}").format(sql.Identifier(name)))
        add_rule(db, "task")
        add_rule(db, "tell", action_type="notify")
        react(db)
        write(db, "help")
        given = config.from_options({"schema": name, "whatsapp_sender_url": messenger.url, "whatsapp_help_text": HELP})
        async with consuming(make_conninfo(database, user=role), router(given), schema=name, **_QUICK):
            await until(lambda: settled(db))
        assert states(db) == {"processed": 4}
        assert set(messenger.texts) == {HELP, "New task: Follow up on m-1", "ada reacted with ✅"}
        with psycopg.connect(make_conninfo(database, user=role), autocommit=True) as granted_only:
            for statement in ("DELETE FROM cortex_projects.tasks", "SELECT title FROM cortex_projects.tasks"):
                with pytest.raises(psycopg.errors.InsufficientPrivilege):
                    granted_only.execute(statement.encode())
    finally:
        db.execute(sql.SQL("DROP OWNED BY {0} CASCADE; DROP ROLE {0}").format(sql.Identifier(role)))


def test_without_a_messenger_it_does_not_start_and_says_how_to_name_one() -> None:
    with pytest.raises(UsageError, match="no messenger is named") as refused:
        router(config.from_options({}))
    assert "CDC_WHATSAPP_SENDER_URL" in refused.value.hint
    with pytest.raises(UsageError, match="is not valid"):
        router(config.from_options({"whatsapp_sender_url": "nowhere"}))


def test_an_answer_that_would_be_answered_itself_is_refused() -> None:
    with pytest.raises(UsageError, match="must not have the word help in it"):
        config.from_options({"whatsapp_help_text": "This is your Help."})
