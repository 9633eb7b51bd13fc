-- The kind of the error in last_error, for readers who may not see rows: an exception class, or the consumer's own words.
-- Safe to run again.
-- Locks: ACCESS EXCLUSIVE on entity_changes for a moment, the first time.

DO $cdc$
DECLARE
  v_outbox CONSTANT regclass := pg_catalog.format('%I.entity_changes', @schema_literal@)::regclass;
  v_right record;
BEGIN
  IF EXISTS (
    SELECT FROM pg_catalog.pg_attribute WHERE attrelid = v_outbox AND attname = 'error_summary' AND NOT attisdropped
  ) THEN
    RETURN;
  END IF;
  ALTER TABLE @schema@.entity_changes ADD COLUMN error_summary text;
  -- Roles that may read or write last_error get the same right on error_summary, so that they need no new grant.
  FOR v_right IN
    SELECT a.privilege_type, a.is_grantable,
      CASE WHEN a.grantee = 0::oid THEN 'PUBLIC' ELSE pg_catalog.quote_ident(pg_catalog.pg_get_userbyid(a.grantee)) END
        AS grantee
    FROM pg_catalog.pg_attribute AS c CROSS JOIN LATERAL pg_catalog.aclexplode(c.attacl) AS a
    WHERE c.attrelid = v_outbox AND c.attname = 'last_error' AND a.privilege_type = ANY ('{SELECT,UPDATE}')
  LOOP
    EXECUTE pg_catalog.format('GRANT %s (error_summary) ON TABLE %s TO %s%s', v_right.privilege_type, v_outbox,
      v_right.grantee, CASE WHEN v_right.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END);
  END LOOP;
END
$cdc$;
COMMENT ON COLUMN @schema@.entity_changes.error_summary IS 'what last_error is about, in words that quote no row';
