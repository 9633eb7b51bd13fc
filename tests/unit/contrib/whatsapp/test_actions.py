from __future__ import annotations

from typing import Any, cast

import psycopg
import pytest

from cdc.contrib.whatsapp.actions import BadRuleError, Config, Context, CreateTask, Notify, standard
from cdc.contrib.whatsapp.rows import ReactionRow

REACTION = ReactionRow(id="r-1", message_id="m-1", reaction="✅", user_id="u", chat_id=None)
CREATE = {"trigger_emoji": "✅", "action_type": "create_task"}


def problem(config: dict[str, Any]) -> str:
    with pytest.raises(BadRuleError) as bad:
        standard("").read(config)
    return str(bad.value)


def test_a_rule_of_the_document_is_read_with_what_it_leaves_out() -> None:
    config, _ = standard("").read(CREATE)
    assert config == CreateTask(trigger_emoji="✅", action_type="create_task", title="Follow up on {message_id}")


def test_what_an_action_does_not_know_is_ignored() -> None:
    config, _ = standard("").read({"trigger_emoji": "🔔", "action_type": "notify", "colour": "red"})
    assert isinstance(config, Notify)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"action_type": "creat_task"}, "its action_type is none of create_task, notify, send_help_message"),
        ({"action_type": None}, "its action_type is none of create_task, notify, send_help_message"),
        ({"title": ""}, "title: String should have at least 1 character"),
        ({"title": 5}, "title: Input should be a valid string"),
        ({"title": "of {massage_id}"}, "title: there is no placeholder of that name; there are message_id,"),
        ({"title": "{}"}, "title: there is no placeholder of that name"),
        ({"trigger_emoji": 5}, "trigger_emoji: Input should be a valid string"),
    ],
)
def test_a_bad_rule_is_named_by_its_field_without_its_value(change: dict[str, Any], said: str) -> None:
    assert problem(CREATE | change).startswith(said)


def test_a_template_takes_the_reactions_own_and_nothing_else() -> None:
    context = Context(cast("psycopg.AsyncConnection", None), REACTION, "rule-1", "public")
    assert context.fill("{reaction} on {message_id} by {user_id} in {chat_id}: {0.x} {{") == (
        "✅ on m-1 by u in : {0.x} {{"
    )


def test_an_action_of_ones_own_is_found_by_its_name_and_its_config_validated() -> None:
    class Pin(Config):
        board: str

    actions = standard("")

    @actions.register("pin", Pin)
    async def pin(context: Context, config: Pin) -> None: ...

    config, perform = actions.read({"trigger_emoji": "📌", "action_type": "pin", "board": "wall"})
    assert (config, perform) == (Pin(trigger_emoji="📌", action_type="pin", board="wall"), pin)
    with pytest.raises(BadRuleError, match="board: Field required"):
        actions.read({"trigger_emoji": "📌", "action_type": "pin"})
