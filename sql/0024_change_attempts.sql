-- The failed attempts of each change, and what kind of error the last one was. Safe to run again.
-- Locks: ACCESS EXCLUSIVE on entity_changes for a moment, the first time.
--
-- A row is written by the statement that marks the failure, and goes with its change when retention removes that. No
-- foreign key: its check would lock the change's row and write to it.

DO $cdc$
DECLARE
  v_outbox CONSTANT regclass := pg_catalog.format('%I.entity_changes', @schema_literal@)::regclass;
  v_right record;
BEGIN
  IF EXISTS (
    SELECT FROM pg_catalog.pg_attribute WHERE attrelid = v_outbox AND attname = 'error_kind' AND NOT attisdropped
  ) THEN
    RETURN;
  END IF;
  ALTER TABLE @schema@.entity_changes ADD COLUMN error_kind text;
  -- Roles that may read or write error_summary get the same right on error_kind, so that they need no new grant.
  FOR v_right IN
    SELECT a.privilege_type, a.is_grantable,
      CASE WHEN a.grantee = 0::oid THEN 'PUBLIC' ELSE pg_catalog.quote_ident(pg_catalog.pg_get_userbyid(a.grantee)) END
        AS grantee
    FROM pg_catalog.pg_attribute AS c CROSS JOIN LATERAL pg_catalog.aclexplode(c.attacl) AS a
    WHERE c.attrelid = v_outbox AND c.attname = 'error_summary' AND a.privilege_type = ANY ('{SELECT,UPDATE}')
  LOOP
    EXECUTE pg_catalog.format('GRANT %s (error_kind) ON TABLE %s TO %s%s', v_right.privilege_type, v_outbox,
      v_right.grantee, CASE WHEN v_right.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END);
  END LOOP;
END
$cdc$;
COMMENT ON COLUMN @schema@.entity_changes.error_kind IS 'the kind of the error in last_error: a class, or a word of ours';

CREATE TABLE IF NOT EXISTS @schema@.change_attempts (
  id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  -- Of the change.
  seq bigint NOT NULL,
  subscription text NOT NULL,
  -- From 1; a dead letter that is tried again begins anew.
  attempt integer NOT NULL,
  -- The process that made it, as in cdc_shards.
  consumer uuid,
  handler text,
  -- By the server's clock. NULL: not known, or it was not called.
  started_at timestamptz,
  ended_at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
  -- retried, unavailable, dead, crashed or refused.
  outcome text NOT NULL,
  error_kind text NOT NULL,
  error_class text NOT NULL,
  error_text text NOT NULL,
  frames text[] NOT NULL DEFAULT '{}'
);
CREATE INDEX IF NOT EXISTS change_attempts_seq ON @schema@.change_attempts (seq, id);
REVOKE ALL ON TABLE @schema@.change_attempts FROM PUBLIC;
REVOKE ALL ON SEQUENCE @schema@.change_attempts_id_seq FROM PUBLIC;
COMMENT ON TABLE @schema@.change_attempts IS 'the failed attempts of changes, the last ones of each';

-- Who marks changes writes them, and who removes changes removes them, without a new grant.
DO $cdc$
DECLARE
  v_outbox CONSTANT regclass := pg_catalog.format('%I.entity_changes', @schema_literal@)::regclass;
  v_right record;
BEGIN
  FOR v_right IN
    SELECT a.privilege_type AS on_changes, pg_catalog.quote_ident(pg_catalog.pg_get_userbyid(a.grantee)) AS grantee
    FROM pg_catalog.pg_class AS c
    JOIN pg_catalog.pg_attribute AS t ON t.attrelid = c.oid AND t.attname = 'error_count'
    CROSS JOIN LATERAL pg_catalog.aclexplode(pg_catalog.array_cat(
      coalesce(c.relacl, ARRAY[]::aclitem[]), coalesce(t.attacl, ARRAY[]::aclitem[]))) AS a
    WHERE c.oid = v_outbox AND a.privilege_type = ANY ('{UPDATE,DELETE}') AND a.grantee <> 0::oid
      AND a.grantee <> c.relowner
  LOOP
    EXECUTE pg_catalog.format('GRANT SELECT, DELETE%2$s ON TABLE %1$I.change_attempts TO %3$s', @schema_literal@,
      CASE WHEN v_right.on_changes = 'UPDATE' THEN ', INSERT' ELSE '' END, v_right.grantee);
  END LOOP;
END
$cdc$;
