-- Removing processed changes. {changes} is the qualified table, {subscriptions}, {positions} and {subscription_changes} those
-- of subscriptions, {attempts} that of failed attempts.
--
-- Where there are subscriptions, a change stays until each is done with it: its number is not above the position of any, and
-- none has a row for it. What is done ahead of a position waits for it. A change that is for one subscription waits for that
-- one only, and for nobody when it was dropped.

-- name: shared
-- Whether there are any.
SELECT EXISTS (SELECT FROM {subscriptions})

-- name: kept
-- Not a statement: of each shard the lowest position.
SELECT p.shard, min(p.seq) AS seq FROM {positions} AS p
WHERE p.subscription = ANY (ARRAY(SELECT s.subscription FROM {subscriptions} AS s)) GROUP BY p.shard

-- name: free
-- Not a statement: whether every subscription is done with l, joined to kept. A shard that no subscription knows is nobody's.
-- One probe for each subscription, and none for what is above a position.
CASE WHEN l.seq > CASE WHEN l.subscription IS NULL THEN kept.seq ELSE (
  SELECT p.seq FROM {positions} AS p WHERE p.subscription = l.subscription AND p.shard = l.shard
) END THEN false ELSE NOT EXISTS (
  SELECT FROM {subscription_changes} AS e
  WHERE e.subscription = ANY (ARRAY(SELECT s.subscription FROM {subscriptions} AS s)) AND e.shard = l.shard AND e.seq = l.seq
  OFFSET 0
) END

-- name: without_attempts
-- Not a statement: the failed attempts of what was removed go with it.
forgotten AS (DELETE FROM {attempts} AS a WHERE a.seq = ANY (ARRAY(SELECT seq FROM removed)))

-- name: prune
-- The next batch, the longest processed first. `since` is where the previous batch ended: index entries of removed rows
-- stay until vacuum, and an old snapshot would make each batch walk over those of all batches before. The rows are
-- locked as they are found, so processed_at need not be checked again: a second check would offer its index for the
-- removal, which by old statistics looks as cheap as the places themselves, and would be walked for each batch.
-- Those that somebody marked without a time count by their own, and come last: of them a bounded number is looked at.
-- Removes nothing where a subscription was made meanwhile.
WITH timed AS MATERIALIZED (
  SELECT n.ctid AS place FROM {changes} AS n
  WHERE n.processed AND n.processed_at < now() - make_interval(secs => %(older_than_s)s)
    AND n.processed_at >= coalesce(%(since)s::timestamptz, '-infinity')
    AND NOT (SELECT EXISTS (SELECT FROM {subscriptions}))
  ORDER BY n.processed_at
  LIMIT %(limit)s
  FOR UPDATE SKIP LOCKED
), untimed AS MATERIALIZED (
  SELECT n.ctid AS place FROM {changes} AS n
  WHERE (SELECT count(*) FROM timed) < %(limit)s AND NOT (SELECT EXISTS (SELECT FROM {subscriptions})) AND n.ctid = ANY (ARRAY(
      SELECT old.place
      FROM (SELECT u.ctid AS place, u.changed_at FROM {changes} AS u
            WHERE u.processed AND u.processed_at IS NULL LIMIT %(scan)s) AS old
      WHERE old.changed_at < now() - make_interval(secs => %(older_than_s)s)
      LIMIT %(limit)s
    )) AND n.processed::int = 1 AND coalesce(n.processed_at, '-infinity') = '-infinity'
  FOR UPDATE SKIP LOCKED
), removed AS (
  DELETE FROM {changes} AS c
  WHERE c.ctid = ANY (ARRAY(SELECT place FROM timed UNION ALL SELECT place FROM untimed LIMIT %(limit)s))
  RETURNING c.processed_at, c.seq
), {without_attempts}
SELECT count(*)::int, max(processed_at) FILTER (WHERE isfinite(processed_at)), NULL::text, count(*) >= %(limit)s FROM removed

-- name: prune_shared
-- The same where there are subscriptions. What they keep lies before what may go, so a batch looks at a bounded number, and
-- the next one begins behind the last: at its moment and its place, as many have the same moment. More is to be looked at
-- where there were so many.
WITH kept AS MATERIALIZED ({kept}), looked AS MATERIALIZED (
  SELECT n.ctid AS place, n.shard, n.seq, n.subscription, n.processed_at FROM {changes} AS n
  WHERE n.processed AND n.processed_at < now() - make_interval(secs => %(older_than_s)s)
    AND n.processed_at >= coalesce(%(since)s::timestamptz, '-infinity')
    AND (n.processed_at > coalesce(%(since)s::timestamptz, '-infinity') OR n.ctid > coalesce(%(place)s, '(0,0)')::tid)
  ORDER BY n.processed_at
  LIMIT %(limit)s
), untimed AS MATERIALIZED (
  SELECT u.ctid AS place, u.shard, u.seq, u.subscription, u.changed_at FROM {changes} AS u
  WHERE (SELECT count(*) FROM looked) < %(limit)s AND u.processed AND u.processed_at IS NULL LIMIT %(scan)s
), locked AS MATERIALIZED (
  SELECT n.ctid AS place FROM {changes} AS n
  WHERE n.ctid = ANY (ARRAY(
      SELECT l.place FROM looked AS l LEFT JOIN kept ON kept.shard = l.shard WHERE {free}
      UNION ALL
      (SELECT l.place FROM untimed AS l LEFT JOIN kept ON kept.shard = l.shard
       WHERE l.changed_at < now() - make_interval(secs => %(older_than_s)s) AND {free} LIMIT %(limit)s)
    )) AND n.processed::int = 1
  FOR UPDATE SKIP LOCKED
), removed AS (
  DELETE FROM {changes} AS c WHERE c.ctid = ANY (ARRAY(SELECT place FROM locked)) RETURNING c.seq
), {without_attempts}
SELECT (SELECT count(*) FROM removed)::int, last.processed_at, last.place::text,
       (SELECT count(*) >= %(limit)s FROM looked)
FROM (SELECT) AS always LEFT JOIN LATERAL (
  SELECT l.processed_at, l.place FROM looked AS l WHERE isfinite(l.processed_at)
  ORDER BY l.processed_at DESC, l.place DESC LIMIT 1
) AS last ON true

-- name: prunable
-- The number of removable changes, up to a bound, and whether there are more.
SELECT count(*)::int, count(*) >= %(bound)s
FROM (
  (SELECT FROM {changes} WHERE processed AND processed_at < now() - make_interval(secs => %(older_than_s)s)
   LIMIT %(bound)s)
  UNION ALL
  (SELECT FROM (SELECT changed_at FROM {changes} WHERE processed AND processed_at IS NULL LIMIT %(scan)s) AS untimed
   WHERE changed_at < now() - make_interval(secs => %(older_than_s)s))
  LIMIT %(bound)s
) AS old

-- name: prunable_shared
-- The same where there are subscriptions; the bound is on those that are looked at.
WITH kept AS MATERIALIZED ({kept})
SELECT (count(*) FILTER (WHERE {free}))::int, count(*) >= %(bound)s
FROM (
  (SELECT n.shard, n.seq, n.subscription FROM {changes} AS n
   WHERE n.processed AND n.processed_at < now() - make_interval(secs => %(older_than_s)s) LIMIT %(bound)s)
  UNION ALL
  (SELECT untimed.shard, untimed.seq, untimed.subscription
   FROM (SELECT n.shard, n.seq, n.subscription, n.changed_at FROM {changes} AS n
         WHERE n.processed AND n.processed_at IS NULL LIMIT %(scan)s) AS untimed
   WHERE untimed.changed_at < now() - make_interval(secs => %(older_than_s)s))
) AS l LEFT JOIN kept ON kept.shard = l.shard
