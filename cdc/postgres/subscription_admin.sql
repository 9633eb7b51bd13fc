-- What an operator reads and decides of one subscription: %(subscription)s is its number. {changes} is the table of changes,
-- {positions} and {subscription_changes} hold the progress. {wanted} and {totals} are expressions of admin.sql, {matches} is
-- one of bulk.sql.
--
-- The predicates of the partial indexes stay literal: `next_attempt_at <= 'infinity'` says no more than IS NOT NULL, to choose
-- the index that is ordered by time. As there, each read examines a bounded number of rows in the order of an index. A change is found by shard and number in
-- one of its two halves, see subscriptions.sql; what waits or is dead has its key and its type as hashes.

-- name: change_of_e
-- Not a statement: the change that e, of the progress, is about, without its payload: not every operator may see that.
SELECT n.* FROM (
  (SELECT {described} FROM {changes} AS n WHERE n.shard = e.shard AND n.seq = e.seq
     AND NOT n.processed AND n.next_attempt_at IS NULL AND n.dead_at IS NULL LIMIT 1)
  UNION ALL
  (SELECT {described} FROM {changes} AS n WHERE n.shard = e.shard AND n.seq = e.seq
     AND (n.processed OR n.next_attempt_at IS NOT NULL OR n.dead_at IS NOT NULL) LIMIT 1)
) AS n LIMIT 1

-- name: key_hash
-- Not a statement: the hash of c's key.
hashtextextended(c.entity_id, hashtextextended(coalesce(c.entity_type, c.table_name), 0))

-- name: blocker
-- Not a statement: the first change of c's key that holds c back, or NULL. Written so that only the index of keys fits: by
-- number, all that is done ahead of the position would be read for each c.
SELECT min(w.seq) FROM {subscription_changes} AS w
WHERE w.subscription - %(subscription)s::smallint = 0 AND w.next_attempt_at IS NOT NULL
  AND w.key_hash = {key_hash} AND w.shard = c.shard AND w.seq - c.seq < 0
  AND (w.dead_at IS NULL OR w.next_attempt_at = 'infinity')

-- name: is_for
-- Not a statement: whether n is for this one, or for all.
(n.subscription IS NULL OR n.subscription = %(subscription)s::smallint)

-- name: beyond
-- Not a statement: of each shard the first changes that are fresh, of those that are for this one or for all.
SELECT c.* FROM {positions} AS p
CROSS JOIN LATERAL (
  (SELECT n.id, n.shard, n.seq, n.entity_type, n.table_name, n.entity_id, n.changed_at, true AS half FROM {changes} AS n
   WHERE n.shard = p.shard AND n.seq > p.seq AND NOT n.processed AND n.next_attempt_at IS NULL AND n.dead_at IS NULL
     AND {is_for}
   ORDER BY n.seq LIMIT %(per_shard)s)
  UNION ALL
  (SELECT n.id, n.shard, n.seq, n.entity_type, n.table_name, n.entity_id, n.changed_at, false FROM {changes} AS n
   WHERE n.shard = p.shard AND n.seq > p.seq AND (n.processed OR n.next_attempt_at IS NOT NULL OR n.dead_at IS NOT NULL)
     AND {is_for}
   ORDER BY n.seq LIMIT %(per_shard)s)
) AS c
WHERE p.subscription = %(subscription)s::smallint

-- name: is_taken
-- Not a statement: whether c of these is of its types, and neither done nor waiting nor dead.
(%(types)s::text[] IS NULL OR coalesce(c.entity_type, c.table_name) = ANY (%(types)s::text[]))
AND NOT EXISTS (
  SELECT FROM {subscription_changes} AS e
  WHERE e.subscription = %(subscription)s::smallint AND e.shard = c.shard AND e.seq = c.seq OFFSET 0
)

-- name: stats
-- By entity type, of which 200 characters count.
WITH looked AS MATERIALIZED ({beyond}), fresh AS MATERIALIZED (
  SELECT left(coalesce(c.entity_type, c.table_name), 200) AS type, c.entity_id, c.changed_at,
         ({blocker}) IS NOT NULL AS held
  FROM looked AS c WHERE {is_taken}
), waiting AS MATERIALIZED (
  SELECT left(coalesce(c.entity_type, c.table_name), 200) AS type, e.next_attempt_at
  FROM (SELECT * FROM {subscription_changes} AS e
        WHERE e.subscription = %(subscription)s::smallint AND e.next_attempt_at <= 'infinity' AND e.dead_at IS NULL
        ORDER BY e.next_attempt_at LIMIT %(bound)s) AS e
  CROSS JOIN LATERAL ({change_of_e}) AS c
), dead AS MATERIALIZED (
  SELECT left(coalesce(c.entity_type, c.table_name), 200) AS type
  FROM (SELECT * FROM {subscription_changes} AS e
        WHERE e.subscription = %(subscription)s::smallint AND e.dead_at IS NOT NULL
        ORDER BY e.dead_at LIMIT %(bound)s) AS e
  CROSS JOIN LATERAL ({change_of_e}) AS c
), by_type AS (
  SELECT type, count(*) AS fresh, count(*) FILTER (WHERE held) AS blocked,
         count(DISTINCT entity_id) FILTER (WHERE held) AS blocked_keys, 0 AS waiting, 0 AS dead,
         min(changed_at) FILTER (WHERE NOT held AND isfinite(changed_at)) AS ready_since,
         min(changed_at) FILTER (WHERE held AND isfinite(changed_at)) AS blocked_since
  FROM fresh GROUP BY type
  UNION ALL
  SELECT type, 0, 0, 0, count(*), 0, min(next_attempt_at) FILTER (WHERE next_attempt_at <= now() AND isfinite(next_attempt_at)),
         NULL
  FROM waiting GROUP BY type
  UNION ALL
  SELECT type, 0, 0, 0, 0, count(*), NULL, NULL
  FROM dead GROUP BY type
)
SELECT {totals},
       EXISTS (SELECT FROM looked GROUP BY shard, half HAVING count(*) >= %(per_shard)s) AS more_fresh
FROM by_type GROUP BY type ORDER BY type

-- name: find_fresh
-- The oldest first; or only those that an earlier change of their key blocks.
WITH looked AS MATERIALIZED ({beyond})
SELECT EXISTS (SELECT FROM looked GROUP BY shard, half HAVING count(*) >= %(per_shard)s) AS cut,
       ARRAY(
         SELECT c.id FROM looked AS c
         WHERE {is_taken} AND {wanted} AND (NOT %(blocked)s OR ({blocker}) IS NOT NULL)
         ORDER BY c.seq LIMIT %(limit)s
       ) AS ids

-- name: find_waiting
-- The next due first.
WITH looked AS MATERIALIZED (
  SELECT e.seq, e.shard, e.next_attempt_at FROM {subscription_changes} AS e
  WHERE e.subscription = %(subscription)s::smallint AND e.next_attempt_at <= 'infinity' AND e.dead_at IS NULL
  ORDER BY e.next_attempt_at LIMIT %(scan)s
)
SELECT (SELECT count(*) >= %(scan)s FROM looked) AS cut,
       ARRAY(
         SELECT c.id FROM looked AS e CROSS JOIN LATERAL ({change_of_e}) AS c
         WHERE {wanted}
         ORDER BY e.next_attempt_at, e.seq LIMIT %(limit)s
       ) AS ids

-- name: find_dead
-- The latest dead letters first.
WITH looked AS MATERIALIZED (
  SELECT e.seq, e.shard, e.dead_at FROM {subscription_changes} AS e
  WHERE e.subscription = %(subscription)s::smallint AND e.dead_at IS NOT NULL
  ORDER BY e.dead_at DESC LIMIT %(scan)s
)
SELECT (SELECT count(*) >= %(scan)s FROM looked) AS cut,
       ARRAY(
         SELECT c.id FROM looked AS e CROSS JOIN LATERAL ({change_of_e}) AS c
         WHERE {wanted}
         ORDER BY e.dead_at DESC, e.seq DESC LIMIT %(limit)s
       ) AS ids

-- name: number
-- By number, in whatever shard.
SELECT c.seq, c.id
FROM generate_series(0, %(shards)s - 1) AS s(shard)
CROSS JOIN unnest(%(seqs)s::bigint[]) AS named(seq)
CROSS JOIN LATERAL (SELECT s.shard::smallint AS shard, named.seq AS seq) AS e
CROSS JOIN LATERAL ({change_of_e}) AS c

-- name: look
-- All of a change but its payload, in the order asked for. The table of changes says nothing of when it was done.
SELECT c.seq, c.id,
       CASE WHEN e.dead_at IS NOT NULL THEN 'dead' WHEN e.next_attempt_at IS NOT NULL THEN 'waiting'
            WHEN e.seq IS NOT NULL OR c.seq <= p.seq THEN 'processed' ELSE 'fresh' END AS state,
       CASE WHEN e.dead_at IS NULL AND (e.next_attempt_at IS NOT NULL OR e.seq IS NULL AND c.seq > p.seq)
            THEN ({blocker}) END AS blocked_by,
       coalesce(e.dead_at IS NOT NULL AND e.next_attempt_at = 'infinity', false) AS pauses_key,
       left(coalesce(c.entity_type, c.table_name), 1000) AS entity_type, left(c.entity_id, 1000) AS entity_id, c.shard,
       left(c.table_schema, 1000) AS table_schema, left(c.table_name, 1000) AS "table", left(c.operation, 200) AS operation,
       c.changed_at, coalesce((e.tried ->> 'count')::int, 0) AS error_count, left(e.tried ->> 'error', 10000) AS last_error,
       left(e.tried ->> 'summary', 300) AS error_summary, left(e.tried ->> 'kind', 300) AS error_kind,
       CASE WHEN isfinite(e.next_attempt_at) THEN e.next_attempt_at END AS next_attempt_at,
       NULL::timestamptz AS processed_at, CASE WHEN isfinite(e.dead_at) THEN e.dead_at END AS dead_at,
       c.caused_by, c.depth, c.replay_of, c.subscription
FROM {changes} AS c
JOIN {positions} AS p ON p.subscription = %(subscription)s::smallint AND p.shard = c.shard
LEFT JOIN {subscription_changes} AS e
  ON e.subscription = %(subscription)s::smallint AND e.shard = c.shard AND e.seq = c.seq
WHERE c.id = ANY (%(ids)s::uuid[])
ORDER BY array_position(%(ids)s::uuid[], c.id)

-- name: take
-- Whatever their state, or in this one only. A locked row is being worked on; see admin.sql. A handler in a transaction
-- holds the lock of the change's number.
WITH free AS MATERIALIZED (
  SELECT c.id, c.seq
  FROM {changes} AS c JOIN {subscription_changes} AS e
    ON e.subscription = %(subscription)s::smallint AND e.shard = c.shard AND e.seq = c.seq
  WHERE c.id = ANY (%(ids)s::uuid[])
    AND (%(state)s::text IS NULL
      OR %(state)s = CASE WHEN e.dead_at IS NOT NULL THEN 'dead' WHEN e.next_attempt_at IS NOT NULL THEN 'waiting' END)
  FOR UPDATE OF e SKIP LOCKED
)
SELECT free.id FROM free WHERE pg_try_advisory_xact_lock(hashint8extended(free.seq, %(locks)s::bigint))

-- name: retry
-- Due now. A dead letter gets all its attempts again.
UPDATE {subscription_changes} AS e
SET next_attempt_at = now(), dead_at = NULL,
    tried = CASE WHEN e.dead_at IS NULL THEN e.tried ELSE coalesce(e.tried, '{{}}') || '{{"count": 0}}' END
FROM {changes} AS c
WHERE c.id = ANY (%(ids)s::uuid[]) AND e.subscription = %(subscription)s::smallint AND e.shard = c.shard AND e.seq = c.seq
  AND (e.dead_at IS NOT NULL OR e.next_attempt_at IS NOT NULL)

-- name: discard
-- Done: above the position a row that says so, and none where the position says it. It keeps no reason. The position stays
-- where it is until the commit: one that passed meanwhile would leave the row behind.
WITH at AS MATERIALIZED (
  SELECT p.shard, p.seq FROM {positions} AS p
  WHERE p.subscription = %(subscription)s::smallint
    AND p.shard = ANY (ARRAY(SELECT c.shard FROM {changes} AS c WHERE c.id = ANY (%(ids)s::uuid[])))
  ORDER BY p.shard FOR SHARE
), asked AS MATERIALIZED (
  SELECT e.ctid AS place, e.seq > at.seq AS above
  FROM {changes} AS c
  JOIN {subscription_changes} AS e ON e.subscription = %(subscription)s::smallint AND e.shard = c.shard AND e.seq = c.seq
  JOIN at ON at.shard = e.shard
  WHERE c.id = ANY (%(ids)s::uuid[]) AND (e.dead_at IS NOT NULL OR e.next_attempt_at IS NOT NULL)
), done AS (
  UPDATE {subscription_changes} AS e
  SET next_attempt_at = NULL, dead_at = NULL, type_hash = NULL, key_hash = NULL, tried = NULL
  WHERE e.ctid = ANY (ARRAY(SELECT place FROM asked WHERE above)) RETURNING 1
), gone AS (
  DELETE FROM {subscription_changes} AS e WHERE e.ctid = ANY (ARRAY(SELECT place FROM asked WHERE NOT above)) RETURNING 1
)
SELECT 1 FROM done UNION ALL SELECT 1 FROM gone

-- name: matching
-- Not a statement: what waits or is dead, as changes with what was tried.
SELECT n.id, n.seq, n.entity_type, n.table_name, n.entity_id, n.operation, n.changed_at,
       e.tried ->> 'kind' AS error_kind, e.tried ->> 'summary' AS error_summary, e.tried ->> 'error' AS last_error
FROM {subscription_changes} AS e CROSS JOIN LATERAL ({change_of_e}) AS n

-- name: select_dead
-- Dead letters, those of one key together and in their order.
DECLARE cdc_selection SCROLL CURSOR WITH HOLD FOR
SELECT c.id, {key_hash} AS key
FROM ({matching} WHERE e.subscription = %(subscription)s::smallint AND e.dead_at IS NOT NULL) AS c
WHERE {matches}
ORDER BY key, c.seq

-- name: select_waiting
-- The same of the changes that wait for their retry.
DECLARE cdc_selection SCROLL CURSOR WITH HOLD FOR
SELECT c.id, {key_hash} AS key
FROM ({matching} WHERE e.subscription = %(subscription)s::smallint AND e.next_attempt_at <= 'infinity' AND e.dead_at IS NULL) AS c
WHERE {matches}
ORDER BY key, c.seq

-- name: is_processed
-- Not a statement: whether c is for this one, or for all, and done or passed. This and what follows: for bulk.sql.
(c.subscription IS NULL OR c.subscription = %(subscription)s::smallint) AND coalesce((
  SELECT e.next_attempt_at IS NULL AND e.dead_at IS NULL FROM {subscription_changes} AS e
  WHERE e.subscription = %(subscription)s::smallint AND e.shard = c.shard AND e.seq = c.seq
), c.seq <= (
  SELECT p.seq FROM {positions} AS p WHERE p.subscription = %(subscription)s::smallint AND p.shard = c.shard
), false)

-- name: replayable
-- Not a statement: the processed changes of its types that are asked for, but replays. All changes are looked at.
SELECT c.id, c.seq, c.entity_type, c.table_name, c.entity_id FROM {changes} AS c
WHERE c.replay_of IS NULL AND {matches} AND {is_processed}
  AND (%(taken)s::text[] IS NULL OR coalesce(c.entity_type, c.table_name) = ANY (%(taken)s::text[]))

-- name: replayed
-- Not a statement: the originals of the replays made since a moment, for this one or for all, in whatever state these are.
SELECT c.replay_of FROM {changes} AS c
WHERE c.replay_of IS NOT NULL AND c.changed_at >= %(unless_since)s::timestamptz
  AND (c.subscription IS NULL OR c.subscription = %(subscription)s::smallint)

-- name: for_one
-- Not a statement: the default subscription has it as processed.
, subscription, processed, processed_at

-- name: of_one
-- Not a statement.
, %(subscription)s::smallint, true, now()

-- name: holding_back
-- Not a statement: a barrier of this one is found among the changes, and no other one has it.
