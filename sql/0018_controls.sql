-- What operators have paused. Safe to run again; takes no lock that a writer or a consumer waits for.
--
-- A consumer reads what is in force each second, with its poll of the shards. A row whose time is over is nothing, and the
-- next pause removes it.

CREATE TABLE IF NOT EXISTS @schema@.cdc_controls (
  -- A new one for each decision: by these numbers a consumer knows that something has changed.
  id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  -- What is paused. NULL: whatever it is; all four: everything.
  subscription text,
  entity_type text,
  handler text,
  entity_id text,
  because text NOT NULL,
  set_by text NOT NULL,
  role name NOT NULL DEFAULT SESSION_USER,
  set_at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
  -- NULL: until somebody resumes it.
  until timestamptz,
  CONSTRAINT cdc_controls_key CHECK (entity_id IS NULL OR (entity_type IS NOT NULL AND handler IS NULL)),
  CONSTRAINT cdc_controls_because CHECK (because <> '' AND pg_catalog.octet_length(because) <= 2000),
  CONSTRAINT cdc_controls_size CHECK (
    pg_catalog.octet_length(pg_catalog.concat(subscription, entity_type, handler, entity_id, set_by)) <= 4000)
);
REVOKE ALL ON TABLE @schema@.cdc_controls FROM PUBLIC;
REVOKE ALL ON SEQUENCE @schema@.cdc_controls_id_seq FROM PUBLIC;
COMMENT ON TABLE @schema@.cdc_controls IS 'what is paused, by whom, until when and why';

-- Consumers must see what is paused, and go on without a new grant: they are those who mark changes.
DO $cdc$
DECLARE
  v_outbox CONSTANT regclass := pg_catalog.format('%I.entity_changes', @schema_literal@)::regclass;
  v_grantee text;
BEGIN
  FOR v_grantee IN
    SELECT DISTINCT pg_catalog.quote_ident(pg_catalog.pg_get_userbyid(a.grantee))
    FROM pg_catalog.pg_class AS c
    JOIN pg_catalog.pg_attribute AS t ON t.attrelid = c.oid AND t.attname = 'processed'
    CROSS JOIN LATERAL pg_catalog.aclexplode(pg_catalog.array_cat(
      coalesce(c.relacl, ARRAY[]::aclitem[]), coalesce(t.attacl, ARRAY[]::aclitem[]))) AS a
    WHERE c.oid = v_outbox AND a.privilege_type = 'UPDATE' AND a.grantee <> 0::oid AND a.grantee <> c.relowner
  LOOP
    EXECUTE pg_catalog.format('GRANT SELECT ON TABLE %1$I.cdc_controls TO %2$s', @schema_literal@, v_grantee);
  END LOOP;
END
$cdc$;
