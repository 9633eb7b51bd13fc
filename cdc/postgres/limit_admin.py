"""What operators limit, in the database: set, ended and listed. ``shard_locks`` reads what is in force."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime

import psycopg
from psycopg import errors
from psycopg.rows import class_row, dict_row

from cdc.core.errors import NotFoundError, RefusedError
from cdc.core.limits import LEASE_S, Limit, LimitSetting
from cdc.core.pauses import PAUSES_MAX
from cdc.postgres.actions import ActionLog, Actor, explained
from cdc.postgres.admin import bounded, wake
from cdc.postgres.sql_files import load

_LEASES_READ = 500
"""Rows of leases; each has an entry for each consumer."""


@dataclass(frozen=True, slots=True)
class SetLimit:
    """A limit as it is in the table. ``role``: the session's, beside the name that it gave."""

    setting: LimitSetting
    role: str
    set_at: datetime


@dataclass(frozen=True, slots=True)
class LimitInUse:
    """What the consumers of a handler have leased now, of so many ``keys``. ``permits_of_key`` and ``slots_of_key``:
    all there are, for each key; 0: there are none. ``wants``: calls that they could make."""

    subscription: str
    handler: str
    keys: int
    consumers: int
    permits: int
    permits_of_key: int
    slots: int
    slots_of_key: int
    wants: int


class LimitAdmin:
    """The statements for the outbox in ``schema``, on an autocommit connection. What ``actor`` does is recorded."""

    def __init__(self, schema: str, actor: Actor | None = None) -> None:
        self._schema = schema
        self._actor = actor or Actor()
        self._log = ActionLog(schema, self._actor)
        self._statements = load("limits.sql", schema)

    def set(self, connection: psycopg.Connection, setting: LimitSetting) -> SetLimit:
        """Set it in place of another one of the handler. Raises RefusedError for too many rows."""
        limit = setting.limit
        given = {
            "subscription": setting.subscription, "handler": setting.handler, "because": setting.because,
            "set_by": setting.set_by, "rate": limit.rate, "burst": limit.burst, "at_once": limit.at_once,
            "by_path": limit.by, "max": PAUSES_MAX,
        }  # fmt: skip
        with explained(self._schema, "limits"):
            with bounded(connection):
                row = connection.execute(self._statements["set"], given).fetchone()
                if row is None:
                    raise RefusedError(
                        f"there are {PAUSES_MAX} pauses and limits, and no room for more", hint="cdc controls"
                    )
                who = replace(self._actor, person=setting.set_by, because=setting.because)
                target = {"handler": setting.handler, "subscription": setting.subscription, "limit": str(limit)}
                self._log.record(connection, "limit", target, actor=who)
            wake(connection)
        return next(each for each in self.all(connection) if each.setting.id == row[0])

    def clear(self, connection: psycopg.Connection, handler: str | None, subscription: str | None) -> list[SetLimit]:
        """Those that are set no more; None: all. What the code declares holds again. Raises NotFoundError."""
        with explained(self._schema, "limits"):
            before = {each.setting.id: each for each in self.all(connection)}
            given = {"handler": handler, "subscription": subscription, "all": handler is None}
            with bounded(connection):
                ended = [before.get(id_) for (id_,) in connection.execute(self._statements["clear"], given)]
                target = {"handler": handler, "subscription": subscription} if handler else {"all": True}
                self._log.record(connection, "clear limit", target, len(ended))
            if not ended and handler is not None:
                raise NotFoundError(f"no limit of {handler} is set", hint="cdc limits list; one in the code stays")
            wake(connection)
        return [each for each in ended if each is not None]

    def all(self, connection: psycopg.Connection) -> list[SetLimit]:
        """Those that are set, in that order. Raises SchemaError where the outbox is too old."""
        with explained(self._schema, "limits"), connection.cursor(row_factory=dict_row) as cursor:
            rows = cursor.execute(self._statements["all"], {"max": PAUSES_MAX}).fetchall()
        return [
            SetLimit(
                LimitSetting(
                    row["id"], row["handler"], Limit(row["rate"], row["burst"], row["at_once"], row["by_path"]),
                    row["subscription"], row["because"], row["set_by"],
                ), row["role"], row["set_at"],
            ) for row in rows
        ]  # fmt: skip

    def in_use(self, connection: psycopg.Connection) -> list[LimitInUse] | None:
        """Also of limits in the code. None where the outbox is of an earlier version, or the role may not see it."""
        try:
            with bounded(connection), connection.cursor(row_factory=class_row(LimitInUse)) as cursor:
                return cursor.execute(self._statements["in_use"], {"max": _LEASES_READ, "lease_s": LEASE_S}).fetchall()
        except (errors.UndefinedTable, errors.InsufficientPrivilege):
            return None
