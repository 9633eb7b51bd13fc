"""Actions that a rule can name as its action_type; an application adds its own in the same way.

An action writes through the connection of its context, in the transaction that marks the reaction as handled: its
writes happen once. It has no effect outside the database. Its messages go through ``context.send``, which commits with
the rest; a separate handler sends them afterwards, and an absent messenger delays no task.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import psycopg
from psycopg import sql
from psycopg.types.json import Jsonb
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from cdc.contrib.whatsapp.rows import ReactionRow
from cdc.contrib.whatsapp.sender import Outgoing

OUTGOING = "outgoing_message"
"""The entity type of a message to be sent."""

_FIELDS = ("message_id", "user_id", "chat_id", "reaction")
_PLACEHOLDER = re.compile(r"\{(\w*)\}")


class BadRuleError(Exception):
    """The rule cannot be followed. The text says why, without the config's values."""


def _known_placeholders(text: str) -> str:
    for name in _PLACEHOLDER.findall(text):
        if name not in _FIELDS:
            raise ValueError(f"there is no placeholder of that name; there are {', '.join(_FIELDS)}")
    return text


Template = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_known_placeholders)]
"""Text with placeholders {message_id}, {user_id}, {chat_id} and {reaction}, which take the reaction's values."""


class Config(BaseModel):
    """The config fields of every rule. An action adds its own; unknown fields are ignored."""

    model_config = ConfigDict(frozen=True, hide_input_in_errors=True)

    trigger_emoji: str
    action_type: str


@dataclass(frozen=True, slots=True)
class Context:
    """One reaction that a rule applies to. ``schema`` is that of the outbox."""

    connection: psycopg.AsyncConnection
    reaction: ReactionRow
    rule_id: str
    schema: str

    def fill(self, template: str) -> str:
        return _PLACEHOLDER.sub(lambda match: getattr(self.reaction, match[1]) or "", template)

    async def send(self, chat_id: str | None, text: str) -> None:
        """Send a message after the commit, at least once. Without a chat nothing is sent."""
        if chat_id is not None:
            publish = sql.SQL("SELECT {}(%s::text, %s::text, 'INSERT'::text, %s::jsonb)").format(
                sql.Identifier(self.schema, "publish_change")
            )
            message = Outgoing(chat_id=chat_id, text=text)
            await self.connection.execute(publish, [OUTGOING, chat_id, Jsonb(message.model_dump())])


Perform = Callable[[Context, Any], Awaitable[None]]


class Actions:
    """Actions by name.

    >>> actions = standard("...")
    >>> class Pin(Config):
    ...     board: str
    >>> @actions.register("pin", Pin)
    ... async def pin(context: Context, config: Pin) -> None: ...
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[type[Config], Perform]] = {}

    def register(self, action_type: str, config: type[Config] = Config) -> Callable[[Perform], Perform]:
        """Declare an action and the model of its rules' config. A second action of the same name replaces the first."""

        def declare(perform: Perform) -> Perform:
            self._known[action_type] = (config, perform)
            return perform

        return declare

    def read(self, config: Mapping[str, Any]) -> tuple[Config, Perform]:
        """A rule's config, validated, and the function that carries it out. Raises BadRuleError."""
        kind, perform = self._known.get(str(config.get("action_type")), (None, None))
        if kind is None or perform is None:
            raise BadRuleError(f"its action_type is none of {', '.join(sorted(self._known))}")
        try:
            return kind.model_validate(config), perform
        except ValidationError as invalid:
            found = invalid.errors(include_url=False, include_input=False, include_context=False)
            said = (f"{'.'.join(map(str, each['loc']))}: {each['msg'].removeprefix('Value error, ')}" for each in found)
            raise BadRuleError("; ".join(said)) from None


class CreateTask(Config):
    title: Template = "Follow up on {message_id}"


class SendHelp(Config):
    text: Template | None = None


class Notify(Config):
    text: Template = "{user_id} reacted with {reaction}"
    chat_id: str | None = Field(None, min_length=1)


_CREATE_TASK = """
INSERT INTO cortex_projects.tasks (title, user_id, room_id, reaction_id, rule_id) VALUES (%s, %s, %s, %s, %s)
ON CONFLICT (reaction_id, rule_id) DO NOTHING
"""


def standard(help_text: str) -> Actions:
    """The documented actions: create_task, send_help_message, notify."""
    actions = Actions()

    @actions.register("create_task", CreateTask)
    async def create_task(context: Context, config: CreateTask) -> None:
        reaction = context.reaction
        task = [context.fill(config.title), reaction.user_id, reaction.chat_id, reaction.id, context.rule_id]
        await context.connection.execute(_CREATE_TASK, task)

    @actions.register("send_help_message", SendHelp)
    async def send_help_message(context: Context, config: SendHelp) -> None:
        await context.send(context.reaction.chat_id, context.fill(config.text) if config.text else help_text)

    @actions.register("notify", Notify)
    async def notify(context: Context, config: Notify) -> None:
        await context.send(config.chat_id or context.reaction.chat_id, context.fill(config.text))

    return actions
