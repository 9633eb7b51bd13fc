-- Every statement of the consumer on entity_changes, by name. {changes} is the qualified table.
--
-- The predicates of the partial indexes stay literal: with a parameter in their place the generic plan cannot use
-- the index. `held` is one probe a row into the index of waiting changes, and not even that while nothing waits.
--
-- `next_xid` is the first transaction id that is not assigned yet, read off age(), which counts back from there. It is
-- not the snapshot's xmax: that is one above the last *completed* id, and a commit that hangs may well lie above it.

-- name: held
-- Not a statement of its own: whether an earlier change of c's key waits, as an expression over c.
CASE WHEN (SELECT EXISTS (SELECT FROM {changes} WHERE next_attempt_at IS NOT NULL)) THEN EXISTS (
  SELECT FROM {changes} AS w
  WHERE w.next_attempt_at IS NOT NULL
    AND coalesce(w.entity_type, w.table_name) = coalesce(c.entity_type, c.table_name)
    AND w.entity_id = c.entity_id AND w.seq < c.seq
) ELSE false END

-- name: columns
-- Not a statement of its own: what every read of changes returns, in the order in which the rows are unpacked.
c.seq, c.shard, c.id, coalesce(c.entity_type, c.table_name) AS type, c.entity_id, c.table_schema,
c.table_name, c.operation, c.old_data, c.new_data, c.metadata, c.changed_at, c.error_count,
{held} AS held

-- name: check
-- Whether the table is there, has the columns of this version, and may be read.
SELECT seq, shard, id, table_schema, table_name, operation, entity_type, entity_id, old_data, new_data, metadata,
       changed_at, processed, processed_at, error_count, last_error, next_attempt_at, dead_at
FROM {changes} LIMIT 0

-- name: missing_rights
-- The columns a settle writes and this role may not. Without them each change would be handled again and again.
SELECT c.name
FROM unnest(ARRAY['processed', 'processed_at', 'error_count', 'last_error', 'next_attempt_at', 'dead_at']) AS c(name)
WHERE NOT has_column_privilege({regclass}::regclass, c.name, 'UPDATE')

-- name: fetch
-- By number: the fresh ones among these changes.
WITH horizon AS MATERIALIZED (
  SELECT pg_snapshot_xmin(s)::text::bigint AS xmin,
         pg_snapshot_xmin(s)::text::bigint + age(pg_snapshot_xmin(s)::xid) AS next_xid
  FROM pg_current_snapshot() AS s
)
SELECT horizon.xmin, horizon.next_xid, row.*
FROM horizon LEFT JOIN LATERAL (
  SELECT {columns}
  FROM unnest(%(seqs)s::bigint[], %(shards)s::smallint[]) AS want(seq, shard)
  JOIN {changes} AS c ON c.shard = want.shard AND c.seq = want.seq
  WHERE NOT c.processed AND c.next_attempt_at IS NULL AND c.dead_at IS NULL
  ORDER BY c.seq
) AS row ON true

-- name: sweep
-- The next page of each shard: fresh changes above its cursor, and late ones between its floor and its cursor, written
-- by transactions that had not ended when the page before was read. age() counts back from the newest id, so that
-- "not older than" needs no care for ids that wrap around.
WITH horizon AS MATERIALIZED (
  SELECT pg_snapshot_xmin(s)::text::bigint AS xmin,
         pg_snapshot_xmin(s)::text::bigint + age(pg_snapshot_xmin(s)::xid) AS next_xid
  FROM pg_current_snapshot() AS s
)
SELECT horizon.xmin, horizon.next_xid, row.*
FROM horizon LEFT JOIN LATERAL (
  SELECT {columns}
  FROM unnest(%(shards)s::smallint[], %(floors)s::bigint[], %(cursors)s::bigint[], %(since)s::text[])
       AS want(shard, floor, cursor, since)
  CROSS JOIN LATERAL (
    SELECT * FROM {changes} AS n
    WHERE n.shard = want.shard AND n.seq > want.floor
      AND (n.seq > want.cursor OR age(n.xmin) <= age(want.since::xid))
      AND NOT n.processed AND n.next_attempt_at IS NULL AND n.dead_at IS NULL
    ORDER BY n.seq
    LIMIT %(per_shard)s
  ) AS c
) AS row ON true

-- name: resume
-- Read on for single keys, from a number on.
SELECT {columns}
FROM unnest(%(shards)s::smallint[], %(types)s::text[], %(ids)s::text[], %(seqs)s::bigint[])
     WITH ORDINALITY AS want(shard, type, entity_id, seq, place)
CROSS JOIN LATERAL (
  SELECT * FROM {changes} AS n
  WHERE n.shard = want.shard AND n.seq >= want.seq
    AND n.entity_id = want.entity_id AND coalesce(n.entity_type, n.table_name) = want.type
    AND NOT n.processed AND n.next_attempt_at IS NULL AND n.dead_at IS NULL
  ORDER BY n.seq
  LIMIT %(per_key)s
) AS c
ORDER BY want.place, c.seq

-- name: due
-- Waiting changes whose time has come. In the index's order, so that the page ends the scan; of two changes of one key
-- the later is held.
SELECT {columns}
FROM {changes} AS c
WHERE c.next_attempt_at IS NOT NULL AND c.next_attempt_at <= now() AND c.dead_at IS NULL
  AND c.shard = ANY (%(shards)s::smallint[])
ORDER BY c.next_attempt_at
LIMIT %(limit)s

-- name: next_due
-- Seconds until the next waiting change of these shards is due; NULL: none waits.
SELECT extract(epoch FROM min(c.next_attempt_at) - now())::float8
FROM {changes} AS c
WHERE c.next_attempt_at IS NOT NULL AND c.next_attempt_at > now() AND c.next_attempt_at < 'infinity'
  AND c.dead_at IS NULL AND c.shard = ANY (%(shards)s::smallint[])

-- name: settle_processed
-- The common case: fresh changes that are done. Whoever settled a row first wins; the count tells.
WITH marked AS (
  UPDATE {changes} AS c SET processed = true, processed_at = now()
  FROM unnest(%(seqs)s::bigint[], %(shards)s::smallint[]) AS done(seq, shard)
  WHERE c.shard = done.shard AND c.seq = done.seq
    AND NOT c.processed AND c.next_attempt_at IS NULL AND c.dead_at IS NULL
  RETURNING 1
)
SELECT count(*)::int, now() FROM marked

-- name: settle_others
-- Retries, dead letters, discards, and waiting changes that are done.
WITH settled AS (
  UPDATE {changes} AS c
  SET processed = s.processed,
      processed_at = CASE WHEN s.processed THEN now() END,
      next_attempt_at = CASE WHEN s.pauses THEN 'infinity' ELSE now() + make_interval(secs => s.delay_s) END,
      dead_at = CASE WHEN s.dead THEN now() END,
      error_count = c.error_count + s.failed::int,
      last_error = coalesce(s.error, c.last_error)
  FROM unnest(%(ids)s::uuid[], %(processed)s::bool[], %(dead)s::bool[], %(pauses)s::bool[], %(failed)s::bool[],
              %(delays)s::float8[], %(errors)s::text[]) AS s(id, processed, dead, pauses, failed, delay_s, error)
  WHERE c.id = s.id AND NOT c.processed AND c.dead_at IS NULL
  RETURNING 1
)
SELECT count(*)::int, now() FROM settled

-- name: take
-- For a transactional handler: those of its changes that are still as they were read and that nobody else has. What
-- another session holds is skipped: it is still running there, which never means that it is done.
SELECT pg_current_xact_id()::text
FROM unnest(%(ids)s::uuid[], %(requeued)s::bool[], %(failures)s::int[]) AS want(id, requeued, failures)
JOIN {changes} AS c ON c.id = want.id
WHERE NOT c.processed AND c.dead_at IS NULL
  AND (c.next_attempt_at IS NOT NULL) = want.requeued AND c.error_count = want.failures
FOR UPDATE OF c SKIP LOCKED

-- name: mark
-- The same changes, in the same transaction; no rows: the handler has ended the transaction it was given.
UPDATE {changes} SET processed = true, processed_at = clock_timestamp(), next_attempt_at = NULL
WHERE id = ANY (%(ids)s::uuid[]) AND NOT processed AND pg_current_xact_id() = %(xid)s::xid8
RETURNING processed_at

-- name: figures
-- For the metrics; every count ends at its bound, which then means "more".
SELECT
  (SELECT count(*) FROM (SELECT FROM {changes} WHERE NOT processed AND next_attempt_at IS NULL AND dead_at IS NULL
                         LIMIT %(bound)s) AS f)::int AS fresh,
  (SELECT count(*) FROM (SELECT FROM {changes} WHERE next_attempt_at IS NOT NULL AND dead_at IS NULL
                         LIMIT %(bound)s) AS w)::int AS waiting,
  (SELECT count(*) FROM (SELECT FROM {changes} WHERE dead_at IS NOT NULL LIMIT %(bound)s) AS d)::int AS dead,
  -- The oldest that could run now: of each shard the lowest fresh number that nothing holds back, and the waiting
  -- change that has been due the longest.
  greatest(
    coalesce((
      SELECT extract(epoch FROM now() - min(c.changed_at))::float8
      FROM generate_series(0, 63) AS s(shard)
      CROSS JOIN LATERAL (
        SELECT c.changed_at FROM {changes} AS c
        WHERE c.shard = s.shard AND NOT c.processed AND c.next_attempt_at IS NULL AND c.dead_at IS NULL
          AND NOT {held}
        ORDER BY c.seq LIMIT 1
      ) AS c), 0),
    coalesce((
      SELECT extract(epoch FROM now() - min(next_attempt_at))::float8 FROM {changes}
      WHERE next_attempt_at IS NOT NULL AND next_attempt_at <= now() AND dead_at IS NULL), 0),
    0) AS oldest_ready_age_s,
  pg_total_relation_size({regclass}::regclass)::bigint AS table_bytes,
  coalesce(pg_stat_get_dead_tuples({regclass}::regclass), 0)::bigint AS dead_tuples
