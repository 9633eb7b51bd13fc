-- Events that are due later. {due_changes} is the qualified table, {publish_due} the function of sql/0013_due.sql.

-- name: publish
-- One session at a time, whoever asks: two that published at once would mix their numbers. NULL where it is another one,
-- or where nothing is due later.
SELECT CASE WHEN pg_try_advisory_xact_lock(%(class)s, %(key)s) THEN {publish_due}(%(events)s::integer, %(bytes)s::bigint) END

-- name: count
-- Up to a bound, and in how many seconds the first is due: below 0 it is overdue.
SELECT (SELECT count(*) FROM (SELECT FROM {due_changes} LIMIT %(bound)s) AS counted)::int AS count,
       (SELECT extract(epoch FROM due - clock_timestamp())::float8 FROM {due_changes} ORDER BY due LIMIT 1) AS next_s

-- name: types
-- Those of the events that are due within so many seconds.
SELECT DISTINCT entity_type
FROM (
  SELECT entity_type FROM {due_changes}
  WHERE due <= now() + make_interval(secs => %(within_s)s) ORDER BY due LIMIT %(bound)s
) AS soon
