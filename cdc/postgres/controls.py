"""What operators have paused, in the database: set, ended and listed. ``shard_locks`` reads what is in force.

There it is the same for all consumers, survives them, and a grant says who may set it. Consumers ask for it each second
with a statement that they make anyway; the NOTIFY after a decision makes those who listen ask at once. Times are those
of the database's clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime
from typing import Any

import psycopg
from psycopg.rows import dict_row

from cdc.core.errors import NotFoundError, RefusedError, SchemaError
from cdc.core.model import SHARDS
from cdc.core.pauses import PAUSES_MAX, Pause, Pauses
from cdc.core.type_filter import TypeFilter
from cdc.postgres.actions import ActionLog, Actor, explained
from cdc.postgres.admin import bounded, wake
from cdc.postgres.outbox import FIRST_TYPE, TYPES_MAX
from cdc.postgres.sql_files import load

_SCAN_MAX = 200
"""Fresh changes of a shard that are examined in search of one that is not held."""
_NAMED_MAX = 50
_NAME_MAX = 80
"""Of several things that are paused or resumed together: how many the log names, and characters of each."""
_PAUSE = tuple(field.name for field in fields(Pause))


@dataclass(frozen=True, slots=True)
class Control:
    """A pause as it is in the table. ``role``: the session's, beside the name that it gave. ``until``: None: no end."""

    pause: Pause
    role: str
    set_at: datetime
    until: datetime | None


class Controls:
    """The statements for the outbox in ``schema``, on an autocommit connection. What ``actor`` does is recorded."""

    def __init__(self, schema: str, actor: Actor | None = None) -> None:
        self._schema = schema
        self._actor = actor or Actor()
        self._log = ActionLog(schema, self._actor)
        self._statements = load("controls.sql", schema)

    def pause(self, connection: psycopg.Connection, pause: Pause, for_s: float | None = None) -> Control:
        """Pause this, in place of a pause of the same, for so many seconds. Raises RefusedError for too many pauses."""
        with explained(self._schema, "what is paused"):
            with bounded(connection):
                said = {"because": pause.because, "set_by": pause.set_by, "for_s": for_s, "max": PAUSES_MAX}
                row = connection.execute(self._statements["pause"], {**_target(pause), **said}).fetchone()
                if row is None:
                    raise RefusedError(
                        f"there are {PAUSES_MAX} pauses, and no room for more", hint="cdc controls; then cdc resume"
                    )
                who = replace(self._actor, person=pause.set_by, because=pause.because)
                self._log.record(connection, "pause", {**_recorded(pause), "for_s": for_s}, actor=who)
            wake(connection)
        return next(each for each in self.all(connection) if each.pause.id == row[0])

    def pause_keys(self, connection: psycopg.Connection, pauses: Sequence[Pause], for_s: float | None = None) -> int:
        """Pause these keys in one step, as ``pause`` does one; how many. All are of one subscription, by one person.

        Raises RefusedError for too many pauses.
        """
        first = pauses[0]
        given = {
            "types": [each.entity_type for each in pauses], "ids": [each.entity_id for each in pauses],
            "subscription": first.subscription, "because": first.because, "set_by": first.set_by, "for_s": for_s,
            "max": PAUSES_MAX,
        }  # fmt: skip
        with explained(self._schema, "what is paused"):
            with bounded(connection):
                made = connection.execute(self._statements["pause_keys"], given).rowcount
                if not made:
                    raise RefusedError(
                        f"with {len(pauses)} more there would be more than {PAUSES_MAX} pauses",
                        hint="cdc controls; then cdc resume",
                    )
                target = {"subscription": first.subscription, "for_s": for_s, **_named_keys(pauses)}
                who = replace(self._actor, person=first.set_by, because=first.because)
                self._log.record(connection, "pause", target, made, actor=who)
            wake(connection)
        return made

    def resume_these(self, connection: psycopg.Connection, pauses: Sequence[Pause]) -> int:
        """End those of these that nobody has ended; how many. Raises NotFoundError where that is none."""
        with explained(self._schema, "what is paused"):
            with bounded(connection):
                given = {"ids": [each.id for each in pauses]}
                ended = connection.execute(self._statements["resume_these"], given).rowcount
                self._log.record(connection, "resume", {"pauses": [str(each) for each in pauses[:_NAMED_MAX]]}, ended)
            if not ended:
                raise NotFoundError("none of them is paused any more", hint="somebody has ended them: cdc controls")
            wake(connection)
        return ended

    def resume(self, connection: psycopg.Connection, pause: Pause | None) -> list[Control]:
        """End this pause; None: all. Returns what has ended. Raises NotFoundError where there is no such pause."""
        with explained(self._schema, "what is paused"):
            before = {each.pause.id: each for each in self.all(connection)}
            with bounded(connection):
                parameters = {**_target(pause or Pause(0)), "all": pause is None}
                ended = [before.get(id_) for (id_,) in connection.execute(self._statements["resume"], parameters)]
                self._log.record(connection, "resume", _recorded(pause) if pause else {"all": True}, len(ended))
            if not ended and pause is not None:
                others = ", ".join(str(each.pause) for each in list(before.values())[:5])
                raise NotFoundError(
                    f"not paused: {pause}", hint=f"paused: {others} (cdc controls)" if others else "nothing is paused"
                )
            wake(connection)
        return [each for each in ended if each is not None]

    def all(self, connection: psycopg.Connection) -> list[Control]:
        """Those in force, in the order in which they were set. Raises SchemaError where the outbox is too old."""
        with explained(self._schema, "what is paused"), connection.cursor(row_factory=dict_row) as cursor:
            rows = cursor.execute(self._statements["in_force"], {"max": PAUSES_MAX}).fetchall()
        return [
            Control(Pause(**{name: row[name] for name in _PAUSE}), row["role"], row["set_at"], row["until"])
            for row in rows
        ]

    def seen(self, connection: psycopg.Connection) -> list[Control] | None:
        """The same; None where the outbox is of an earlier version, or this role may not see them."""
        try:
            return self.all(connection)
        except SchemaError:
            return None

    def oldest_ready_age_s(self, connection: psycopg.Connection, pauses: Pauses, scope: TypeFilter) -> float:
        """Of the changes in ``scope`` that are not held: how old the oldest is that could run, in seconds; 0: none."""
        if pauses.everything:
            return 0.0
        types, include = scope.within(pauses.going)
        keys = list(pauses.keys)
        parameters: dict[str, Any] = {
            "types": list(types), "among": include, "key_types": [name for name, _ in keys],
            "key_ids": [id_ for _, id_ in keys], "shards": SHARDS, "scan": _SCAN_MAX, "from": FIRST_TYPE,
            "types_max": TYPES_MAX,
        }  # fmt: skip
        row = connection.execute(self._statements["oldest_ready"], parameters).fetchone()
        assert row is not None
        return float(row[0])


def _target(pause: Pause) -> dict[str, str | None]:
    return {
        "subscription": pause.subscription, "entity_type": pause.entity_type, "handler": pause.handler,
        "entity_id": pause.entity_id,
    }  # fmt: skip


def _named_keys(pauses: Sequence[Pause]) -> dict[str, Any]:
    """As the log has them: some, each in few characters."""
    keys = [f"{each.entity_type} {each.entity_id}"[:_NAME_MAX] for each in pauses[:_NAMED_MAX]]
    return {"keys": keys, **({"of": len(pauses)} if len(pauses) > _NAMED_MAX else {})}


def _recorded(pause: Pause) -> dict[str, str | None]:
    """The same under the names that the log has for them."""
    return {
        "subscription": pause.subscription, "type": pause.entity_type, "handler": pause.handler, "key": pause.entity_id,
    }  # fmt: skip
