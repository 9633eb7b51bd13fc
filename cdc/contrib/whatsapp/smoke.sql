-- What `cdc whatsapp smoke` reads about the change it has made, and removes. {changes} is the qualified table.
--
-- All reads are bounded by the start: fresh changes above a number, through their index, and those processed since. The
-- waiting and the dead are walked: there should be few.

-- name: last_seq
-- The highest number drawn; all later ones are above it.
SELECT coalesce(pg_sequence_last_value(pg_get_serial_sequence({regclass}, 'seq')::regclass), 0)

-- name: captured
-- In the transaction that wrote the row: fresh, and not yet visible to other sessions.
SELECT c.id, c.seq, coalesce(c.entity_type, c.table_name)
FROM generate_series(0, %(shards)s - 1) AS s(shard)
CROSS JOIN LATERAL (
  SELECT * FROM {changes} AS n
  WHERE n.shard = s.shard AND n.seq > %(after)s AND NOT n.processed AND n.next_attempt_at IS NULL AND n.dead_at IS NULL
) AS c
WHERE c.table_name = 'whatsapp_message_reactions' AND c.entity_id = %(entity_id)s

-- name: state
SELECT CASE WHEN processed THEN 'processed' WHEN dead_at IS NOT NULL THEN 'dead'
            WHEN next_attempt_at IS NOT NULL THEN 'waiting' ELSE 'fresh' END
FROM {changes} WHERE id = %(id)s

-- name: ours
-- Every change of these rows, and the changes they have caused: id, and whether it is processed or dead.
WITH RECURSIVE since AS MATERIALIZED (
  SELECT c.id, c.caused_by, c.entity_id, c.table_name, false AS settled
  FROM generate_series(0, %(shards)s - 1) AS s(shard)
  CROSS JOIN LATERAL (
    SELECT * FROM {changes} AS n
    WHERE n.shard = s.shard AND n.seq > %(after)s AND NOT n.processed AND n.next_attempt_at IS NULL AND n.dead_at IS NULL
  ) AS c
  UNION ALL
  SELECT id, caused_by, entity_id, table_name, dead_at IS NOT NULL FROM {changes}
  WHERE NOT processed AND dead_at IS NULL AND next_attempt_at <= 'infinity' AND seq > %(after)s
  UNION ALL
  SELECT id, caused_by, entity_id, table_name, true FROM {changes}
  WHERE NOT processed AND dead_at IS NOT NULL AND seq > %(after)s
  UNION ALL
  SELECT id, caused_by, entity_id, table_name, true FROM {changes}
  WHERE processed AND processed_at >= %(began)s AND seq > %(after)s
), ours AS (
  SELECT since.* FROM since
  WHERE id = %(id)s
     OR (table_name = 'whatsapp_message_reactions' AND entity_id = %(entity_id)s)
     OR (table_name = 'tasks' AND entity_id = ANY (%(tasks)s::text[]))
  UNION
  SELECT since.* FROM since JOIN ours ON since.caused_by = ours.id
)
SELECT id, settled FROM ours

-- name: remove
DELETE FROM {changes} WHERE id = ANY (%(ids)s::uuid[])
