-- The changes of a key that one call stands for, by name; the blocks in braces are those of outbox.sql. {changes} is the table.

-- name: as_read
-- Not a statement: the change that is asked about, while it is as it was read.
SELECT n.changed_at FROM {changes} AS n
WHERE n.id = want.id AND NOT n.processed AND n.dead_at IS NULL
  AND (n.next_attempt_at IS NOT NULL) = want.requeued AND n.error_count = want.failures
LIMIT 1

-- name: waiting_behind
-- Not a statement: the first change of its key behind it that waits.
SELECT min(w.seq) AS seq
FROM (SELECT want.type AS entity_type, want.type AS table_name, want.entity_id AS entity_id) AS c
CROSS JOIN {changes} AS w
WHERE (SELECT EXISTS (SELECT FROM {changes} WHERE NOT processed AND next_attempt_at IS NOT NULL))
  AND {same_key} AND {holds} AND w.seq > want.seq

-- name: ask
-- For each of these first changes of their keys that is still as it was read: the numbers of the fresh ones behind it, how
-- long to wait until the key is quiet, and the last of them. What is behind ends before a change that another handler
-- gets, or one that waits or that a TRUNCATE holds back, and with replays where the first is none, or with the first that is
-- none: what is visible behind a replay may not be all that was written before, and of replays alone or of others it is. While
-- one before the first is fresh, which has become visible late, it is that one that is asked for: what is behind the first may
-- have been written when it was there. The bounds are a distance in numbers, because no index finds the changes of a key, and
-- a count; neither depends on other keys, so that who asks again learns no less. An infinite time is none, and nor is one to
-- come: the clock was set back, and to wait until it is there again could take for ever.
SELECT c.place, c.before, c.later, c.wait_s, {columns}
FROM (
  SELECT want.place, late.seq AS before, behind.later, wait.wait_s, f.*, {fits}
  FROM unnest(%(ids)s::uuid[], %(shards)s::smallint[], %(types)s::text[], %(entity_ids)s::text[], %(seqs)s::bigint[],
              %(requeued)s::bool[], %(failures)s::int[], %(operations)s::text[], %(quiet)s::float8[],
              %(at_most)s::float8[], %(replays)s::bool[])
       WITH ORDINALITY
       AS want(id, shard, type, entity_id, seq, requeued, failures, operations, quiet, at_most, replays, place)
  CROSS JOIN LATERAL (
    {as_read}
  ) AS first
  CROSS JOIN LATERAL (
    SELECT min(n.seq) AS seq FROM {source} AS n
    WHERE n.shard = want.shard AND n.seq < want.seq AND n.seq > want.seq - %(distance)s
      AND n.entity_id = want.entity_id AND coalesce(n.entity_type, n.table_name) = want.type
      AND {fresh} AND {readable}
  ) AS late
  CROSS JOIN LATERAL (
    {waiting_behind}
  ) AS waiting
  CROSS JOIN LATERAL (
    SELECT array_agg(k.seq ORDER BY k.seq)::text AS later, max(k.seq) AS last, max(k.changed_at) AS changed_at
    FROM (
      SELECT n.seq, CASE WHEN isfinite(n.changed_at) THEN n.changed_at END AS changed_at,
             bool_and(n.operation = ANY (string_to_array(want.operations, ',')) AND NOT {barred}
                      AND (n.replay_of IS NOT NULL) = want.replays) OVER (ORDER BY n.seq) AS ours
      FROM {source} AS n
      WHERE n.shard = want.shard AND n.seq > want.seq AND n.seq < want.seq + %(distance)s
        AND n.entity_id = want.entity_id AND coalesce(n.entity_type, n.table_name) = want.type
        AND {fresh}
        AND n.seq < coalesce(waiting.seq, %(seq_max)s) AND late.seq IS NULL AND {readable}
      ORDER BY n.seq
      LIMIT %(count)s
    ) AS k
    WHERE k.ours
  ) AS behind
  CROSS JOIN LATERAL (
    SELECT CASE WHEN isfinite(first.changed_at) AND first.changed_at <= now() THEN greatest(0, least(
      want.quiet,
      want.quiet + extract(epoch FROM greatest(first.changed_at, behind.changed_at) - now())::float8,
      want.at_most + extract(epoch FROM first.changed_at - now())::float8
    )) ELSE 0 END AS wait_s
  ) AS wait
  LEFT JOIN LATERAL (
    SELECT {texts} FROM {source} AS n
    WHERE n.shard = want.shard AND n.seq = behind.last AND wait.wait_s = 0
      AND {fresh}
    LIMIT 1
  ) AS f ON true
) AS c

-- name: places
-- Not a statement: the rows of these groups but the last one of each, with its number. The first may wait, the others are
-- fresh; each by one probe.
SELECT found.place, g.first, g.last
FROM unnest(%(firsts)s::uuid[], %(shards)s::smallint[], %(later)s::text[], %(lasts)s::bigint[])
     AS g(first, shard, later, last)
CROSS JOIN LATERAL (
  (SELECT n.ctid AS place FROM {changes} AS n
   WHERE n.id = g.first AND NOT n.processed AND n.dead_at IS NULL LIMIT 1)
  UNION ALL
  SELECT fresh.place
  FROM unnest(g.later::bigint[]) AS behind(seq)
  CROSS JOIN LATERAL (
    SELECT n.ctid AS place FROM {changes} AS n
    WHERE n.shard = g.shard AND n.seq = behind.seq AND behind.seq <> g.last
      AND NOT n.processed AND n.next_attempt_at IS NULL AND n.dead_at IS NULL
    LIMIT 1
  ) AS fresh
) AS found

-- name: settle
-- In the transaction that records the outcome of the last one.
WITH places AS MATERIALIZED ({places})
UPDATE {changes} AS c
SET processed = true, processed_at = now(), next_attempt_at = NULL, started_by = NULL,
    last_error = 'coalesced into seq ' || places.last, error_summary = NULL, error_kind = NULL
FROM places
WHERE c.ctid = places.place AND NOT c.processed AND c.dead_at IS NULL
RETURNING 1

-- name: locked
-- Before a settle that leaves out rows locked by others: the first changes of the groups of which one is locked.
WITH places AS MATERIALIZED ({places}), free AS MATERIALIZED (
  SELECT c.ctid AS place FROM places JOIN {changes} AS c ON c.ctid = places.place FOR UPDATE OF c SKIP LOCKED
)
SELECT DISTINCT places.first FROM places WHERE NOT EXISTS (SELECT FROM free WHERE free.place = places.place)

-- name: indexed
-- Before the next one, at the end of a transactional handler's transaction: a connection of the application may plan it
-- with statistics of a table that was empty.
SELECT pg_catalog.set_config('enable_seqscan', 'off', true), pg_catalog.set_config('jit', 'off', true)

-- name: mark
-- All of a group, in the transaction of the handler; as outbox.sql marks one, and for the reasons given there every name
-- is qualified.
WITH places AS MATERIALIZED (
  (SELECT n.ctid AS place FROM {changes} AS n WHERE n.id OPERATOR(pg_catalog.=) %(first)s::pg_catalog.uuid LIMIT 1)
  UNION ALL
  SELECT fresh.place
  FROM pg_catalog.unnest(%(later)s::pg_catalog.int8[]) AS behind(seq)
  CROSS JOIN LATERAL (
    SELECT n.ctid AS place FROM {changes} AS n
    WHERE n.shard OPERATOR(pg_catalog.=) %(shard)s::pg_catalog.int2 AND n.seq OPERATOR(pg_catalog.=) behind.seq
      AND NOT n.processed AND n.next_attempt_at IS NULL AND n.dead_at IS NULL
    LIMIT 1
  ) AS fresh
), marked AS (
  UPDATE {changes} AS c
  SET processed = true, processed_at = pg_catalog.clock_timestamp(), next_attempt_at = NULL,
      last_error = CASE WHEN c.seq OPERATOR(pg_catalog.=) %(last)s::pg_catalog.int8 THEN c.last_error
                   ELSE pg_catalog.concat('coalesced into seq ', %(last)s::pg_catalog.int8) END,
      error_summary = CASE WHEN c.seq OPERATOR(pg_catalog.=) %(last)s::pg_catalog.int8 THEN c.error_summary END,
      error_kind = CASE WHEN c.seq OPERATOR(pg_catalog.=) %(last)s::pg_catalog.int8 THEN c.error_kind END
  WHERE c.ctid OPERATOR(pg_catalog.=) ANY (ARRAY(SELECT places.place FROM places)) AND NOT c.processed
    AND c.dead_at IS NULL AND pg_catalog.pg_current_xact_id() OPERATOR(pg_catalog.=) %(xid)s::pg_catalog.xid8
  RETURNING c.processed_at
)
SELECT pg_catalog.count(*)::pg_catalog.int4, pg_catalog.min(marked.processed_at),
       pg_catalog.current_setting('cdc.captured', true) OPERATOR(pg_catalog.=) 'on'::pg_catalog.text
FROM marked
HAVING pg_catalog.count(*) OPERATOR(pg_catalog.>) 0::pg_catalog.int8
