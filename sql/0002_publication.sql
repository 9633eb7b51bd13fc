-- The publication that pgoutput requires. Safe to run again; locks no table.

-- pgoutput sends the wake-ups on servers without wal2json, and does not start without a publication. This one publishes
-- no table: logical messages are sent without it. It belongs to no schema, and wal2json does not need it.
DO $cdc$
BEGIN
  -- "cdc db verify" installs there, for comparison.
  IF @schema_literal@ = 'pg_temp'
    OR EXISTS (SELECT FROM pg_catalog.pg_publication WHERE pubname = @publication_literal@)
  THEN
    RETURN;
  END IF;
  -- A server with a low wal_level warns that this will not do; `cdc doctor` says so when it matters.
  PERFORM pg_catalog.set_config('client_min_messages', 'error', true);
  CREATE PUBLICATION @publication@;
  PERFORM pg_catalog.set_config('client_min_messages', 'warning', true);
EXCEPTION WHEN insufficient_privilege THEN
  RAISE WARNING 'no publication %: that takes the right CREATE on the database', @publication_literal@
    USING HINT = 'only to stream with pgoutput; the owner of the database may create it: CREATE PUBLICATION '
      || pg_catalog.quote_ident(@publication_literal@);
END
$cdc$;
