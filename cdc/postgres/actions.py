"""The log of what operators do: a row in the very transaction of the deed, so that there is neither without the other.

What the server knows (role, login, time) is the server's own; what the session says of itself (a person, the way) is
beside it. A role that acts may add rows, and change or remove none. A command of many transactions writes a row in
each, and is read as one.

A row names changes by their numbers, or the filters that found them. It holds nothing of a document.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Any
from uuid import UUID, uuid4

import psycopg
from psycopg import errors
from psycopg.rows import class_row
from psycopg.types.json import Jsonb

from cdc.core.errors import SchemaError
from cdc.postgres.sql_files import load

BECAUSE_BYTES = 2_000
"""Of a reason, as the table has it."""
KEPT_S = 400 * 86_400.0
"""An action stays for so long at least; longer where processed changes do."""
_NAME_BYTES = 200
_TEXT_MAX = 500
_NAMED_MAX = 100
"""Characters of a value in a target, and changes that are named in one."""
_LOCK = 0x63646304
"""First key of the lock held by who claims a command; the second is a hash of it."""
_SCAN = 20_000
_RECORDED = "; what an operator does is recorded, or is not done"
_PRUNED = 1_000


@dataclass(frozen=True, slots=True)
class Actor:
    """Who acts, by which way (a program of ours), and why: as they say it. ``command``: what they do in one go."""

    person: str = ""
    via: str = "python"
    because: str | None = None
    command: UUID = field(default_factory=uuid4)


@dataclass(frozen=True, slots=True)
class Action:
    """A command that has been carried out, or a part of it. ``count``: the changes, or other things, it was done to."""

    id: int
    command: UUID
    at: datetime
    ended_at: datetime
    role: str
    login: str
    person: str
    via: str
    action: str
    target: dict[str, Any]
    because: str | None
    count: int

    @property
    def described(self) -> str:
        """Its target in one line."""
        return ", ".join(f"{name} {_shown(value)}" for name, value in self.target.items())


@contextmanager
def explained(schema: str, what: str, more: str = "") -> Iterator[None]:
    """What an operator lacks, as SchemaError: the table of ``what``, or a right. ``more``: what the right is for."""
    option = "" if schema == "public" else f" --schema {schema}"
    try:
        yield
    except (errors.UndefinedTable, errors.UndefinedColumn, errors.InvalidSchemaName):
        raise SchemaError(
            f"schema {schema} has no table of {what}", hint=f"cdc db install{option}, or cdc db upgrade{option}"
        ) from None
    except errors.InsufficientPrivilege as refused:
        raise SchemaError(
            f"the role may not: {refused.diag.message_primary}", hint=f"cdc db grant{option} --operator ROLE{more}"
        ) from None


class ActionLog:
    """The statements for the outbox in ``schema``; what ``actor`` does is recorded."""

    def __init__(self, schema: str, actor: Actor | None = None) -> None:
        self._explained = partial(explained, schema, "what operators do, so nothing is done", _RECORDED)
        self._actor = actor or Actor()
        self._statements = load("actions.sql", schema)

    def record(
        self,
        connection: psycopg.Connection,
        action: str,
        target: Mapping[str, Any],
        count: int = 1,
        *,
        actor: Actor | None = None,
    ) -> None:
        """Within the transaction of the deed. Nothing is recorded of what was done to nothing.

        Raises SchemaError, and the deed is undone, where it cannot be recorded.
        """
        if not count:
            return
        who = actor or self._actor
        row = {
            "command": who.command, "person": _cut(who.person, _NAME_BYTES), "via": who.via, "action": action,
            "target": Jsonb(_bounded(target)), "because": _cut(who.because, BECAUSE_BYTES), "count": count,
        }  # fmt: skip
        with self._explained():
            connection.execute(self._statements["record"], row)

    def latest(
        self, connection: psycopg.Connection, limit: int, *, before: int | None = None, scan: int = _SCAN
    ) -> list[Action]:
        """The latest first. ``before``: the ``id`` of the last one of the page before."""
        with (
            self._explained(),
            connection.cursor(row_factory=class_row(Action)) as cursor,
        ):
            given = {"limit": limit, "before": before, "scan": scan}
            return cursor.execute(self._statements["latest"], given).fetchall()

    def claim(self, connection: psycopg.Connection) -> bool:
        """Whether the actor's command is still to be carried out. Another session that claims it waits for this one."""
        given = {"lock": _LOCK, "command": self._actor.command, "scan": _SCAN}
        with self._explained():
            connection.execute(self._statements["claim"], given)
            return not connection.execute(self._statements["has"], given).fetchall()

    def prune(self, connection: psycopg.Connection, older_than_s: float) -> Iterator[int]:
        """Remove what is that old, a thousand in a transaction; yields how many. None where there is no such table."""
        removed = _PRUNED
        while removed == _PRUNED:
            with connection.transaction():
                removed = connection.execute(self._statements["prune"], _old(older_than_s)).rowcount
            yield removed

    async def prune_batch(self, connection: psycopg.AsyncConnection, older_than_s: float) -> int:
        cursor = await connection.execute(self._statements["prune"], _old(older_than_s))
        return cursor.rowcount


def named(seqs: Sequence[int]) -> dict[str, Any]:
    """The target of a decision about changes that were named."""
    return {"changes": list(seqs[:_NAMED_MAX]), **({"of": len(seqs)} if len(seqs) > _NAMED_MAX else {})}


def _shown(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _old(older_than_s: float) -> dict[str, Any]:
    return {"limit": _PRUNED, "older_than_s": max(older_than_s, KEPT_S)}


def _bounded(target: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value[:_TEXT_MAX].replace("\0", "") if isinstance(value, str) else value
        for name, value in target.items()
        if value is not None
    }


def _cut(text: str | None, size: int) -> str | None:
    """At most so many bytes of it, between characters."""
    return None if text is None else text.replace("\0", "").encode(errors="replace")[:size].decode(errors="ignore")
