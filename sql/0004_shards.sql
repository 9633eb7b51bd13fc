-- Which consumer owns which shard, for the next owner after a crash. Safe to run again.
--
-- Advisory locks decide who owns a shard (cdc/postgres/shard_locks.py); they end with their session. A consumer that
-- releases a shard removes its row here. So a consumer that locks a shard and finds another's row knows that the previous
-- owner died at work.

CREATE TABLE IF NOT EXISTS @schema@.cdc_shards (
  shard smallint PRIMARY KEY,
  -- A consumer's process: a new one at each start.
  owner uuid NOT NULL,
  since timestamptz NOT NULL DEFAULT pg_catalog.now()
);
REVOKE ALL ON TABLE @schema@.cdc_shards FROM PUBLIC;
COMMENT ON TABLE @schema@.cdc_shards IS 'which consumer owns a shard; a row that outlives its consumer means that it died';
