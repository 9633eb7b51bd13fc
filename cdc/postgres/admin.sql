-- What an operator reads and decides. {changes} is the qualified table, {held} the expression of outbox.sql.
--
-- The predicates of the partial indexes stay literal, as there. A search examines a bounded number of rows, in the
-- order of an index, and filters those: a search for a type without rows must not read the whole table.

-- name: totals
-- Not a statement: the columns of stats, from by_type, waiting and dead; whether there are more fresh ones comes after.
type AS entity_type, sum(fresh)::int AS fresh, sum(blocked)::int AS blocked, sum(waiting)::int AS waiting,
       sum(dead)::int AS dead, sum(blocked_keys)::int AS blocked_keys,
       extract(epoch FROM now() - min(ready_since))::float8 AS oldest_ready_age_s,
       extract(epoch FROM now() - min(blocked_since))::float8 AS oldest_blocked_age_s,
       (SELECT count(*) >= %(bound)s FROM waiting) AS more_waiting,
       (SELECT count(*) >= %(bound)s FROM dead) AS more_dead

-- name: stats
-- By entity type, of which 200 characters count. Of each shard the first fresh changes are examined, and a bounded
-- number of the waiting and the dead. What a TRUNCATE holds back is fresh, and not ready.
WITH standing AS MATERIALIZED ({standing}), fresh AS MATERIALIZED (
  SELECT c.shard, left(coalesce(c.entity_type, c.table_name), 200) AS type, c.entity_id, c.changed_at, {held} AS held,
         {held_by_truncate} AS held_by_truncate
  FROM generate_series(0, %(shards)s - 1) AS s(shard)
  CROSS JOIN LATERAL (
    SELECT n.shard, n.seq, n.entity_type, n.table_name, n.entity_id, n.changed_at FROM {changes} AS n
    WHERE n.shard = s.shard AND NOT n.processed AND n.next_attempt_at IS NULL AND n.dead_at IS NULL
    ORDER BY n.seq LIMIT %(per_shard)s
  ) AS c
), waiting AS MATERIALIZED (
  SELECT left(coalesce(entity_type, table_name), 200) AS type, next_attempt_at FROM {changes}
  WHERE NOT processed AND next_attempt_at <= 'infinity' AND dead_at IS NULL
  ORDER BY dead_at, next_attempt_at LIMIT %(bound)s  -- find_waiting says why by dead_at
), dead AS MATERIALIZED (
  SELECT left(coalesce(entity_type, table_name), 200) AS type FROM {changes}
  WHERE NOT processed AND dead_at IS NOT NULL
  ORDER BY dead_at LIMIT %(bound)s
), by_type AS (
  SELECT type, count(*) AS fresh, count(*) FILTER (WHERE held) AS blocked,
         count(DISTINCT entity_id) FILTER (WHERE held) AS blocked_keys, 0 AS waiting, 0 AS dead,
         min(changed_at) FILTER (WHERE NOT held AND NOT held_by_truncate AND isfinite(changed_at)) AS ready_since,
         min(changed_at) FILTER (WHERE held AND isfinite(changed_at)) AS blocked_since
  FROM fresh GROUP BY type
  UNION ALL
  SELECT type, 0, 0, 0, count(*), 0, min(next_attempt_at) FILTER (WHERE next_attempt_at <= now() AND next_attempt_at > '-infinity'), NULL
  FROM waiting GROUP BY type
  UNION ALL
  SELECT type, 0, 0, 0, 0, count(*), NULL, NULL
  FROM dead GROUP BY type
)
SELECT {totals},
       EXISTS (SELECT FROM fresh GROUP BY shard HAVING count(*) >= %(per_shard)s) AS more_fresh
FROM by_type GROUP BY type ORDER BY type

-- name: sees_barriers
-- Whether this role may read the TRUNCATEs that are not settled, and there is a table of them.
SELECT coalesce(has_table_privilege(to_regclass({barriers_regclass})::oid, 'SELECT'), false)

-- name: pace
-- Changes processed a second, and how long after they were written. Beyond the bound, over the time that those took.
WITH looked AS MATERIALIZED (
  SELECT processed_at, changed_at FROM {changes}
  WHERE processed AND processed_at > now() - make_interval(secs => %(seconds)s::float8) AND processed_at < 'infinity'
    AND subscription IS NULL
  ORDER BY processed_at DESC LIMIT %(bound)s
), seen AS (
  SELECT count(*) AS count, extract(epoch FROM now() - min(processed_at))::float8 AS span_s,
         percentile_cont(ARRAY[0.5, 0.99]::float8[])
           WITHIN GROUP (ORDER BY CASE WHEN isfinite(changed_at)
             THEN greatest(extract(epoch FROM processed_at - changed_at)::float8, 0) END) AS latencies
  FROM looked
)
SELECT count / CASE WHEN count < %(bound)s THEN %(seconds)s::float8 ELSE greatest(span_s, 1) END AS per_s,
       latencies[1] AS latency_p50_s, latencies[2] AS latency_p99_s
FROM seen

-- name: wanted
-- Not a statement: whether a search is for c, as an expression over c.
(%(type)s::text IS NULL OR coalesce(c.entity_type, c.table_name) = %(type)s)
AND (%(key)s::text IS NULL OR c.entity_id = %(key)s)
AND (%(age_s)s::float8 IS NULL OR c.changed_at >= now() - make_interval(secs => %(age_s)s))

-- name: find_fresh
-- The oldest first; or only those that an earlier change of their key blocks.
WITH looked AS MATERIALIZED (
  SELECT c.*
  FROM generate_series(0, %(shards)s - 1) AS s(shard)
  CROSS JOIN LATERAL (
    SELECT n.id, n.shard, n.seq, n.entity_type, n.table_name, n.entity_id, n.changed_at FROM {changes} AS n
    WHERE n.shard = s.shard AND NOT n.processed AND n.next_attempt_at IS NULL AND n.dead_at IS NULL
    ORDER BY n.seq LIMIT %(per_shard)s
  ) AS c
)
SELECT EXISTS (SELECT FROM looked GROUP BY shard HAVING count(*) >= %(per_shard)s) AS cut,
       ARRAY(
         SELECT c.id FROM looked AS c
         WHERE {wanted} AND (NOT %(blocked)s OR {held})
         ORDER BY c.seq LIMIT %(limit)s
       ) AS ids

-- name: find_waiting
-- The next due first. By dead_at too, which is NULL for all of them: else the server does not see that this is the order of
-- the index, and reads and sorts all that waits.
WITH looked AS MATERIALIZED (
  SELECT id, seq, entity_type, table_name, entity_id, changed_at, next_attempt_at FROM {changes}
  WHERE NOT processed AND next_attempt_at <= 'infinity' AND dead_at IS NULL
  ORDER BY dead_at, next_attempt_at LIMIT %(scan)s
)
SELECT (SELECT count(*) >= %(scan)s FROM looked) AS cut,
       ARRAY(
         SELECT c.id FROM looked AS c
         WHERE {wanted}
         ORDER BY c.next_attempt_at, c.seq LIMIT %(limit)s
       ) AS ids

-- name: find_dead
-- The latest dead letters first.
WITH looked AS MATERIALIZED (
  SELECT id, seq, entity_type, table_name, entity_id, changed_at, dead_at FROM {changes}
  WHERE NOT processed AND dead_at IS NOT NULL
  ORDER BY dead_at DESC LIMIT %(scan)s
)
SELECT (SELECT count(*) >= %(scan)s FROM looked) AS cut,
       ARRAY(
         SELECT c.id FROM looked AS c
         WHERE {wanted}
         ORDER BY c.dead_at DESC, c.seq DESC LIMIT %(limit)s
       ) AS ids

-- name: find_processed
-- The latest processed first. A change made since a moment was also processed since then. Of one that somebody marked
-- without a time only its own time is known.
WITH looked AS MATERIALIZED (
  (SELECT id, seq, entity_type, table_name, entity_id, changed_at, processed_at FROM {changes}
   WHERE processed
     AND processed_at >= coalesce(now() - make_interval(secs => %(age_s)s), '-infinity')
   ORDER BY processed_at DESC LIMIT %(scan)s)
  UNION ALL
  (SELECT id, seq, entity_type, table_name, entity_id, changed_at, changed_at FROM {changes}
   WHERE processed AND processed_at IS NULL LIMIT %(scan)s)
)
SELECT (SELECT count(*) >= %(scan)s FROM looked) AS cut,
       ARRAY(
         SELECT c.id FROM looked AS c
         WHERE {wanted}
         ORDER BY c.processed_at DESC, c.seq DESC LIMIT %(limit)s
       ) AS ids

-- name: number_unprocessed
-- By number, from any partial index: there is none on seq alone, because each index costs every mark a write. LIMIT
-- keeps the fresh ones a probe for each number and shard: a join, by the statistics of an empty queue, would read all.
SELECT n.seq, n.id
FROM generate_series(0, %(shards)s - 1) AS s(shard)
CROSS JOIN unnest(%(seqs)s::bigint[]) AS named(seq)
CROSS JOIN LATERAL (
  SELECT c.seq, c.id FROM {changes} AS c
  WHERE c.shard = s.shard AND c.seq = named.seq AND NOT c.processed AND c.next_attempt_at IS NULL AND c.dead_at IS NULL
  LIMIT 1
) AS n
UNION ALL
SELECT seq, id FROM {changes}
WHERE NOT processed AND dead_at IS NULL AND next_attempt_at <= 'infinity' AND seq = ANY (%(seqs)s::bigint[])
UNION ALL
SELECT seq, id FROM {changes}
WHERE NOT processed AND dead_at IS NOT NULL AND seq = ANY (%(seqs)s::bigint[])

-- name: number_processed
-- By number among the latest processed. NULLs come first in this order: those without a time are a search of their own.
SELECT seq, id
FROM (
  (SELECT seq, id FROM {changes} WHERE processed AND processed_at IS NOT NULL ORDER BY processed_at DESC LIMIT %(scan)s)
  UNION ALL
  (SELECT seq, id FROM {changes} WHERE processed AND processed_at IS NULL LIMIT %(scan)s)
) AS looked
WHERE seq = ANY (%(seqs)s::bigint[])

-- name: state
-- Not a statement: the state of c, as an expression over c.
CASE WHEN c.processed THEN 'processed' WHEN c.dead_at IS NOT NULL THEN 'dead'
     WHEN c.next_attempt_at IS NOT NULL THEN 'waiting' ELSE 'fresh' END

-- name: look
-- All of a change but its payload, in the order asked for. Python has no time 'infinity'. Texts that capture and the
-- consumer write are shorter than the bounds here; rows written by others may be longer.
SELECT c.seq, c.id, {state} AS state,
       (SELECT min(w.seq) FROM {changes} AS w
        WHERE {same_key} AND {holds} AND w.seq < c.seq
          AND NOT c.processed AND c.dead_at IS NULL) AS blocked_by,
       coalesce(NOT c.processed AND c.dead_at IS NOT NULL AND c.next_attempt_at = 'infinity', false) AS pauses_key,
       left(coalesce(c.entity_type, c.table_name), 1000) AS entity_type, left(c.entity_id, 1000) AS entity_id, c.shard,
       left(c.table_schema, 1000) AS table_schema, left(c.table_name, 1000) AS "table", left(c.operation, 200) AS operation, c.changed_at,
       c.error_count, left(c.last_error, 10000) AS last_error, left(c.error_summary, 300) AS error_summary,
       left(c.error_kind, 300) AS error_kind,
       CASE WHEN isfinite(c.next_attempt_at) THEN c.next_attempt_at END AS next_attempt_at,
       CASE WHEN isfinite(c.processed_at) THEN c.processed_at END AS processed_at,
       CASE WHEN isfinite(c.dead_at) THEN c.dead_at END AS dead_at, c.caused_by, c.depth, c.replay_of, c.subscription
FROM {changes} AS c
WHERE c.id = ANY (%(ids)s::uuid[])
ORDER BY array_position(%(ids)s::uuid[], c.id)

-- name: chain
-- A change, what it repeats or what caused it, the same of that, and so on: by the primary key, and up to the bound. By
-- column, so that a role that may not see payloads may run it.
WITH RECURSIVE link AS (
  SELECT 1 AS step, c.seq, c.id, c.entity_type, c.table_name, c.entity_id, c.operation, c.processed, c.dead_at,
         c.next_attempt_at, c.changed_at, c.caused_by, c.replay_of
  FROM {changes} AS c WHERE c.id = %(id)s
  UNION ALL
  SELECT link.step + 1, c.seq, c.id, c.entity_type, c.table_name, c.entity_id, c.operation, c.processed, c.dead_at,
         c.next_attempt_at, c.changed_at, c.caused_by, c.replay_of
  FROM link JOIN {changes} AS c ON c.id = coalesce(link.replay_of, link.caused_by) WHERE link.step < %(bound)s
)
SELECT c.seq, c.id, left(coalesce(c.entity_type, c.table_name), 200) AS entity_type, left(c.entity_id, 200) AS entity_id,
       left(c.operation, 200) AS operation, {state} AS state, c.changed_at, c.caused_by, c.replay_of
FROM link AS c ORDER BY c.step

-- name: payload
-- The application's data, on request only.
SELECT old_data AS old, new_data AS new, metadata FROM {changes} WHERE id = %(id)s

-- name: attempts_of
-- What is kept of a change's failed attempts, the oldest first.
SELECT a.attempt, a.subscription, a.consumer, a.handler, a.started_at, a.ended_at, a.outcome, a.error_kind AS kind,
       a.error_class AS error, a.error_text AS text, a.frames
FROM {attempts} AS a WHERE a.seq = %(seq)s AND a.subscription = %(subscription_name)s ORDER BY a.id DESC LIMIT %(limit)s

-- name: take
-- Whatever their state, or in this one only. A locked row is being worked on; waiting for it while holding others could
-- deadlock.
SELECT c.id FROM {changes} AS c
WHERE c.id = ANY (%(ids)s::uuid[]) AND (%(state)s::text IS NULL OR {state} = %(state)s)
FOR UPDATE SKIP LOCKED

-- name: retry
-- Due now. They wait rather than become fresh: a waiting change runs before the later ones of its key.
UPDATE {changes}
SET next_attempt_at = now(), error_count = CASE WHEN dead_at IS NULL THEN error_count ELSE 0 END, dead_at = NULL
WHERE id = ANY (%(ids)s::uuid[]) AND NOT processed AND (dead_at IS NOT NULL OR next_attempt_at IS NOT NULL)

-- name: discard
-- Processed, with the note that nothing was done and the reason of the failure.
UPDATE {changes}
SET processed = true, processed_at = now(), next_attempt_at = NULL, dead_at = NULL,
    last_error = concat_ws(': ', 'discarded by operator', last_error)
WHERE id = ANY (%(ids)s::uuid[]) AND NOT processed AND (dead_at IS NOT NULL OR next_attempt_at IS NOT NULL)

-- name: discard_before
-- Of one shard the next page of fresh changes, and of these the ones of a type from before a moment. Returns how many
-- were marked, how many were examined, and the last of them.
WITH page AS MATERIALIZED (
  SELECT n.ctid AS place, n.seq,
         coalesce(n.entity_type, n.table_name) = %(type)s AND n.changed_at < %(before)s::timestamptz AS wanted
  FROM {changes} AS n
  WHERE n.shard = %(shard)s AND n.seq > %(after)s AND NOT n.processed AND n.next_attempt_at IS NULL AND n.dead_at IS NULL
  ORDER BY n.seq LIMIT %(limit)s
), marked AS (
  UPDATE {changes} AS c
  SET processed = true, processed_at = now(), last_error = 'discarded by operator', error_summary = NULL,
      error_kind = NULL
  FROM page
  WHERE c.ctid = page.place AND page.wanted
    AND NOT c.processed AND c.next_attempt_at IS NULL AND c.dead_at IS NULL
  RETURNING 1
)
SELECT (SELECT count(*) FROM marked), (SELECT count(*) FROM page), (SELECT max(seq) FROM page)
