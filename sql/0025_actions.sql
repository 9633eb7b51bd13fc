-- What operators have done. Safe to run again; takes no lock that a writer or a consumer waits for.
--
-- A row for each transaction of a command, written in that transaction; nobody but the owner may change one. What has been
-- decided about many changes has several rows of one command.

CREATE TABLE IF NOT EXISTS @schema@.cdc_actions (
  id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  -- Of one command, whatever number of transactions it takes.
  command uuid NOT NULL,
  at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
  -- Whose rights were used, and who has logged in. Neither is what the session says of itself.
  role name NOT NULL DEFAULT CURRENT_USER,
  login name NOT NULL DEFAULT SESSION_USER,
  -- What it says of itself: a person, and by which way.
  person text NOT NULL,
  via text NOT NULL,
  action text NOT NULL,
  -- What it was about: names of changes, or filters.
  target jsonb NOT NULL,
  because text,
  count bigint NOT NULL,
  CONSTRAINT cdc_actions_size CHECK (pg_catalog.octet_length(pg_catalog.concat(person, via, action)) <= 1000
    AND pg_catalog.octet_length(because) <= 2000 AND pg_catalog.octet_length(target::text) <= 20000)
);
REVOKE ALL ON TABLE @schema@.cdc_actions FROM PUBLIC;
REVOKE ALL ON SEQUENCE @schema@.cdc_actions_id_seq FROM PUBLIC;
COMMENT ON TABLE @schema@.cdc_actions IS 'what operators have done: who, to what, why and when';

-- Who may act already goes on without a new grant, and who removes changes removes what is old here.
DO $cdc$
DECLARE
  v_right record;
BEGIN
  FOR v_right IN
    SELECT pg_catalog.quote_ident(pg_catalog.pg_get_userbyid(a.grantee)) AS grantee,
           pg_catalog.bool_or(c.relname = 'entity_changes' AND a.privilege_type = 'DELETE') AS removes
    FROM pg_catalog.pg_class AS c
    LEFT JOIN pg_catalog.pg_attribute AS t ON t.attrelid = c.oid AND t.attnum > 0 AND NOT t.attisdropped
    CROSS JOIN LATERAL (
      SELECT * FROM pg_catalog.aclexplode(c.relacl) UNION ALL SELECT * FROM pg_catalog.aclexplode(t.attacl)
    ) AS a
    WHERE c.relnamespace = pg_catalog.to_regnamespace(pg_catalog.quote_ident(@schema_literal@))
      AND a.grantee <> 0::oid AND a.grantee <> c.relowner AND CASE c.relname
        WHEN 'entity_changes' THEN a.privilege_type = 'DELETE' OR a.privilege_type = 'UPDATE' AND t.attname = 'processed'
          OR a.privilege_type = 'INSERT' AND t.attname = 'replay_of'
        WHEN 'cdc_controls' THEN a.privilege_type = 'INSERT'
        WHEN 'cdc_backfills' THEN a.privilege_type = 'UPDATE'
        WHEN 'cdc_subscriptions' THEN a.privilege_type = 'UPDATE'
        ELSE false END
    GROUP BY 1
  LOOP
    EXECUTE pg_catalog.format('GRANT SELECT, INSERT (command, person, via, action, target, because, count)'
      ' ON TABLE %1$I.cdc_actions TO %2$s', @schema_literal@, v_right.grantee);
    IF v_right.removes THEN
      EXECUTE pg_catalog.format('GRANT DELETE ON TABLE %1$I.cdc_actions TO %2$s', @schema_literal@, v_right.grantee);
    END IF;
  END LOOP;
END
$cdc$;
