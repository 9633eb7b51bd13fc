-- Removing processed changes. {changes} is the qualified table.

-- name: prune
-- The next few, the longest processed first. `since` is where the batch before ended: the index entries of what was
-- removed stay until vacuum, and an old snapshot makes each batch walk over those of all before it. The rows are locked
-- as they are found, so there is nothing to look at again: a second look at processed_at would offer its index for the
-- removal, which by old statistics is as cheap as the places themselves and is then walked for each batch.
WITH removed AS (
  DELETE FROM {changes} AS c
  WHERE c.ctid = ANY (ARRAY(
      SELECT n.ctid FROM {changes} AS n
      WHERE n.processed AND n.processed_at < now() - make_interval(secs => %(older_than_s)s)
        AND n.processed_at >= coalesce(%(since)s::timestamptz, '-infinity')
      ORDER BY n.processed_at
      LIMIT %(limit)s
      FOR UPDATE SKIP LOCKED
    ))
  RETURNING c.processed_at
)
SELECT count(*)::int, max(processed_at) FROM removed

-- name: prunable
-- How many there are, up to a bound.
SELECT count(*)::int
FROM (
  SELECT FROM {changes} WHERE processed AND processed_at < now() - make_interval(secs => %(older_than_s)s)
  LIMIT %(bound)s
) AS old
