-- Which change a row is a replay of: it was processed, and an operator has it handled once more. Safe to run again.
-- Locks: ACCESS EXCLUSIVE on entity_changes for a moment, the first time. No row is written anew.

DO $cdc$
DECLARE
  v_outbox CONSTANT regclass := pg_catalog.format('%I.entity_changes', @schema_literal@)::regclass;
  v_right record;
BEGIN
  IF EXISTS (
    SELECT FROM pg_catalog.pg_attribute WHERE attrelid = v_outbox AND attname = 'replay_of' AND NOT attisdropped
  ) THEN
    RETURN;
  END IF;
  -- NULL in whatever is captured, which costs a row nothing. No foreign key and no index, as for caused_by.
  ALTER TABLE @schema@.entity_changes ADD COLUMN replay_of uuid;
  -- Who reads the causes of changes goes on without a new grant.
  FOR v_right IN
    SELECT a.is_grantable,
      CASE WHEN a.grantee = 0::oid THEN 'PUBLIC' ELSE pg_catalog.quote_ident(pg_catalog.pg_get_userbyid(a.grantee)) END
        AS grantee
    FROM pg_catalog.pg_attribute AS c CROSS JOIN LATERAL pg_catalog.aclexplode(c.attacl) AS a
    WHERE c.attrelid = v_outbox AND c.attname = 'caused_by' AND a.privilege_type = 'SELECT'
  LOOP
    EXECUTE pg_catalog.format('GRANT SELECT (replay_of) ON TABLE %s TO %s%s', v_outbox, v_right.grantee,
      CASE WHEN v_right.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END);
  END LOOP;
END
$cdc$;
COMMENT ON COLUMN @schema@.entity_changes.replay_of IS 'id of the processed change that this one repeats';
