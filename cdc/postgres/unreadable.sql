-- For changes that the server refuses to return. {changes} is the qualified table, {columns} those of outbox.sql.

-- name: read
-- By id, whatever their state, as the reads of outbox.sql do it; as many as fit into a page.
SELECT {columns}
FROM (
  SELECT f.*, {fits}
  FROM unnest(%(ids)s::uuid[]) AS want(id)
  CROSS JOIN LATERAL (SELECT {texts} FROM {changes} AS n WHERE n.id = want.id LIMIT 1) AS f
) AS c

-- name: kind
-- The columns that choose a handler.
SELECT coalesce(entity_type, table_name)::text, left(operation, 200)::text FROM {changes} WHERE id = %(id)s

-- name: refusal
-- Not a statement: what is kept of the refusal s, in place of an attempt.
jsonb_build_object('attempt', s.attempt, 'outcome', 'refused', 'kind', 'unreadable', 'error', 'RefusedReadError',
                   'text', s.error)

-- name: mark
-- Makes dead letters without reading the documents. A row that another session has locked is not waited for.
WITH free AS (
  SELECT c.id, refused.error, refused.summary, refused.pauses
  FROM unnest(%(ids)s::uuid[], %(errors)s::text[], %(summaries)s::text[], %(pauses)s::bool[])
       AS refused(id, error, summary, pauses)
  JOIN {changes} AS c ON c.id = refused.id
  WHERE NOT c.processed AND c.dead_at IS NULL
  FOR UPDATE OF c SKIP LOCKED
), refused AS (
  UPDATE {changes} AS c
  SET dead_at = now(), next_attempt_at = CASE WHEN free.pauses THEN 'infinity'::timestamptz END,
      error_count = c.error_count + 1, last_error = free.error, error_summary = free.summary, error_kind = 'unreadable',
      started_by = NULL
  FROM free WHERE c.id = free.id
  RETURNING c.id, c.seq, c.error_count AS attempt, free.error
), failed AS (SELECT s.seq, {refusal} AS attempt FROM refused AS s), {keep_attempts}
SELECT id FROM refused
