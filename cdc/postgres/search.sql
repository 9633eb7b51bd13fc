-- A page of the changes in one state, in the order of an index, behind a place in it. {changes} is the qualified table,
-- {matches} the expression of bulk.sql: what is shown is what a decision about all that match finds.
--
-- The predicates of the partial indexes stay literal. Of each state a bounded number of changes is looked at. A row without
-- an id says how far, where that was not the end: there the next page goes on.

-- name: page_of_dead
-- The latest dead letters first.
WITH looked AS MATERIALIZED (
  SELECT n.id, n.seq, n.dead_at AS at, {row} FROM {changes} AS n
  WHERE NOT n.processed AND n.dead_at IS NOT NULL AND n.dead_at <= coalesce(%(at)s::timestamptz, 'infinity')
    AND (n.dead_at < coalesce(%(at)s::timestamptz, 'infinity') OR n.seq < coalesce(%(seq)s::bigint, 9223372036854775807))
  ORDER BY n.dead_at DESC, n.seq DESC LIMIT %(scan)s
)
(SELECT c.id, c.at, c.seq FROM looked AS c WHERE {matches} ORDER BY c.at DESC, c.seq DESC LIMIT %(limit)s)
UNION ALL
(SELECT NULL, c.at, c.seq FROM looked AS c WHERE (SELECT count(*) >= %(scan)s FROM looked)
 ORDER BY c.at, c.seq LIMIT 1)

-- name: page_of_waiting
-- The next due first. By dead_at too, which is NULL for all of them: else the server does not see that this is the order of
-- the index, and reads and sorts all that waits.
WITH looked AS MATERIALIZED (
  SELECT n.id, n.seq, n.next_attempt_at AS at, {row} FROM {changes} AS n
  WHERE NOT n.processed AND n.next_attempt_at <= 'infinity' AND n.dead_at IS NULL
    AND n.next_attempt_at >= coalesce(%(at)s::timestamptz, '-infinity')
    AND (n.next_attempt_at > coalesce(%(at)s::timestamptz, '-infinity') OR n.seq > coalesce(%(seq)s::bigint, 0))
  ORDER BY n.dead_at, n.next_attempt_at, n.seq LIMIT %(scan)s
)
(SELECT c.id, c.at, c.seq FROM looked AS c WHERE {matches} ORDER BY c.at, c.seq LIMIT %(limit)s)
UNION ALL
(SELECT NULL, c.at, c.seq FROM looked AS c WHERE (SELECT count(*) >= %(scan)s FROM looked)
 ORDER BY c.at DESC, c.seq DESC LIMIT 1)

-- name: page_of_fresh
-- The oldest first. Of each shard so many are looked at; where one has more, only what lies before the first of those ends.
WITH of_shards AS MATERIALIZED (
  SELECT n.* FROM generate_series(0, %(shards)s - 1) AS s(shard)
  CROSS JOIN LATERAL (
    SELECT n.id, n.shard, n.seq, NULL::timestamptz AS at, {row} FROM {changes} AS n
    WHERE n.shard = s.shard AND n.seq > coalesce(%(seq)s::bigint, 0)
      AND NOT n.processed AND n.next_attempt_at IS NULL AND n.dead_at IS NULL
    ORDER BY n.seq LIMIT %(per_shard)s
  ) AS n
), ends AS MATERIALIZED (
  SELECT min(last) AS seq FROM (SELECT max(seq) AS last FROM of_shards GROUP BY shard HAVING count(*) >= %(per_shard)s) AS full_ones
)
(SELECT c.id, c.at, c.seq FROM of_shards AS c
 WHERE c.seq <= coalesce((SELECT seq FROM ends), 9223372036854775807) AND {matches} ORDER BY c.seq LIMIT %(limit)s)
UNION ALL
(SELECT NULL, NULL, ends.seq FROM ends WHERE ends.seq IS NOT NULL)

-- name: page_of_processed
-- The latest first, but what is for one subscription alone; one that somebody marked without a time is in none of these pages. A change made since a moment was also
-- processed since then.
WITH looked AS MATERIALIZED (
  SELECT n.id, n.seq, n.processed_at AS at, {row} FROM {changes} AS n
  WHERE n.processed AND n.processed_at <= coalesce(%(at)s::timestamptz, 'infinity')
    AND n.processed_at >= coalesce(%(since)s::timestamptz, '-infinity')
    AND (n.processed_at < coalesce(%(at)s::timestamptz, 'infinity') OR n.seq < coalesce(%(seq)s::bigint, 9223372036854775807))
  ORDER BY n.processed_at DESC, n.seq DESC LIMIT %(scan)s
)
(SELECT c.id, c.at, c.seq FROM looked AS c WHERE c.subscription IS NULL AND {matches}
 ORDER BY c.at DESC, c.seq DESC LIMIT %(limit)s)
UNION ALL
(SELECT NULL, c.at, c.seq FROM looked AS c WHERE (SELECT count(*) >= %(scan)s FROM looked)
 ORDER BY c.at, c.seq LIMIT 1)

-- name: row
-- Not a statement: what a filter asks of n.
n.entity_type, n.table_name, n.entity_id, n.operation, n.changed_at, n.error_summary, n.error_kind,
left(n.last_error, 10000) AS last_error, n.subscription
