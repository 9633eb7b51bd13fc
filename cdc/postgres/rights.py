"""What the role of a session may do with an outbox, so that nobody is offered what the server would refuse."""

from __future__ import annotations

from dataclasses import dataclass

import psycopg
from psycopg import sql
from psycopg.rows import class_row

# Of a table that is not there nobody may do anything.
_RIGHTS = """
WITH named AS (
  SELECT pg_catalog.to_regclass(pg_catalog.format('%%I.entity_changes', %(schema)s::text))::oid AS changes,
         pg_catalog.to_regclass(pg_catalog.format('%%I.cdc_controls', %(schema)s::text))::oid AS controls,
         pg_catalog.to_regclass(pg_catalog.format('%%I.cdc_backfills', %(schema)s::text))::oid AS backfills,
         pg_catalog.to_regclass(pg_catalog.format('%%I.cdc_subscriptions', %(schema)s::text))::oid AS subscriptions,
         pg_catalog.to_regclass(pg_catalog.format('%%I.cdc_subscription_changes', %(schema)s::text))::oid AS progress,
         pg_catalog.to_regclass(pg_catalog.format('%%I.cdc_actions', %(schema)s::text))::oid AS actions
), held AS (
  SELECT has_any_column_privilege(changes, 'SELECT') AS looks,
         has_table_privilege(changes, 'SELECT') AS payload,
         has_any_column_privilege(changes, 'UPDATE') AS marks, has_any_column_privilege(changes, 'INSERT') AS writes,
         has_table_privilege(controls, 'SELECT') AS controls, has_table_privilege(controls, 'INSERT') AS pauses,
         has_table_privilege(backfills, 'SELECT') AS backfills,
         has_any_column_privilege(backfills, 'UPDATE') AS moves,
         has_table_privilege(subscriptions, 'SELECT') AND has_table_privilege(progress, 'SELECT') AS subscriptions,
         has_table_privilege(progress, 'UPDATE') AS decides_there,
         (SELECT pg_has_role(c.relowner, 'USAGE') FROM pg_catalog.pg_class AS c WHERE c.oid = changes) AS owns,
         has_table_privilege(actions, 'SELECT') AS log, has_any_column_privilege(actions, 'INSERT') AS acts
  FROM named
)
SELECT %(server)s::text AS server, current_user::text AS role, current_database()::text AS database,
       coalesce(looks, false) AS sees_changes, coalesce(payload, false) AS sees_payload,
       coalesce(controls, false) AS sees_pauses, coalesce(backfills, false) AS sees_backfills,
       coalesce(subscriptions, false) AS sees_subscriptions, coalesce(log, false) AS sees_actions,
       coalesce(acts AND marks, false) AS decides, coalesce(acts AND writes, false) AS replays,
       coalesce(acts AND pauses AND controls, false) AS pauses, coalesce(acts AND moves, false) AS moves_backfills,
       coalesce(acts AND decides_there, false) AS decides_there, coalesce(acts AND owns, false) AS drops_subscriptions
FROM held
"""


@dataclass(frozen=True, slots=True)
class RoleRights:
    """``server``: what was connected to. ``decides``: retries and discards; ``decides_there``: those of subscriptions.

    Whoever acts may also record it. ``drops_subscriptions``: with the last one go indexes, which are the
    owner's.
    """

    server: str
    role: str
    database: str
    sees_changes: bool
    sees_payload: bool
    sees_pauses: bool
    sees_backfills: bool
    sees_subscriptions: bool
    sees_actions: bool
    decides: bool
    replays: bool
    pauses: bool
    moves_backfills: bool
    decides_there: bool
    drops_subscriptions: bool


def rights(connection: psycopg.Connection, schema: str) -> RoleRights:
    with connection.cursor(row_factory=class_row(RoleRights)) as cursor:
        found = cursor.execute(sql.SQL(_RIGHTS), {"schema": schema, "server": _server(connection)}).fetchone()
    assert found is not None
    return found


def _server(connection: psycopg.Connection) -> str:
    host, port = connection.info.host, connection.info.port
    return f"port {port} of this machine" if host.startswith(("/", "@")) or not host else f"{host}:{port}"
