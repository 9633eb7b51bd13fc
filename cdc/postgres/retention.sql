-- Removing processed changes. {changes} is the qualified table.

-- name: prune
-- The next batch, the longest processed first. `since` is where the previous batch ended: index entries of removed rows
-- stay until vacuum, and an old snapshot would make each batch walk over those of all batches before. The rows are
-- locked as they are found, so processed_at need not be checked again: a second check would offer its index for the
-- removal, which by old statistics looks as cheap as the places themselves, and would be walked for each batch.
-- Those that somebody marked without a time count by their own, and come last: of them a bounded number is looked at.
WITH timed AS MATERIALIZED (
  SELECT n.ctid AS place FROM {changes} AS n
  WHERE n.processed AND n.processed_at < now() - make_interval(secs => %(older_than_s)s)
    AND n.processed_at >= coalesce(%(since)s::timestamptz, '-infinity')
  ORDER BY n.processed_at
  LIMIT %(limit)s
  FOR UPDATE SKIP LOCKED
), untimed AS MATERIALIZED (
  SELECT n.ctid AS place FROM {changes} AS n
  WHERE (SELECT count(*) FROM timed) < %(limit)s AND n.ctid = ANY (ARRAY(
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
  RETURNING c.processed_at
)
SELECT count(*)::int, max(processed_at) FILTER (WHERE isfinite(processed_at)) FROM removed

-- name: prunable
-- The number of removable changes, up to a bound.
SELECT count(*)::int
FROM (
  (SELECT FROM {changes} WHERE processed AND processed_at < now() - make_interval(secs => %(older_than_s)s)
   LIMIT %(bound)s)
  UNION ALL
  (SELECT FROM (SELECT changed_at FROM {changes} WHERE processed AND processed_at IS NULL LIMIT %(scan)s) AS untimed
   WHERE changed_at < now() - make_interval(secs => %(older_than_s)s))
  LIMIT %(bound)s
) AS old
