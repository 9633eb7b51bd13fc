"""Whether who may decide about changes may also do what goes with it: see failed attempts, and be recorded."""

from __future__ import annotations

import psycopg
from psycopg import sql

from cdc.diagnostics.facts import Operators
from cdc.postgres.grants import ACTION

# Who may mark changes by hand, or pause, as somebody has granted it, and what else such a role lacks. The role of
# a consumer, which owns shards, decides nothing. An outbox of an older version has fewer tables.
_OPERATORS = """
    WITH outbox AS (
      SELECT c.relnamespace AS schema, c.relowner AS owner FROM pg_catalog.pg_class c
        JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
       WHERE n.nspname = %(schema)s AND c.relname = 'entity_changes'
    ), granted AS (
      SELECT c.relname, a.grantee, a.privilege_type
        FROM outbox o JOIN pg_catalog.pg_class c ON c.relnamespace = o.schema
        LEFT JOIN pg_catalog.pg_attribute t ON t.attrelid = c.oid AND t.attnum > 0
       CROSS JOIN LATERAL (SELECT * FROM pg_catalog.aclexplode(c.relacl)
                           UNION ALL SELECT * FROM pg_catalog.aclexplode(t.attacl)) a
       WHERE c.relname IN ('entity_changes', 'cdc_controls') AND a.grantee <> o.owner
    ), operator AS (
      SELECT r.oid, r.rolname::text AS role, bool_or(g.relname = 'cdc_controls') AS pauses
        FROM granted g JOIN pg_catalog.pg_roles r ON r.oid = g.grantee AND NOT r.rolsuper
       WHERE (g.relname = 'cdc_controls' AND g.privilege_type = 'INSERT'
           OR g.relname = 'entity_changes' AND g.privilege_type = 'UPDATE')
         AND NOT EXISTS (SELECT FROM pg_catalog.pg_class s, outbox o WHERE s.relnamespace = o.schema
                            AND s.relname = 'cdc_shards' AND has_table_privilege(r.oid, s.oid, 'INSERT'))
       GROUP BY r.oid, r.rolname
    )
    SELECT p.role,
      ARRAY(
        SELECT format('SELECT ON %%I.%%I', %(schema)s::text, k.relname) FROM pg_catalog.pg_class k, outbox o
         WHERE k.relnamespace = o.schema AND NOT has_table_privilege(p.oid, k.oid, 'SELECT')
           AND (k.relname IN ('cdc_actions', 'change_attempts', 'cdc_controls')
             OR k.relname = 'cdc_limit_leases' AND p.pauses)
         UNION ALL
        SELECT format('INSERT (%%s) ON %%I.%%I', string_agg(a.attname, ', ' ORDER BY a.attnum),
                      %(schema)s::text, k.relname)
          FROM pg_catalog.pg_class k JOIN outbox o ON k.relnamespace = o.schema
          JOIN pg_catalog.pg_attribute a ON a.attrelid = k.oid AND a.attname = ANY (%(action)s)
         WHERE k.relname = 'cdc_actions' AND NOT has_column_privilege(p.oid, k.oid, a.attnum, 'INSERT')
         GROUP BY k.relname
         UNION ALL
        SELECT format('DELETE ON %%I.%%I', %(schema)s::text, k.relname) FROM pg_catalog.pg_class k, outbox o
         WHERE k.relnamespace = o.schema AND k.relname = 'cdc_controls' AND p.pauses
           AND NOT has_table_privilege(p.oid, k.oid, 'DELETE')
         ORDER BY 1) AS lacks
      FROM operator p ORDER BY p.role
"""


def operators(connection: psycopg.Connection, name: str) -> Operators:
    found = connection.execute(_OPERATORS, {"schema": name, "action": list(ACTION)}).fetchall()
    return Operators(
        tuple(role for role, _ in found),
        tuple(
            (role, tuple(f"GRANT {right} TO {sql.Identifier(role).as_string()};" for right in lacks))
            for role, lacks in found
            if lacks
        ),
    )
