"""The rules in "actionRules": which apply to a reaction, and which are invalid."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import sql

from cdc.contrib.whatsapp.actions import Actions, BadRuleError, Config, Context, Perform

log = logging.getLogger(__name__)

_MATCHING = """
SELECT id::text, config FROM {rules}
WHERE rule_type = 'simple_action' AND config ->> 'trigger_emoji' = ANY (%s) AND active
ORDER BY id
"""
_REPORTED_MAX = 1_000


@dataclass(frozen=True, slots=True)
class Rule:
    id: str
    config: Config
    perform: Perform

    async def follow(self, context: Context) -> None:
        await self.perform(context, self.config)


class Rules:
    """The table in ``schema``, read again for each batch of reactions: a rule applies from the moment it is stored."""

    def __init__(self, schema: str, actions: Actions) -> None:
        self._matching = sql.SQL(_MATCHING).format(rules=sql.Identifier(schema, "actionRules"))
        self._actions = actions
        self._reported: dict[str, str] = {}

    async def meant_by(self, emojis: Collection[str], connection: psycopg.AsyncConnection) -> dict[str, list[Rule]]:
        """The active rules of each of these emojis, in the order of their ids."""
        meant: dict[str, list[Rule]] = {emoji: [] for emoji in emojis}
        cursor = await connection.execute(self._matching, [list(meant)])
        for rule_id, config in await cursor.fetchall():
            if rule := self._read(rule_id, config):
                meant[rule.config.trigger_emoji].append(rule)
        return meant

    def _read(self, rule_id: str, config: dict[str, Any]) -> Rule | None:
        try:
            rule = Rule(rule_id, *self._actions.read(config))
        except BadRuleError as bad:
            self._report(rule_id, str(bad))
            return None
        self._reported.pop(rule_id, None)
        return rule

    def _report(self, rule_id: str, problem: str) -> None:
        """Log a bad rule once, not with each reaction; again when its fault changes, or after it was good."""
        if self._reported.get(rule_id) != problem:
            if len(self._reported) >= _REPORTED_MAX:
                self._reported.clear()
            self._reported[rule_id] = problem
            log.error("rule %s is left out: %s", rule_id, problem)
