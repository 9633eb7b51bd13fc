-- Who owns which shard, for those who come after a consumer that died. Safe to run again.
--
-- The locks decide who owns a shard (cdc/postgres/shard_locks.py); they end with the session, whatever ended it. A row here is
-- removed by a consumer that gives its shard back in peace. So whoever locks a shard that still has somebody else's row
-- knows that this one died in the middle of its work.

CREATE TABLE IF NOT EXISTS @schema@.cdc_shards (
  shard smallint PRIMARY KEY,
  -- A consumer's process: it is drawn anew at each start.
  owner uuid NOT NULL,
  since timestamptz NOT NULL DEFAULT pg_catalog.now()
);
REVOKE ALL ON TABLE @schema@.cdc_shards FROM PUBLIC;
COMMENT ON TABLE @schema@.cdc_shards IS 'which consumer owns a shard; a row that outlives its consumer means that it died';
