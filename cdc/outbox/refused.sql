-- For changes that the server refuses to hand over. {changes} is the qualified table, {columns} those of queries.sql.

-- name: read
-- By id, whatever their state, as the reads of queries.sql do it.
SELECT {columns} FROM {changes} AS c WHERE c.id = ANY (%(ids)s::uuid[])

-- name: mark
-- Dead letters, without a look at what they hold. A row that another session has is not waited for.
WITH free AS (
  SELECT c.id, refused.error
  FROM unnest(%(ids)s::uuid[], %(errors)s::text[]) AS refused(id, error)
  JOIN {changes} AS c ON c.id = refused.id
  WHERE NOT c.processed AND c.dead_at IS NULL
  FOR UPDATE OF c SKIP LOCKED
)
UPDATE {changes} AS c
SET dead_at = now(), next_attempt_at = NULL, error_count = c.error_count + 1, last_error = free.error, started_by = NULL
FROM free WHERE c.id = free.id
RETURNING c.id
