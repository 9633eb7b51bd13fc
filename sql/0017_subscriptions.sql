-- Subscriptions: readers of the outbox beside the default one, each with progress of its own. Safe to run again; takes no
-- lock that a writer or a consumer waits for.
--
-- The columns of entity_changes are the progress of the default subscription, which has no row here. That of the others
-- is kept beside the changes, so that neither a writer nor the default one pays for them. A change of a shard is, for a
-- subscription, the first of these that is true:
--
--   dead, waiting     its row in cdc_subscription_changes says so: dead_at, else next_attempt_at
--   done              it has a row there that says neither, or its number is not above the position of its shard
--   fresh             else
--
-- So what is done everywhere leaves nothing behind: a row that says done goes when the position passes it.

CREATE TABLE IF NOT EXISTS @schema@.cdc_subscriptions (
  -- Never used again after a drop: what a consumer of the former one still writes is nobody's.
  subscription smallint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  name text NOT NULL UNIQUE,
  -- NULL: all. Changes of other types are nothing to it.
  types text[],
  created_at timestamptz NOT NULL DEFAULT pg_catalog.now(),
  created_from text NOT NULL DEFAULT 'beginning',
  paused_at timestamptz,
  paused_because text
);
REVOKE ALL ON TABLE @schema@.cdc_subscriptions FROM PUBLIC;
REVOKE ALL ON SEQUENCE @schema@.cdc_subscriptions_subscription_seq FROM PUBLIC;
COMMENT ON TABLE @schema@.cdc_subscriptions IS 'readers of the outbox beside the default one';

-- A row for each of the 64 shards, from its creation to its drop.
CREATE TABLE IF NOT EXISTS @schema@.cdc_positions (
  subscription smallint NOT NULL,
  shard smallint NOT NULL,
  -- Every change of the shard up to here is done or has a row in cdc_subscription_changes, and no transaction will bring
  -- another one.
  seq bigint NOT NULL,
  -- The next position, once every transaction below this id has ended.
  candidate bigint,
  candidate_xid xid8,
  -- As in cdc_shards: who owns the shard, or has died with it.
  owner uuid,
  owned_since timestamptz,
  PRIMARY KEY (subscription, shard)
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000);
REVOKE ALL ON TABLE @schema@.cdc_positions FROM PUBLIC;
COMMENT ON TABLE @schema@.cdc_positions IS 'how far each subscription is, by shard';

-- The order of the columns and their number keep a row that says done at 44 bytes: up to eight of them fit into its head.
-- The key has no shard in front: numbers come in their order, so its pages are full, and an entry takes 32 bytes instead of 50.
CREATE TABLE IF NOT EXISTS @schema@.cdc_subscription_changes (
  seq bigint NOT NULL,
  subscription smallint NOT NULL,
  shard smallint NOT NULL,
  -- As in entity_changes. '-infinity': its start was recorded, after a crash.
  next_attempt_at timestamptz,
  dead_at timestamptz,
  -- Hashes of its type and of its key, where it waits or is dead.
  type_hash bigint,
  key_hash bigint,
  -- What was tried: {"count": failed attempts, "error": "...", "summary": "...", "started_by": "..."}.
  tried jsonb,
  PRIMARY KEY (subscription, seq)
);
-- What is done comes and goes; what waits or is dead is found by these, and nothing else pays for them. Each is the only
-- one that fits what asks for it, as statistics of a queue are wrong: cdc/postgres/subscription.sql.
ALTER TABLE @schema@.cdc_subscription_changes SET (
  autovacuum_vacuum_scale_factor = 0.02,
  autovacuum_vacuum_threshold = 5000,
  autovacuum_vacuum_insert_scale_factor = 0.2,
  autovacuum_vacuum_cost_limit = 2000
);
CREATE INDEX IF NOT EXISTS cdc_subscription_changes_due ON @schema@.cdc_subscription_changes
  (subscription, type_hash, next_attempt_at) WHERE next_attempt_at IS NOT NULL AND dead_at IS NULL;
CREATE INDEX IF NOT EXISTS cdc_subscription_changes_waiting ON @schema@.cdc_subscription_changes
  (subscription, next_attempt_at) WHERE next_attempt_at <= 'infinity';
CREATE INDEX IF NOT EXISTS cdc_subscription_changes_holding ON @schema@.cdc_subscription_changes
  (key_hash) WHERE next_attempt_at IS NOT NULL;
CREATE INDEX IF NOT EXISTS cdc_subscription_changes_dead ON @schema@.cdc_subscription_changes
  (subscription, dead_at) WHERE dead_at IS NOT NULL;
REVOKE ALL ON TABLE @schema@.cdc_subscription_changes FROM PUBLIC;
COMMENT ON TABLE @schema@.cdc_subscription_changes IS
  'changes that are done ahead of a subscription''s position, wait in it, or are dead in it';

-- Who removes changes must see who is not done with them, and goes on without a new grant.
DO $cdc$
DECLARE
  v_outbox CONSTANT regclass := pg_catalog.format('%I.entity_changes', @schema_literal@)::regclass;
  v_grantee text;
BEGIN
  FOR v_grantee IN
    SELECT pg_catalog.quote_ident(pg_catalog.pg_get_userbyid(a.grantee))
    FROM pg_catalog.pg_class AS c CROSS JOIN LATERAL pg_catalog.aclexplode(c.relacl) AS a
    WHERE c.oid = v_outbox AND a.privilege_type = 'DELETE' AND a.grantee <> 0::oid AND a.grantee <> c.relowner
  LOOP
    EXECUTE pg_catalog.format('GRANT SELECT ON TABLE %1$I.cdc_subscriptions, %1$I.cdc_positions,'
      ' %1$I.cdc_subscription_changes TO %2$s', @schema_literal@, v_grantee);
  END LOOP;
END
$cdc$;
