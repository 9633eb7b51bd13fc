-- For whom a change is: for one subscription, or for all; and that no change is removed which one still needs. Safe to run
-- again.
-- Locks: ACCESS EXCLUSIVE on entity_changes and on cdc_backfills for a moment, the first time, and on cdc_subscription_changes
-- while its key is made anew, where it is that of an earlier version. No row is written anew. A later run takes SHARE ROW
-- EXCLUSIVE on entity_changes for a moment.
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

-- Retention of this version asks the subscriptions before it removes a change. A DELETE by hand does not, nor does an earlier
-- version; so the server does, once a statement, whoever deletes: cdc/postgres/retention.sql has the same rule. Where there is no
-- subscription it costs one look at an empty table.
CREATE OR REPLACE FUNCTION @schema@.keep_for_subscriptions() RETURNS trigger
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $cdc$
DECLARE
  v_kept record;
BEGIN
  IF NOT EXISTS (SELECT FROM @schema@.cdc_subscriptions) THEN
    RETURN NULL;
  END IF;
  SELECT removed.seq, removed.shard, removed.subscription INTO v_kept
  FROM removed LEFT JOIN (
    SELECT p.shard, min(p.seq) AS seq FROM @schema@.cdc_positions AS p
    WHERE p.subscription = ANY (ARRAY(SELECT s.subscription FROM @schema@.cdc_subscriptions AS s)) GROUP BY p.shard
  ) AS lowest ON lowest.shard = removed.shard
  WHERE CASE WHEN removed.seq > CASE WHEN removed.subscription IS NULL THEN lowest.seq ELSE (
    SELECT p.seq FROM @schema@.cdc_positions AS p WHERE p.subscription = removed.subscription AND p.shard = removed.shard
  ) END THEN true ELSE EXISTS (
    SELECT FROM @schema@.cdc_subscription_changes AS e
    WHERE e.subscription = ANY (ARRAY(SELECT s.subscription FROM @schema@.cdc_subscriptions AS s))
      AND e.shard = removed.shard AND e.seq = removed.seq
    OFFSET 0
  ) END
  LIMIT 1;
  IF FOUND THEN
    RAISE EXCEPTION 'the change % is not removed: the subscription % is not done with it', v_kept.seq, (
        SELECT s.name FROM @schema@.cdc_subscriptions AS s JOIN @schema@.cdc_positions AS p USING (subscription)
        WHERE p.shard = v_kept.shard AND coalesce(v_kept.subscription, s.subscription) = s.subscription
          AND (v_kept.seq > p.seq OR EXISTS (
            SELECT FROM @schema@.cdc_subscription_changes AS e
            WHERE e.subscription = s.subscription AND e.shard = p.shard AND e.seq = v_kept.seq))
        ORDER BY s.name LIMIT 1)
      USING HINT = 'cdc outbox prune removes what all are done with; cdc subscription list says how far each is',
        ERRCODE = 'restrict_violation';
  END IF;
  RETURN NULL;
END
$cdc$;
REVOKE ALL ON FUNCTION @schema@.keep_for_subscriptions() FROM PUBLIC;
CREATE OR REPLACE TRIGGER keep_for_subscriptions AFTER DELETE ON @schema@.entity_changes
  REFERENCING OLD TABLE AS removed FOR EACH STATEMENT EXECUTE FUNCTION @schema@.keep_for_subscriptions();

-- A discard keeps the position of its change where it is, by a lock of its row; of an operator who may discard in a subscription
-- that takes the right to update some column of it.
DO $cdc$
DECLARE
  v_grantee text;
BEGIN
  FOR v_grantee IN
    SELECT DISTINCT pg_catalog.quote_ident(pg_catalog.pg_get_userbyid(a.grantee))
    FROM pg_catalog.pg_class AS c CROSS JOIN LATERAL pg_catalog.aclexplode(c.relacl) AS a
    WHERE c.oid = pg_catalog.format('%I.cdc_subscription_changes', @schema_literal@)::regclass
      AND a.privilege_type = 'UPDATE' AND a.grantee <> 0::oid AND a.grantee <> c.relowner
  LOOP
    EXECUTE pg_catalog.format('GRANT UPDATE (owned_since) ON TABLE %I.cdc_positions TO %s', @schema_literal@, v_grantee);
  END LOOP;
END
$cdc$;

-- What is kept of a change, by its number: see 0017.
DO $cdc$
BEGIN
  IF EXISTS (
    SELECT FROM pg_catalog.pg_constraint AS k
    WHERE k.conrelid = pg_catalog.format('%I.cdc_subscription_changes', @schema_literal@)::regclass AND k.contype = 'p'
      AND k.conname = 'cdc_subscription_changes_pkey' AND pg_catalog.cardinality(k.conkey) = 3
  ) THEN
    ALTER TABLE @schema@.cdc_subscription_changes
      DROP CONSTRAINT cdc_subscription_changes_pkey,
      ADD CONSTRAINT cdc_subscription_changes_pkey PRIMARY KEY (subscription, seq);
  END IF;
END
$cdc$;
