-- The subscriptions of an outbox: what is known of them, and how they are made and dropped. {changes}, {subscriptions},
-- {positions} and {subscription_changes} are qualified tables.
--
-- A change is found by its shard and number in one of two halves, each with an index of its own: fresh for the default
-- subscription, or not. The predicates stay literal, as in outbox.sql.

-- name: is_fresh
-- Not a statement: whether n is in the first half.
NOT n.processed AND n.next_attempt_at IS NULL AND n.dead_at IS NULL

-- name: is_settled
-- Not a statement: whether n is in the second half, as the index says it that is made for subscriptions.
(n.processed OR n.next_attempt_at IS NOT NULL OR n.dead_at IS NOT NULL)

-- name: find
SELECT s.subscription AS number, s.name, s.types, s.created_at, s.created_from
FROM {subscriptions} AS s WHERE %(name)s::text IS NULL OR s.name = %(name)s ORDER BY s.name

-- name: alone
SELECT pg_try_advisory_lock(%(lock)s::integer, hashtext(%(schema)s::text))

-- name: not_alone
SELECT pg_advisory_unlock(%(lock)s::integer, hashtext(%(schema)s::text))

-- name: last
-- The number drawn last. Not yet drawn is the first one.
SELECT CASE WHEN is_called THEN last_value ELSE last_value - 1 END FROM {numbers}

-- name: horizon
-- Of this moment: the oldest transaction that has an id and has not ended, and the first id that is not assigned yet.
SELECT pg_snapshot_xmin(s)::text::bigint, pg_snapshot_xmin(s)::text::bigint + age(pg_snapshot_xmin(s)::xid)
FROM pg_current_snapshot() AS s

-- name: insert
INSERT INTO {subscriptions} (name, types, created_from)
VALUES (%(name)s::text, %(types)s::text[], %(created_from)s::text) RETURNING subscription

-- name: since
-- Not a statement: of each shard the first change of these types since a moment. A change made since then was also
-- processed since then; of one that was marked without a time only its own time is known.
SELECT c.shard, min(c.seq) AS seq
FROM (
  SELECT n.shard, n.seq, n.subscription, n.changed_at, coalesce(n.entity_type, n.table_name) AS type FROM {changes} AS n
  WHERE NOT n.processed AND n.next_attempt_at IS NULL AND n.dead_at IS NULL
  UNION ALL
  SELECT n.shard, n.seq, n.subscription, n.changed_at, coalesce(n.entity_type, n.table_name) FROM {changes} AS n
  WHERE NOT n.processed AND n.dead_at IS NULL AND n.next_attempt_at <= 'infinity'
  UNION ALL
  SELECT n.shard, n.seq, n.subscription, n.changed_at, coalesce(n.entity_type, n.table_name) FROM {changes} AS n
  WHERE NOT n.processed AND n.dead_at IS NOT NULL
  UNION ALL
  SELECT n.shard, n.seq, n.subscription, n.changed_at, coalesce(n.entity_type, n.table_name) FROM {changes} AS n
  WHERE n.processed AND n.processed_at >= %(since)s::timestamptz
  UNION ALL
  SELECT n.shard, n.seq, n.subscription, n.changed_at, coalesce(n.entity_type, n.table_name) FROM {changes} AS n
  WHERE n.processed AND n.processed_at IS NULL
) AS c
WHERE c.changed_at >= %(since)s::timestamptz AND c.subscription IS NULL
  AND (%(types)s::text[] IS NULL OR c.type = ANY (%(types)s::text[]))
GROUP BY c.shard

-- name: place
-- The position of each shard: below its first change since the moment, and no higher than the proved number.
WITH first AS MATERIALIZED (
  SELECT f.shard, f.seq FROM ({since}) AS f WHERE %(since)s::timestamptz IS NOT NULL
)
INSERT INTO {positions} (subscription, shard, seq)
SELECT %(subscription)s::smallint, s.shard::smallint, least(%(proved)s::bigint, first.seq - 1)
FROM generate_series(0, %(shards)s::integer - 1) AS s(shard) LEFT JOIN first ON first.shard = s.shard

-- name: place_at
-- The same position in each shard.
INSERT INTO {positions} (subscription, shard, seq)
SELECT %(subscription)s::smallint, s.shard::smallint, %(proved)s::bigint
FROM generate_series(0, %(shards)s::integer - 1) AS s(shard)

-- name: skip
-- What is committed above the proved number is done, up to the first change since the moment, or all of it. Up to a bound.
WITH first AS MATERIALIZED (
  SELECT f.shard, f.seq FROM ({since}) AS f WHERE %(since)s::timestamptz IS NOT NULL
)
INSERT INTO {subscription_changes} (subscription, shard, seq)
SELECT %(subscription)s::smallint, above.shard, above.seq
FROM generate_series(0, %(shards)s::integer - 1) AS s(shard)
CROSS JOIN LATERAL (
  (SELECT n.shard, n.seq, coalesce(n.entity_type, n.table_name) AS type FROM {changes} AS n
   WHERE n.shard = s.shard AND n.seq > %(proved)s::bigint AND n.subscription IS NULL
     AND {is_fresh} ORDER BY n.seq LIMIT %(bound)s)
  UNION ALL
  (SELECT n.shard, n.seq, coalesce(n.entity_type, n.table_name) FROM {changes} AS n
   WHERE n.shard = s.shard AND n.seq > %(proved)s::bigint AND n.subscription IS NULL
     AND {is_settled} ORDER BY n.seq LIMIT %(bound)s)
) AS above
LEFT JOIN first ON first.shard = above.shard
WHERE (first.seq IS NULL OR above.seq < first.seq)
  AND (%(types)s::text[] IS NULL OR above.type = ANY (%(types)s::text[]))
LIMIT %(bound)s

-- name: drop
-- With what is paused in it: another one of its name begins without.
WITH gone AS (
  DELETE FROM {subscriptions} WHERE name = %(name)s::text RETURNING subscription, name
), positions AS (
  DELETE FROM {positions} AS p USING gone WHERE p.subscription = gone.subscription
), resumed AS (
  DELETE FROM {controls} AS c USING gone WHERE c.subscription = gone.name
)
SELECT subscription FROM gone

-- name: drop_changes
-- Some of what no subscription has any more.
DELETE FROM {subscription_changes} WHERE ctid = ANY (ARRAY(
  SELECT e.ctid FROM {subscription_changes} AS e
  WHERE NOT EXISTS (SELECT FROM {subscriptions} AS s WHERE s.subscription = e.subscription) LIMIT %(limit)s))

-- name: figures
-- Of each subscription, or of one. Of each shard a bounded number is examined, of each half. What is behind is neither done
-- nor waiting nor dead. Held back is what the default subscription has processed of what waits or is dead, and of all beyond
-- the positions, also of types that this one does not take: retention knows of no types. A
-- paused one, and one of which nobody is a consumer, is counted as any other. Most are at the same
-- positions, of which each is looked beyond once.
WITH asked AS MATERIALIZED (
  SELECT s.subscription, s.types FROM {subscriptions} AS s
  WHERE %(number)s::smallint IS NULL OR s.subscription = %(number)s::smallint
  ORDER BY s.name LIMIT %(subscriptions)s
), placed AS MATERIALIZED (
  SELECT asked.subscription, asked.types, p.shard, p.seq FROM asked JOIN {positions} AS p USING (subscription)
), beyond AS MATERIALIZED (
  SELECT placed.shard AS at_shard, placed.seq AS at_seq, n.*
  FROM (SELECT DISTINCT p.shard, p.seq FROM placed AS p) AS placed
  CROSS JOIN LATERAL (
    (SELECT n.shard, n.seq, n.subscription, n.changed_at, n.processed, true AS half, coalesce(n.entity_type, n.table_name) AS type
     FROM {changes} AS n
     WHERE n.shard = placed.shard AND n.seq > placed.seq AND {is_fresh} ORDER BY n.seq LIMIT %(per_shard)s)
    UNION ALL
    (SELECT n.shard, n.seq, n.subscription, n.changed_at, n.processed, false, coalesce(n.entity_type, n.table_name)
     FROM {changes} AS n
     WHERE n.shard = placed.shard AND n.seq > placed.seq AND {is_settled} ORDER BY n.seq LIMIT %(per_shard)s)
  ) AS n
), behind AS MATERIALIZED (
  SELECT b.subscription, count(*) FILTER (WHERE b.taken) AS count, count(*) FILTER (WHERE b.processed) AS held_back,
         min(b.changed_at) FILTER (WHERE b.taken AND isfinite(b.changed_at)) AS since
  FROM (
    SELECT p.subscription, b.processed, b.changed_at, p.types IS NULL OR b.type = ANY (p.types) AS taken
    FROM beyond AS b JOIN placed AS p ON p.shard = b.at_shard AND p.seq = b.at_seq
    WHERE (b.subscription IS NULL OR b.subscription = p.subscription) AND NOT EXISTS (
      SELECT FROM {subscription_changes} AS e
      WHERE e.subscription = p.subscription AND e.shard = b.shard AND e.seq = b.seq OFFSET 0)
  ) AS b
  GROUP BY b.subscription
), full_shards AS MATERIALIZED (
  SELECT DISTINCT b.at_shard, b.at_seq FROM beyond AS b
  GROUP BY b.at_shard, b.at_seq, b.half HAVING count(*) >= %(per_shard)s
)
SELECT asked.subscription AS number, coalesce(behind.count, 0)::int AS behind,
       (coalesce(behind.held_back, 0) + (
          SELECT count(*) FROM (
            (SELECT e.shard, e.seq FROM {subscription_changes} AS e
             WHERE e.subscription = asked.subscription AND e.dead_at IS NOT NULL LIMIT %(bound)s)
            UNION ALL
            (SELECT e.shard, e.seq FROM {subscription_changes} AS e
             WHERE e.subscription = asked.subscription AND e.dead_at IS NULL AND e.next_attempt_at <= 'infinity'
             LIMIT %(bound)s)
          ) AS e CROSS JOIN LATERAL (
            SELECT FROM {changes} AS n WHERE n.shard = e.shard AND n.seq = e.seq AND {is_settled} AND n.processed LIMIT 1
          ) AS n))::int AS held_back,
       EXISTS (SELECT FROM placed AS p JOIN full_shards AS f ON f.at_shard = p.shard AND f.at_seq = p.seq
               WHERE p.subscription = asked.subscription) AS more,
       CASE WHEN behind.since <= now() THEN extract(epoch FROM now() - behind.since)::float8 END AS oldest_age_s,
       (SELECT count(*) FROM (
          SELECT FROM {subscription_changes} AS e
          WHERE e.subscription = asked.subscription AND e.dead_at IS NULL AND e.next_attempt_at <= 'infinity'
          LIMIT %(bound)s) AS w)::int AS waiting,
       (SELECT count(*) FROM (
          SELECT FROM {subscription_changes} AS e
          WHERE e.subscription = asked.subscription AND e.dead_at IS NOT NULL LIMIT %(bound)s) AS d)::int AS dead
FROM asked LEFT JOIN behind ON behind.subscription = asked.subscription

-- name: consumers
-- How many consumers each has, by the lock that they share: (class of the lock, consumers).
SELECT l.classid::bigint, count(DISTINCT l.pid)::int
FROM pg_locks AS l
WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 2 AND l.objid = %(shards)s::bigint::oid
  AND l.database = (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database())
  AND l.classid = ANY (ARRAY(SELECT (c & 4294967295)::oid FROM unnest(%(classes)s::bigint[]) AS c))
GROUP BY l.classid
