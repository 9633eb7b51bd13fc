-- Limits of handlers over all consumers. Safe to run again.
-- Locks: ACCESS EXCLUSIVE on cdc_controls for a moment, the first time. Consumers read that each second, writers never.

-- A row with a rate or at_once is no pause, but the limit of a handler.
DO $cdc$
BEGIN
  IF NOT EXISTS (
    SELECT FROM pg_catalog.pg_attribute
    WHERE attrelid = pg_catalog.format('%I.cdc_controls', @schema_literal@)::regclass AND attname = 'rate' AND NOT attisdropped
  ) THEN
    ALTER TABLE @schema@.cdc_controls
      ADD COLUMN rate text,
      ADD COLUMN burst integer,
      ADD COLUMN at_once integer,
      ADD COLUMN by_path text,
      ADD CONSTRAINT cdc_controls_limit CHECK (
        rate IS NULL AND at_once IS NULL AND burst IS NULL AND by_path IS NULL
        OR coalesce(rate, at_once::text) IS NOT NULL AND handler IS NOT NULL AND entity_type IS NULL AND entity_id IS NULL
           AND pg_catalog.octet_length(pg_catalog.concat(rate, by_path)) <= 1000);
  END IF;
END
$cdc$;

CREATE TABLE IF NOT EXISTS @schema@.cdc_limit_leases (
  subscription text NOT NULL,
  handler text NOT NULL,
  -- What the limit is by; empty: all is one.
  key text NOT NULL,
  -- By consumer: [permits, slots, wants, when it asked in seconds, for how long a permit rests, ...].
  leases jsonb NOT NULL,
  -- From then on nothing of it is in use.
  idle_at timestamptz NOT NULL,
  PRIMARY KEY (subscription, handler, key)
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);
REVOKE ALL ON TABLE @schema@.cdc_limit_leases FROM PUBLIC;
COMMENT ON TABLE @schema@.cdc_limit_leases IS 'what consumers have leased of the limits of handlers';

-- Consumers lease, and go on without a new grant: they are those who mark changes.
DO $cdc$
DECLARE
  v_outbox CONSTANT regclass := pg_catalog.format('%I.entity_changes', @schema_literal@)::regclass;
  v_grantee text;
BEGIN
  FOR v_grantee IN
    SELECT DISTINCT pg_catalog.quote_ident(pg_catalog.pg_get_userbyid(a.grantee))
    FROM pg_catalog.pg_class AS c
    JOIN pg_catalog.pg_attribute AS t ON t.attrelid = c.oid AND t.attname = 'error_count'
    CROSS JOIN LATERAL pg_catalog.aclexplode(pg_catalog.array_cat(
      coalesce(c.relacl, ARRAY[]::aclitem[]), coalesce(t.attacl, ARRAY[]::aclitem[]))) AS a
    WHERE c.oid = v_outbox AND a.privilege_type = 'UPDATE' AND a.grantee <> 0::oid AND a.grantee <> c.relowner
  LOOP
    EXECUTE pg_catalog.format('GRANT SELECT, INSERT, UPDATE, DELETE ON TABLE %1$I.cdc_limit_leases TO %2$s',
      @schema_literal@, v_grantee);
  END LOOP;
END
$cdc$;
