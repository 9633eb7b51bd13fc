-- The floors that owners of shards keep: {changes}, {positions} and {numbers}, the sequence of `seq`, are qualified names. The
-- theory is in cdc/core/kept_floor.py.

-- name: drawn
-- The number drawn last. Before `move`: it is not looked up by a snapshot, and its transaction has its id by then.
SELECT CASE WHEN is_called THEN last_value ELSE last_value - 1 END FROM {numbers}

-- name: move
-- Moves the floors of these shards: up to the number that is proved, or to before the first change up to there that is fresh.
-- What waits or is dead has indexes of its own. Behind an old snapshot all that was marked is walked once, so a floor moves by
-- a number of numbers at most. One above all numbers is of before these started over. What another one has moved meanwhile stays.
-- Returns the snapshot, and whether there is more to move.
WITH horizon AS MATERIALIZED (
  SELECT pg_snapshot_xmin(s)::text::bigint AS xmin,
         pg_snapshot_xmin(s)::text::bigint + age(pg_snapshot_xmin(s)::xid) AS next_xid
  FROM pg_current_snapshot() AS s
), proved AS MATERIALIZED (
  SELECT CASE WHEN xmin >= %(needs)s::bigint THEN %(candidate)s::bigint ELSE %(proved)s::bigint END AS seq FROM horizon
), moved AS MATERIALIZED (
  SELECT own.shard, reach.seq AS reach, CASE WHEN at.seq > %(last)s::bigint THEN 0 ELSE coalesce((
      SELECT n.seq - 1 FROM {changes} AS n
      WHERE n.shard = own.shard AND n.seq > at.seq AND n.seq <= reach.seq
        AND NOT n.processed AND n.next_attempt_at IS NULL AND n.dead_at IS NULL
      ORDER BY n.seq LIMIT 1
    ), reach.seq) END AS seq
  FROM unnest(%(shards)s::smallint[]) AS own(shard) CROSS JOIN proved
  LEFT JOIN {positions} AS p ON p.subscription = 0 AND p.shard = own.shard
  CROSS JOIN LATERAL (SELECT coalesce(p.seq, 0)) AS at(seq)
  CROSS JOIN LATERAL (SELECT least(proved.seq, at.seq + %(stride)s::bigint)) AS reach(seq)
  WHERE at.seq < proved.seq OR at.seq > %(last)s::bigint
), written AS (
  INSERT INTO {positions} AS p (subscription, shard, seq) SELECT 0, moved.shard, moved.seq FROM moved
  ON CONFLICT (subscription, shard) DO UPDATE SET seq = excluded.seq
  WHERE p.seq < excluded.seq OR p.seq > %(last)s::bigint
)
SELECT horizon.xmin, horizon.next_xid,
       EXISTS (SELECT FROM moved WHERE moved.seq = moved.reach AND moved.seq < proved.seq)
FROM horizon CROSS JOIN proved
