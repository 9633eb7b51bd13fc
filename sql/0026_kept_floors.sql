-- Where the next owner of a shard begins to read: the position of the default subscription in each shard, a row of
-- cdc_positions as any subscription has it, of the number 0. Its consumers make these rows, so that what is restored into an
-- installed database meets none. Safe to run again; takes no lock that a writer or a consumer waits for.
--
-- Up to a position nothing is fresh, and no transaction will bring a change with such a number (cdc/core/kept_floor.py). What
-- waits or is dead is not fresh, and may stand below. A full pass still begins at zero, so a change that is made fresh by hand
-- is found wherever it stands; a position that is lost, or set to 0, costs the next owner a longer walk and nothing else.

COMMENT ON TABLE @schema@.cdc_positions IS 'how far each subscription is, by shard; 0 is the default one';

-- Who marks changes moves them, without a new grant.
DO $cdc$
DECLARE
  v_outbox CONSTANT regclass := pg_catalog.format('%I.entity_changes', @schema_literal@)::regclass;
  v_grantee text;
BEGIN
  FOR v_grantee IN
    SELECT DISTINCT pg_catalog.quote_ident(pg_catalog.pg_get_userbyid(a.grantee))
    FROM pg_catalog.pg_class AS c
    JOIN pg_catalog.pg_attribute AS t ON t.attrelid = c.oid AND t.attname = 'started_by'
    CROSS JOIN LATERAL pg_catalog.aclexplode(pg_catalog.array_cat(
      coalesce(c.relacl, ARRAY[]::aclitem[]), coalesce(t.attacl, ARRAY[]::aclitem[]))) AS a
    WHERE c.oid = v_outbox AND a.privilege_type = 'UPDATE' AND a.grantee <> 0::oid AND a.grantee <> c.relowner
  LOOP
    EXECUTE pg_catalog.format('GRANT SELECT, INSERT, UPDATE ON TABLE %I.cdc_positions TO %s', @schema_literal@, v_grantee);
    EXECUTE pg_catalog.format('GRANT SELECT ON SEQUENCE %I.entity_changes_seq_seq TO %s', @schema_literal@, v_grantee);
  END LOOP;
END
$cdc$;
