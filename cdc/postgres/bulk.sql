-- Which changes an operator decides about, where they are many. {changes} is the qualified table.
--
-- A selection is one statement, whose result stays on the server: what was counted is what is decided about, and no
-- round has to find its rows again. It locks nothing: each round asks for the state of its rows again.

-- name: matches
-- Not a statement: whether c is asked for. An error is asked for by its kind, or by whole words that its summary begins
-- with; a row of an older version has no kind, and perhaps no summary. A handler is the types and operations that it handles.
(%(type)s::text IS NULL OR coalesce(c.entity_type, c.table_name) = %(type)s)
AND (%(key)s::text IS NULL OR c.entity_id = %(key)s)
AND (%(since)s::timestamptz IS NULL OR c.changed_at >= %(since)s)
AND (%(until)s::timestamptz IS NULL OR c.changed_at < %(until)s)
AND (%(error)s::text IS NULL
     OR c.error_kind = %(error)s
     OR left(coalesce(c.error_summary, c.last_error), length(%(error)s) + 1)
        IN (%(error)s, %(error)s || ' ', %(error)s || ':', %(error)s || ','))
AND (%(text)s::text IS NULL
     OR strpos(lower(concat_ws(' ', c.entity_id, coalesce(c.last_error, c.error_summary))), lower(%(text)s)) > 0)
AND (%(types)s::text[] IS NULL
     OR EXISTS (SELECT FROM unnest(%(types)s::text[], %(operations)s::text[]) AS handled(type, operation)
                WHERE handled.type = coalesce(c.entity_type, c.table_name) AND handled.operation = c.operation)
     OR coalesce(c.entity_type, c.table_name) <> ALL (%(named)s::text[]) AND c.operation = ANY (%(others)s::text[]))

-- name: select_dead
-- Dead letters, those of one key together and in their order.
DECLARE cdc_selection SCROLL CURSOR WITH HOLD FOR
SELECT c.id, hashtextextended(c.entity_id, hashtextextended(coalesce(c.entity_type, c.table_name), 0)) AS key
FROM {changes} AS c
WHERE c.dead_at IS NOT NULL AND NOT c.processed AND {matches}
ORDER BY key, c.seq

-- name: select_waiting
-- The same of the changes that wait for their retry.
DECLARE cdc_selection SCROLL CURSOR WITH HOLD FOR
SELECT c.id, hashtextextended(c.entity_id, hashtextextended(coalesce(c.entity_type, c.table_name), 0)) AS key
FROM {changes} AS c
WHERE NOT c.processed AND c.next_attempt_at <= 'infinity' AND c.dead_at IS NULL AND {matches}
ORDER BY key, c.seq

-- name: replayable
-- Not a statement: the processed changes that are asked for, but replays: their originals say the same. A change made
-- since a moment was also processed since then. One that somebody marked without a time has none. What is for one
-- subscription is nothing to the default one, which has it as processed. A subscription has others of these blocks.
SELECT c.id, c.seq, c.entity_type, c.table_name, c.entity_id FROM {changes} AS c
WHERE c.processed AND c.processed_at >= coalesce(%(since)s::timestamptz, '-infinity') AND c.replay_of IS NULL AND c.subscription IS NULL AND {matches}
UNION ALL
SELECT c.id, c.seq, c.entity_type, c.table_name, c.entity_id FROM {changes} AS c
WHERE c.processed AND c.processed_at IS NULL AND c.replay_of IS NULL AND c.subscription IS NULL AND {matches}

-- name: replayed
-- Not a statement: the originals of the replays made since a moment, in whatever state these are.
SELECT c.replay_of FROM {changes} AS c
WHERE NOT c.processed AND c.next_attempt_at IS NULL AND c.dead_at IS NULL
  AND c.replay_of IS NOT NULL AND c.changed_at >= %(unless_since)s::timestamptz
UNION ALL
SELECT c.replay_of FROM {changes} AS c
WHERE NOT c.processed AND c.dead_at IS NULL AND c.next_attempt_at <= 'infinity'
  AND c.replay_of IS NOT NULL AND c.changed_at >= %(unless_since)s::timestamptz
UNION ALL
SELECT c.replay_of FROM {changes} AS c
WHERE NOT c.processed AND c.dead_at IS NOT NULL
  AND c.replay_of IS NOT NULL AND c.changed_at >= %(unless_since)s::timestamptz
UNION ALL
SELECT c.replay_of FROM {changes} AS c
WHERE c.processed AND c.processed_at >= %(unless_since)s::timestamptz AND c.subscription IS NULL
  AND c.replay_of IS NOT NULL AND c.changed_at >= %(unless_since)s::timestamptz
UNION ALL
SELECT c.replay_of FROM {changes} AS c
WHERE c.processed AND c.processed_at IS NULL AND c.subscription IS NULL
  AND c.replay_of IS NOT NULL AND c.changed_at >= %(unless_since)s::timestamptz

-- name: select_processed
-- Processed changes in their order, but those with a replay made since a moment.
DECLARE cdc_selection SCROLL CURSOR WITH HOLD FOR
WITH replayed AS MATERIALIZED ({replayed})
SELECT c.id, 0 AS key
FROM ({replayable}) AS c
WHERE NOT EXISTS (SELECT FROM replayed WHERE replayed.replay_of = c.id)
ORDER BY c.seq

-- name: select_latest
-- The same of the last one of each key only.
DECLARE cdc_selection SCROLL CURSOR WITH HOLD FOR
WITH replayed AS MATERIALIZED ({replayed})
SELECT l.id, 0 AS key
FROM (
  SELECT c.id, c.seq,
         lead(c.seq) OVER (PARTITION BY coalesce(c.entity_type, c.table_name), c.entity_id ORDER BY c.seq) IS NULL AS latest
  FROM ({replayable}) AS c
) AS l
WHERE l.latest AND NOT EXISTS (SELECT FROM replayed WHERE replayed.replay_of = l.id)
ORDER BY l.seq

-- name: is_processed
-- Not a statement: whether c may be replayed.
c.processed AND c.subscription IS NULL

-- name: for_one
-- Not a statement: further columns of a replay that is for one subscription.

-- name: of_one
-- Not a statement: and their values.

-- name: holding_back
-- Not a statement: what is about a whole table is a barrier.
, barriers AS (
  INSERT INTO {barriers} (entity_type, seq, id)
  SELECT type, seq, id FROM written WHERE operation IN ('TRUNCATE', 'SCHEMA')
)

-- name: replay
-- The first of these processed changes, until a page is full, as new ones in this order, each with its wake-up. A replay
-- has the causes of what it repeats. What is about a whole table holds back what comes after it as it did at first. Returns how many were written, and how many
-- were looked at. LIMIT keeps it a probe of the index for each.
WITH page AS MATERIALIZED (
  SELECT wanted.id, wanted.place, c.stored, coalesce(sum(c.stored) OVER (
    ORDER BY wanted.place ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), 0) < %(bytes)s AS fits
  FROM unnest(%(ids)s::uuid[]) WITH ORDINALITY AS wanted(id, place)
  LEFT JOIN LATERAL (
    SELECT coalesce(pg_column_size(c.old_data), 0)::float8 + coalesce(pg_column_size(c.new_data), 0)
           + coalesce(pg_column_size(c.metadata), 0) AS stored
    FROM {changes} AS c WHERE c.id = wanted.id AND {is_processed} LIMIT 1
  ) AS c ON true
), written AS (
  INSERT INTO {changes} AS replay
    (table_schema, table_name, operation, entity_id, entity_type, old_data, new_data, metadata, caused_by, depth,
     replay_of{for_one})
  SELECT c.table_schema, c.table_name, c.operation, c.entity_id, c.entity_type, c.old_data, c.new_data, c.metadata,
         c.caused_by, c.depth, coalesce(c.replay_of, c.id){of_one}
  FROM page CROSS JOIN LATERAL (SELECT * FROM {changes} AS c WHERE c.id = page.id AND {is_processed} LIMIT 1) AS c
  WHERE page.fits
  ORDER BY page.place
  RETURNING replay.id, replay.seq, replay.operation, coalesce(replay.entity_type, replay.table_name) AS type,
            pg_logical_emit_message(true, %(prefix)s, replay.seq || ',' || replay.shard)
)
{holding_back}
SELECT (SELECT count(*) FROM written)::int, (SELECT count(*) FROM page WHERE page.fits)::int
