"""The documented test script against a live installation: one reaction goes all the way, and everything is removed.

The rows written are for the user and the chat ``cdc-smoke``, with an emoji whose active rules only create tasks; the
task's notification goes to that chat. The steps that are observed from outside:

    captured    the change is in the outbox, in the very transaction that wrote the reaction
    woken       the slot's reader has confirmed WAL beyond that transaction's commit
    processed   the change is marked
    task        a task names the reaction
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, LiteralString
from uuid import UUID, uuid4

import psycopg
from psycopg import errors, sql

from cdc.core.errors import NotFoundError, SchemaError
from cdc.core.model import SHARDS
from cdc.postgres.shard_locks import members
from cdc.postgres.sql_files import load

NAME = "cdc-smoke"
"""The name of the user and the chat, and the beginning of the reaction's id."""

_AFTER_CAPTURE = ("woken", "processed", "task")
_POLL_INTERVAL_S = 0.02
_TABLES = (
    (None, "entity_changes"), (None, "whatsapp_message_reactions"), (None, "actionRules"), ("cortex_projects", "tasks"),
)  # fmt: skip
"""None: the schema of the outbox."""
_MISSING = "SELECT to_regclass(quote_ident(%s) || '.' || quote_ident(%s)) IS NULL"

_EMOJI = """
SELECT config ->> 'trigger_emoji' FROM {rules} WHERE active AND rule_type = 'simple_action'
GROUP BY 1 HAVING bool_and(config ->> 'action_type' = 'create_task') ORDER BY min(id::text) LIMIT 1
"""
_INSERT = "INSERT INTO {reactions} (id, message_id, reaction, user_id, chat_id) VALUES (%s, %s, %s, %s, %s)"
_SLOT = (
    "SELECT active, coalesce(confirmed_flush_lsn >= %s::pg_lsn, false) FROM pg_replication_slots WHERE slot_name = %s"
)
_TASKS = "SELECT id::text FROM cortex_projects.tasks WHERE reaction_id = %s"


@dataclass(frozen=True, slots=True)
class SmokeStep:
    """``ok`` of None: it cannot be observed, and that is no fault. ``after_s``: since the commit; None: not in time."""

    name: str
    ok: bool | None
    after_s: float | None
    detail: str


class Smoke:
    """``run`` once, then ``clean_up``, whatever the result. ``connection`` is autocommit, of the tables' owner."""

    def __init__(self, connection: psycopg.Connection, schema: str, *, slot: str, timeout_s: float) -> None:
        self._connection = connection
        self._schema = schema
        self._slot = slot
        self._timeout_s = timeout_s
        self._statements = load("contrib/whatsapp/smoke.sql", schema)
        self._reactions = sql.Identifier(schema, "whatsapp_message_reactions")
        self._key = f"{NAME}-{uuid4()}"
        self._id: UUID | None = None
        self._after = 0
        self._began: datetime | None = None
        self._wrote = False
        self._committed = 0.0

    def emoji(self) -> str:
        """An emoji whose active rules create tasks and nothing else. Raises SchemaError, NotFoundError."""
        for schema, table in ((name or self._schema, table) for name, table in _TABLES):
            if self._row(_MISSING, [schema, table])[0]:
                raise SchemaError(f"there is no table {schema}.{table}", hint="run: cdc db install --with whatsapp")
        rules = sql.Identifier(self._schema, "actionRules")
        found = self._connection.execute(sql.SQL(_EMOJI).format(rules=rules)).fetchone()
        if found is None:
            raise NotFoundError(
                "no emoji has active rules that create tasks and do nothing else",
                hint='add such a rule to "actionRules", or name an emoji with --emoji: what its rules say is sent',
            )
        return str(found[0])

    def no_consumer_works(self) -> bool:
        """Whether no consumer is running."""
        return not members(self._connection, self._schema)

    def run(self, emoji: str) -> list[SmokeStep]:
        """Write the reaction and watch it. Raises SchemaError where the database refuses the row."""
        try:
            table, lsn, stored_s = self._write(emoji)
        except (errors.ProgrammingError, errors.IntegrityError) as refused:
            raise SchemaError(
                f"the test reaction cannot be written: {refused.diag.message_primary}",
                hint="run as the owner of the tables; cdc db install --with whatsapp makes them",
            ) from None
        if self._id is None:
            missing = SmokeStep("captured", False, None, f"no trigger on {table} wrote a change")
            return [missing, *(SmokeStep(name, False, None, "nothing was captured") for name in _AFTER_CAPTURE)]
        how = f"in the transaction of the reaction, stored in {stored_s * 1000:.0f} ms"
        return [SmokeStep("captured", True, 0.0, how), *self._watch(lsn)]

    def _write(self, emoji: str) -> tuple[str, str, float]:
        """The table, the end of the WAL after the commit, and the seconds that the write took."""
        table = self._reactions.as_string()
        self._began, self._after = self._row("SELECT now()")[0], self._ask("last_seq")[0]
        began = time.monotonic()
        with self._connection.transaction():
            self._wrote = True
            insert = sql.SQL(_INSERT).format(reactions=self._reactions)
            self._connection.execute(insert, [self._key, NAME, emoji, NAME, NAME])
            parameters = {"shards": SHARDS, "after": self._after, "entity_id": self._key}
            found = self._connection.execute(self._statements["captured"], parameters).fetchone()
            self._id = found[0] if found else None
        self._committed = time.monotonic()
        [lsn] = self._row("SELECT pg_current_wal_flush_lsn()")
        return table, str(lsn), self._committed - began

    def _watch(self, lsn: str) -> list[SmokeStep]:
        """Poll until every step is seen, or time is up; each step with the time at which it was first seen."""
        seen: dict[str, float] = {}
        state, slot = "fresh", (False, False)
        looks: dict[str, Callable[[], bool]] = {
            "woken": lambda: slot[1],
            "processed": lambda: state == "processed",
            "task": lambda: bool(self._tasks()),
        }
        pause = threading.Event()
        while (after_s := time.monotonic() - self._committed) < self._timeout_s and len(seen) < len(looks):
            slot = self._connection.execute(_SLOT, [lsn, self._slot]).fetchone() or (False, False)
            [state] = self._ask("state", id=self._id)
            for name, look in looks.items():
                if name not in seen and look():
                    seen[name] = after_s
            if not slot[0] and "processed" in seen and "task" in seen:
                break  # no consumer reads the slot, so "woken" will not be seen
            pause.wait(_POLL_INTERVAL_S)
        return [self._woken(seen, active=slot[0]), *_ends(seen, state, self._timeout_s)]

    def _woken(self, seen: dict[str, float], *, active: bool) -> SmokeStep:
        if "woken" in seen:
            return SmokeStep(
                "woken", True, seen["woken"], f"the reader of the slot {self._slot} has confirmed the commit"
            )
        if active:
            return SmokeStep("woken", False, None, f"the reader of the slot {self._slot} has not confirmed the commit")
        no_reader = f"no consumer reads the slot {self._slot}"
        if "processed" in seen:
            return SmokeStep("woken", None, None, f"{no_reader}: a sweep has found the change")
        return SmokeStep("woken", False, None, no_reader)

    def clean_up(self) -> int:
        """Remove the reaction, its tasks and all their changes; returns the number of changes.

        Waits for the task's change to be settled, within the same time limit as the steps.
        """
        if not self._wrote:
            return 0
        self._until_quiet()
        with self._connection.transaction():
            self._connection.execute("SELECT set_config('lock_timeout', '10s', true)")
            tasks = self._tasks()
            self._connection.execute("DELETE FROM cortex_projects.tasks WHERE reaction_id = %s", [self._key])
            delete = sql.SQL("DELETE FROM {} WHERE id = %s").format(self._reactions)
            self._connection.execute(delete, [self._key])
            ids = [id_ for id_, _ in self._ours(tasks)]
            return self._connection.execute(self._statements["remove"], {"ids": ids}).rowcount

    def _until_quiet(self) -> None:
        deadline, pause = time.monotonic() + self._timeout_s, threading.Event()
        while any(not settled for _, settled in self._ours(self._tasks())):
            # Without a consumer there is nothing to wait for.
            if time.monotonic() > deadline or (self._id and self._ask("state", id=self._id)[0] == "fresh"):
                return
            pause.wait(_POLL_INTERVAL_S)

    def _ours(self, tasks: list[str]) -> list[tuple[UUID, bool]]:
        parameters = {
            "shards": SHARDS, "after": self._after, "began": self._began, "id": self._id, "entity_id": self._key,
            "tasks": tasks,
        }  # fmt: skip
        return self._connection.execute(self._statements["ours"], parameters).fetchall()

    def _tasks(self) -> list[str]:
        return [id_ for (id_,) in self._connection.execute(_TASKS, [self._key])]

    def _ask(self, name: str, **parameters: object) -> tuple[Any, ...]:
        row = self._connection.execute(self._statements[name], parameters).fetchone()
        return row if row is not None else ("gone",)

    def _row(self, query: LiteralString, parameters: list[object] | None = None) -> tuple[Any, ...]:
        row = self._connection.execute(query, parameters).fetchone()
        assert row is not None
        return row


def _ends(seen: dict[str, float], state: str, timeout_s: float) -> list[SmokeStep]:
    steps = []
    for name, done, missing in (
        ("processed", "the change is marked", f"after {timeout_s:g} s the change is {state}"),
        ("task", "there is a task for the reaction", f"after {timeout_s:g} s there is no task for the reaction"),
    ):
        there = name in seen
        steps.append(SmokeStep(name, there, seen.get(name), done if there else missing))
    return steps
