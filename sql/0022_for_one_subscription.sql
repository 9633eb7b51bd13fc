-- For whom a change is: for one subscription, or for all. Safe to run again.
-- Locks: ACCESS EXCLUSIVE on entity_changes and on cdc_backfills for a moment, the first time. No row is written anew.
--
-- A replay or a READ that one subscription has asked for is nothing to the others. It is written as processed, which is what
-- the default subscription's columns say of it from the beginning. What is captured is for all, and costs nothing: NULL.

DO $cdc$
DECLARE
  v_right record;
BEGIN
  IF NOT EXISTS (
    SELECT FROM pg_catalog.pg_attribute
    WHERE attrelid = pg_catalog.format('%I.entity_changes', @schema_literal@)::regclass
      AND attname = 'subscription' AND NOT attisdropped
  ) THEN
    ALTER TABLE @schema@.entity_changes ADD COLUMN subscription smallint;
  END IF;
  IF NOT EXISTS (
    SELECT FROM pg_catalog.pg_attribute
    WHERE attrelid = pg_catalog.format('%I.cdc_backfills', @schema_literal@)::regclass
      AND attname = 'subscription_name' AND NOT attisdropped
  ) THEN
    ALTER TABLE @schema@.cdc_backfills
      ADD COLUMN subscription smallint,
      -- As it is called. A number is never given to another one, and a name may be.
      ADD COLUMN subscription_name text;
  END IF;
  -- Who has a right on a column that these stand beside goes on without a new grant.
  FOR v_right IN
    SELECT a.privilege_type, added.columns, r.oid::regclass AS relation, a.is_grantable,
      CASE WHEN a.grantee = 0::oid THEN 'PUBLIC' ELSE pg_catalog.quote_ident(pg_catalog.pg_get_userbyid(a.grantee)) END
        AS grantee
    FROM (VALUES
      ('entity_changes', 'replay_of', 'SELECT', 'subscription'),
      ('cdc_backfills', 'rate', 'INSERT', 'subscription, subscription_name'),
      ('cdc_backfills', 'rate', 'SELECT', 'subscription, subscription_name')
    ) AS added (relation, beside, privilege, columns)
    JOIN pg_catalog.pg_class AS r
      ON r.oid = pg_catalog.format('%I.%I', @schema_literal@, added.relation)::regclass
    JOIN pg_catalog.pg_attribute AS c ON c.attrelid = r.oid AND c.attname = added.beside
    CROSS JOIN LATERAL pg_catalog.aclexplode(c.attacl) AS a
    WHERE a.privilege_type = added.privilege
  LOOP
    EXECUTE pg_catalog.format('GRANT %s (%s) ON TABLE %s TO %s%s', v_right.privilege_type, v_right.columns, v_right.relation,
      v_right.grantee, CASE WHEN v_right.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END);
  END LOOP;
END
$cdc$;
COMMENT ON COLUMN @schema@.entity_changes.subscription IS 'the only subscription that takes this change; NULL: all do';

-- A table has one backfill at a time that is not finished, of each subscription.
CREATE UNIQUE INDEX IF NOT EXISTS cdc_backfills_open ON @schema@.cdc_backfills
  (table_schema, table_name, coalesce(subscription, 0::smallint)) WHERE state = 'running' OR state = 'paused';
DROP INDEX IF EXISTS @schema@.cdc_backfills_unfinished;
