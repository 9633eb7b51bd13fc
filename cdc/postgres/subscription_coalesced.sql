-- A subscription's statements for the changes of a key that one call stands for, in place of those of the same names in
-- coalesced.sql; the blocks in braces are those of subscription.sql. What is done leaves nothing behind, so nothing says of
-- one that it was coalesced.

-- name: as_read
-- Not a statement: the change that is asked about, while it is as it was read.
SELECT n.changed_at FROM {halves} AS n
LEFT JOIN LATERAL (
  SELECT s.seq, s.next_attempt_at, s.dead_at, s.tried FROM {subscription_changes} AS s
  WHERE s.subscription = %(subscription)s::smallint AND s.shard = n.shard AND s.seq = n.seq LIMIT 1
) AS s ON true
WHERE n.shard = want.shard AND n.seq = want.seq AND s.dead_at IS NULL AND {failures} = want.failures
  AND CASE WHEN want.requeued THEN s.next_attempt_at IS NOT NULL
      ELSE n.seq > {position} AND (s.seq IS NULL OR {recorded}) END
LIMIT 1

-- name: waiting_behind
-- Not a statement: the first change of its key behind it that waits. One that is gone from the outbox holds nothing back.
SELECT min(w.seq) AS seq FROM {subscription_changes} AS w
WHERE (
    SELECT o.next_attempt_at FROM {subscription_changes} AS o
    WHERE o.subscription = %(subscription)s::smallint AND o.next_attempt_at <= 'infinity'
    ORDER BY o.next_attempt_at LIMIT 1
  ) IS NOT NULL
  AND w.subscription - %(subscription)s::smallint = 0
  AND w.key_hash = hashtextextended(want.entity_id, hashtextextended(want.type, 0))
  AND {holds} AND w.seq - want.seq > 0
  AND (
    SELECT a.seq FROM {halves} AS a
    WHERE a.shard = w.shard AND a.seq = w.seq AND a.entity_id = want.entity_id
      AND coalesce(a.entity_type, a.table_name) = want.type
    LIMIT 1
  ) IS NOT NULL

-- name: groups
-- Not a statement: each group, with its shard's position, and the place of the row of its first one, which may wait.
SELECT want.*, {position} AS position, r.place
FROM unnest(%(firsts)s::uuid[], %(seqs)s::bigint[], %(requeued)s::bool[], %(shards)s::smallint[], %(later)s::text[],
            %(lasts)s::bigint[])
     AS want(first, seq, requeued, shard, later, last)
{row_there}

-- name: settle
-- As in coalesced.sql. Of the fresh ones the first session to settle one wins.
WITH groups AS MATERIALIZED ({groups}), gone AS (
  DELETE FROM {subscription_changes} AS s USING groups AS g
  WHERE s.ctid = g.place AND g.requeued AND g.seq <= g.position AND s.next_attempt_at IS NOT NULL AND s.dead_at IS NULL
), changed AS (
  UPDATE {subscription_changes} AS s SET next_attempt_at = NULL, type_hash = NULL, key_hash = NULL, tried = NULL
  FROM groups AS g
  WHERE s.ctid = g.place AND g.requeued AND g.seq > g.position AND s.next_attempt_at IS NOT NULL AND s.dead_at IS NULL
)
INSERT INTO {subscription_changes} AS s (seq, subscription, shard)
SELECT fresh.seq, %(subscription)s::smallint, g.shard
FROM groups AS g
CROSS JOIN LATERAL (
  SELECT g.seq WHERE NOT g.requeued
  UNION ALL
  SELECT behind.seq FROM unnest(g.later::bigint[]) AS behind(seq) WHERE behind.seq <> g.last
) AS fresh(seq)
WHERE fresh.seq > g.position
ON CONFLICT (subscription, seq) DO UPDATE
  SET next_attempt_at = NULL, type_hash = NULL, key_hash = NULL, tried = NULL
  WHERE {recorded}
RETURNING 1

-- name: locked
-- As in coalesced.sql. What another session has taken is held by a lock of its number; the locks that there are are looked
-- at, because to take one of each would take the room that all sessions have for theirs.
SELECT DISTINCT g.first
FROM unnest(%(firsts)s::uuid[], %(later)s::text[]) AS g(first, later)
CROSS JOIN LATERAL unnest(g.later::bigint[]) AS behind(seq)
WHERE hashint8extended(behind.seq, %(locks)s::bigint) = ANY (ARRAY(
  SELECT (l.classid::bigint << 32) | l.objid::bigint FROM pg_locks AS l
  WHERE l.locktype = 'advisory' AND l.objsubid = 1 AND l.granted AND l.pid <> pg_backend_pid()
    AND l.database = (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database())
))

-- name: mark
-- All of a group, in the transaction of the handler; as subscription.sql marks one, and for the reasons given there.
WITH want AS MATERIALIZED (
  SELECT w.seq, w.requeued, p.shard, p.seq AS position, r.place
  FROM (
    SELECT p.shard, p.seq FROM {positions} AS p
    WHERE p.subscription OPERATOR(pg_catalog.=) %(subscription)s::pg_catalog.int2
      AND p.shard OPERATOR(pg_catalog.=) %(shard)s::pg_catalog.int2
      AND pg_catalog.pg_current_xact_id() OPERATOR(pg_catalog.=) %(xid)s::pg_catalog.xid8
    FOR SHARE
  ) AS p
  CROSS JOIN LATERAL (
    SELECT %(seq)s::pg_catalog.int8, %(requeued)s::pg_catalog.bool
    UNION ALL
    SELECT behind.seq, false FROM pg_catalog.unnest(%(later)s::pg_catalog.int8[]) AS behind(seq)
  ) AS w(seq, requeued)
  LEFT JOIN LATERAL (
    SELECT s.ctid AS place FROM {subscription_changes} AS s
    WHERE s.subscription OPERATOR(pg_catalog.=) %(subscription)s::pg_catalog.int2
      AND s.shard OPERATOR(pg_catalog.=) p.shard AND s.seq OPERATOR(pg_catalog.=) w.seq
    LIMIT 1
  ) AS r ON w.requeued
), gone AS (
  DELETE FROM {subscription_changes} AS s USING want
  WHERE s.ctid OPERATOR(pg_catalog.=) want.place AND want.seq OPERATOR(pg_catalog.<=) want.position
    AND s.next_attempt_at IS NOT NULL AND s.dead_at IS NULL
  RETURNING s.seq
), changed AS (
  UPDATE {subscription_changes} AS s SET next_attempt_at = NULL, type_hash = NULL, key_hash = NULL, tried = NULL
  FROM want
  WHERE s.ctid OPERATOR(pg_catalog.=) want.place AND want.seq OPERATOR(pg_catalog.>) want.position
    AND s.next_attempt_at IS NOT NULL AND s.dead_at IS NULL
  RETURNING s.seq
), added AS (
  INSERT INTO {subscription_changes} AS s (seq, subscription, shard)
  SELECT want.seq, %(subscription)s::pg_catalog.int2, want.shard
  FROM want WHERE NOT want.requeued AND want.seq OPERATOR(pg_catalog.>) want.position
  ON CONFLICT (subscription, seq) DO UPDATE
    SET next_attempt_at = NULL, type_hash = NULL, key_hash = NULL, tried = NULL
    WHERE s.next_attempt_at OPERATOR(pg_catalog.=) '-infinity'::pg_catalog.timestamptz AND s.dead_at IS NULL
  RETURNING s.seq
), marked AS (
  SELECT seq FROM gone UNION ALL SELECT seq FROM changed UNION ALL SELECT seq FROM added
)
SELECT (SELECT pg_catalog.count(*) FROM marked)::pg_catalog.int4, pg_catalog.clock_timestamp(),
       pg_catalog.current_setting('cdc.captured', true) OPERATOR(pg_catalog.=) 'on'::pg_catalog.text
FROM want LIMIT 1
