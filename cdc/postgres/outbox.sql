-- Every statement of the consumer on entity_changes, by name. {changes} is the qualified table.
--
-- The predicates of the partial indexes stay literal: with a parameter in their place the generic plan cannot use
-- the index. `held` is one probe a row into the index of waiting changes, and not even that while none waits.
--
-- Statistics taken while the queue is empty show no fresh and no waiting rows, so walking all of either looks as cheap
-- as a probe. With 50,000 fresh rows a fetch of 100 took 3.7 s, a mark 5 s, and no setting prevents that: each
-- statement is written so that such a plan is impossible.
--
-- The state of a row is a function of its columns, by precedence: processed, else dead (dead_at), else waiting
-- (next_attempt_at), else fresh. No constraint keeps rows that somebody writes by hand from saying two things at once, so
-- every statement asks for a state by all the columns that come before it. A row holds back its key while it waits, and as
-- a dead letter whose next attempt is at infinity. `next_attempt_at <= 'infinity'` says no more than IS NOT NULL, to choose
-- the index that is ordered by time.
--
-- Types and keys have any length, so their indexes hold a hash; the text is compared as well.
--
-- `next_xid` is the first transaction id that is not assigned yet, computed from age(), which counts back from there.
-- It is not the snapshot's xmax: that is one above the last *completed* id, and a hanging commit may well lie above it.

-- name: same_key
-- Not a statement: whether w and c have the same key.
hashtextextended(w.entity_id, hashtextextended(coalesce(w.entity_type, w.table_name), 0))
  = hashtextextended(c.entity_id, hashtextextended(coalesce(c.entity_type, c.table_name), 0))
AND coalesce(w.entity_type, w.table_name) = coalesce(c.entity_type, c.table_name) AND w.entity_id = c.entity_id

-- name: holds
-- Not a statement: whether w holds back the later changes of its key.
NOT w.processed AND w.next_attempt_at IS NOT NULL AND (w.dead_at IS NULL OR w.next_attempt_at = 'infinity')

-- name: held
-- Not a statement: whether an earlier change of c's key waits, as an expression over c.
CASE WHEN (SELECT EXISTS (SELECT FROM {changes} WHERE NOT processed AND next_attempt_at IS NOT NULL)) THEN EXISTS (
  SELECT FROM {changes} AS w
  WHERE {same_key} AND {holds} AND w.seq < c.seq
) ELSE false END

-- name: barred
-- Not a statement: whether a TRUNCATE keeps n from starting, as an expression over n. A function, which sees what this
-- statement sees, because to set up what it reads would cost a fetch a seventh also while there is no barrier. It is called
-- for changes of the types that have one.
CASE WHEN coalesce(n.entity_type, n.table_name) = ANY (ARRAY(SELECT DISTINCT b.entity_type FROM {barriers} AS b))
     THEN {is_barred}(coalesce(n.entity_type, n.table_name), n.seq) ELSE false END

-- name: texts
-- Not a statement: n as every read of changes has it, with its documents as the texts that are sent. Only the text
-- shows a document's size: the stored form may be compressed, and a number of 10 bytes may have 100,000 digits.
n.seq, n.shard, n.id, n.entity_type, n.entity_id, n.table_schema, n.table_name, n.operation,
n.old_data::text AS old_data, n.new_data::text AS new_data, n.metadata::text AS metadata,
n.changed_at, n.error_count, n.started_by, n.caused_by, n.depth, n.replay_of, {barred} AS barred

-- name: source
-- Not a statement: where changes are read from, as n. A subscription's is another.
{changes}

-- name: fresh
-- Not a statement: whether n is fresh.
NOT n.processed AND n.next_attempt_at IS NULL AND n.dead_at IS NULL

-- name: readable
-- Not a statement: whether n is not among the changes that must not be read.
n.seq <> ALL (%(skipped)s::bigint[])

-- name: fits
-- Not a statement: whether the rows before f leave room for it in the page. The first row always fits. It follows the
-- order in which the rows come: a sort would hold every text until all are read. A float, because an int overflows.
coalesce(sum(
  octet_length(f.entity_id)::float8 + octet_length(coalesce(f.entity_type, f.table_name))
  + coalesce(octet_length(f.old_data), 0) + coalesce(octet_length(f.new_data), 0) + coalesce(octet_length(f.metadata), 0)
) OVER (ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), 0) < %(page_bytes)s AS fits

-- name: columns
-- Not a statement: the columns that every read of changes returns, in the order in which rows are unpacked. For a row
-- that does not fit, only the number; for one that must not start, no document. A depth of 0 is not sent, since it is that of most rows. Two types that no column of
-- ours has mark what is loaded in another way: varchar a document that stays unread, bpchar the operation.
c.seq, c.shard, CASE WHEN c.fits THEN c.id END AS id,
CASE WHEN c.fits THEN coalesce(c.entity_type, c.table_name)::text END AS type, CASE WHEN c.fits THEN c.entity_id::text END,
CASE WHEN c.fits THEN c.table_schema::text END, CASE WHEN c.fits THEN c.table_name::text END, c.operation::bpchar,
CASE WHEN c.fits AND NOT c.barred THEN c.old_data::varchar END,
CASE WHEN c.fits AND NOT c.barred THEN c.new_data::varchar END,
CASE WHEN c.fits AND NOT c.barred THEN c.metadata::varchar END, c.changed_at, c.error_count,
coalesce(c.started_by <> %(process)s, false) AS crashed, c.caused_by, nullif(c.depth, 0) AS depth, c.replay_of,
CASE WHEN c.fits THEN {held} END AS held, c.barred

-- name: check
-- Whether the table exists, has the columns of this version, and may be read.
SELECT {every_column} FROM {changes} LIMIT 0

-- name: filtered
-- Tables of the outbox that would show this role only some of their rows; our sessions are refused there.
SELECT t.name FROM unnest(ARRAY[{regclass}, {shards_regclass}, {barriers_regclass}]) AS t(name)
WHERE row_security_active(to_regclass(t.name)::oid)

-- name: missing_of_attempts
-- Not a statement: of those rights the ones on the attempts.
SELECT string_agg(name, ', '), {attempts_regclass}
FROM unnest(%(attempt_rights)s::text[]) AS r(name)
WHERE NOT has_table_privilege({attempts_regclass}::regclass, name)
HAVING count(*) > 0

-- name: missing_rights
-- Write rights that the consumer needs and this role lacks. Without them each change would be handled repeatedly.
SELECT 'UPDATE (' || string_agg(name, ', ') || ')', {regclass}
FROM unnest(%(state)s::text[]) AS c(name)
WHERE NOT has_column_privilege({regclass}::regclass, name, 'UPDATE')
HAVING count(*) > 0
UNION ALL
SELECT string_agg(name, ', '), {shards_regclass}
FROM unnest(%(shard_rights)s::text[]) AS r(name)
WHERE NOT has_table_privilege({shards_regclass}::regclass, name)
HAVING count(*) > 0
UNION ALL
SELECT string_agg(name, ', '), {barriers_regclass}
FROM unnest(%(barrier_rights)s::text[]) AS r(name)
WHERE NOT has_table_privilege({barriers_regclass}::regclass, name)
HAVING count(*) > 0
UNION ALL
SELECT string_agg(name, ', '), {positions_regclass}
FROM unnest(%(floor_rights)s::text[]) AS r(name)
WHERE NOT has_table_privilege({positions_regclass}::regclass, name)
HAVING count(*) > 0
UNION ALL
SELECT 'SELECT', {numbers_regclass} WHERE NOT has_sequence_privilege({numbers_regclass}::regclass, 'SELECT')
UNION ALL
{missing_of_attempts}
UNION ALL
SELECT 'EXECUTE', 'FUNCTION ' || {barred_regprocedure}
WHERE NOT has_function_privilege({barred_regprocedure}::regprocedure, 'EXECUTE')

-- name: fetch
-- By number: the fresh ones among these changes, in the order asked for. LIMIT makes it one probe of the index for
-- each; see the head of this file.
WITH horizon AS MATERIALIZED (
  SELECT pg_snapshot_xmin(s)::text::bigint AS xmin,
         pg_snapshot_xmin(s)::text::bigint + age(pg_snapshot_xmin(s)::xid) AS next_xid
  FROM pg_current_snapshot() AS s
)
SELECT horizon.xmin, horizon.next_xid, row.*
FROM horizon LEFT JOIN LATERAL (
  SELECT {columns}
  FROM (
    SELECT f.*, {fits}
    FROM unnest(%(seqs)s::bigint[], %(shards)s::smallint[]) AS want(seq, shard)
    CROSS JOIN LATERAL (
      SELECT {texts} FROM {source} AS n
      WHERE n.shard = want.shard AND n.seq = want.seq
        AND {fresh} AND {readable}
      LIMIT 1
    ) AS f
  ) AS c
) AS row ON true

-- name: fetch_one
-- The same for one change, which comes alone most often and always fits: half of what the server does for one in ``fetch``
-- is to prepare for many.
SELECT pg_snapshot_xmin(s)::text::bigint AS xmin,
       pg_snapshot_xmin(s)::text::bigint + age(pg_snapshot_xmin(s)::xid) AS next_xid, row.*
FROM pg_current_snapshot() AS s LEFT JOIN LATERAL (
  SELECT {columns}
  FROM (
    SELECT {texts}, true AS fits FROM {source} AS n
    WHERE n.shard = (%(shards)s::smallint[])[1] AND n.seq = (%(seqs)s::bigint[])[1]
      AND {fresh} AND {readable}
    LIMIT 1
  ) AS c
) AS row ON true

-- name: fetch_some
-- The same, but only changes of these types, or (not among) only of others. Of the other existing changes only the
-- number is returned, so that the reader need not look for them again.
WITH horizon AS MATERIALIZED (
  SELECT pg_snapshot_xmin(s)::text::bigint AS xmin,
         pg_snapshot_xmin(s)::text::bigint + age(pg_snapshot_xmin(s)::xid) AS next_xid
  FROM pg_current_snapshot() AS s
)
SELECT horizon.xmin, horizon.next_xid, row.*
FROM horizon LEFT JOIN LATERAL (
  SELECT c.found, {columns}
  FROM (
    SELECT there.seq AS found, f.*, {fits}
    FROM unnest(%(seqs)s::bigint[], %(shards)s::smallint[]) AS want(seq, shard)
    CROSS JOIN LATERAL (
      SELECT n.* FROM {source} AS n
      WHERE n.shard = want.shard AND n.seq = want.seq
        AND {fresh} AND {readable}
      LIMIT 1
    ) AS there
    LEFT JOIN LATERAL (
      SELECT {texts} FROM (SELECT there.*) AS n
      WHERE (coalesce(n.entity_type, n.table_name) = ANY (%(types)s::text[])) = %(among)s
      LIMIT 1
    ) AS f ON true
  ) AS c
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
  FROM (
    SELECT f.*, {fits}
    FROM unnest(%(shards)s::smallint[], %(floors)s::bigint[], %(cursors)s::bigint[], %(since)s::text[])
         AS want(shard, floor, cursor, since)
    CROSS JOIN LATERAL (
      SELECT {texts} FROM {source} AS n
      WHERE {next_ones} AND {fresh} AND {readable}
      ORDER BY n.seq
      LIMIT %(per_shard)s
    ) AS f
  ) AS c
) AS row ON true

-- name: next_ones
-- Not a statement: whether a sweep of the shard that is asked for comes to n.
n.shard = want.shard AND n.seq > want.floor AND (n.seq > want.cursor OR age(n.xmin) <= age(want.since::xid))

-- name: maybe_fresh
-- Not a statement: whether n is where fresh ones are, as the index has it: others may be there, too.
{fresh}

-- name: no_texts
-- Not a statement: in the place of the texts of n, of a shard in which there is none.
NULL, want.shard, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL

-- name: sweep_some
-- The same, but only changes of these types, or (not among) only of others. At most ``scan`` rows of a shard are examined:
-- a backlog of any length may lie before the wanted ones. Where that gave less than a page, a row without a change says how
-- far they reach, and how many there were. They are walked again for it: LIMIT has that wait until the wanted ones are out,
-- and most of the time they fill the page. To number each row while it is read would cost each a fifth more.
WITH horizon AS MATERIALIZED (
  SELECT pg_snapshot_xmin(s)::text::bigint AS xmin,
         pg_snapshot_xmin(s)::text::bigint + age(pg_snapshot_xmin(s)::xid) AS next_xid
  FROM pg_current_snapshot() AS s
)
SELECT horizon.xmin, horizon.next_xid, row.*
FROM horizon LEFT JOIN LATERAL (
  SELECT c.reached, c.walked, {columns}
  FROM (
    SELECT f.*, {fits}
    FROM unnest(%(shards)s::smallint[], %(floors)s::bigint[], %(cursors)s::bigint[], %(since)s::text[])
         AS want(shard, floor, cursor, since)
    CROSS JOIN LATERAL (
      (
        SELECT NULL::bigint AS reached, NULL::bigint AS walked, {texts}
        FROM (
          SELECT n.* FROM {source} AS n
          WHERE {next_ones} AND {maybe_fresh}
          ORDER BY n.seq
          LIMIT %(scan)s
        ) AS n
        WHERE (coalesce(n.entity_type, n.table_name) = ANY (%(types)s::text[])) = %(among)s AND {fresh} AND {readable}
        ORDER BY n.seq
        LIMIT %(per_shard)s
      )
      UNION ALL
      SELECT max(w.seq), count(*), {no_texts}
      FROM (SELECT n.seq FROM {source} AS n WHERE {next_ones} AND {maybe_fresh} ORDER BY n.seq LIMIT %(scan)s) AS w
      HAVING count(*) > 0
      LIMIT %(per_shard)s
    ) AS f
  ) AS c
) AS row ON true

-- name: read_keys
-- Further changes of single keys, from a number on, with the place of the key.
SELECT c.place, {columns}
FROM (
  SELECT want.place, f.*, {fits}
  FROM unnest(%(shards)s::smallint[], %(types)s::text[], %(ids)s::text[], %(seqs)s::bigint[])
       WITH ORDINALITY AS want(shard, type, entity_id, seq, place)
  CROSS JOIN LATERAL (
    SELECT {texts} FROM {source} AS n
    WHERE n.shard = want.shard AND n.seq >= want.seq
      AND n.entity_id = want.entity_id AND coalesce(n.entity_type, n.table_name) = want.type
      AND {fresh} AND {readable}
    ORDER BY n.seq
    LIMIT %(per_key)s
  ) AS f
) AS c

-- name: waiting_types
-- Not a statement: the hashes of the types that have waiting changes, from one on and a limited number of them, each by
-- one probe of the index; or (among) of these types. Here and below, next_attempt_at must not be compared with 'infinity':
-- that would offer the index that is ordered by time alone, and each probe would walk the waiting changes of all types.
SELECT hash, place FROM (
  WITH RECURSIVE found(hash, place) AS (
    (SELECT hashtextextended(coalesce(entity_type, table_name), 0), 1 FROM {changes}
     WHERE NOT processed AND next_attempt_at IS NOT NULL AND dead_at IS NULL AND NOT %(among)s
       AND hashtextextended(coalesce(entity_type, table_name), 0) >= %(from)s
     ORDER BY 1 LIMIT 1)
    UNION ALL
    SELECT (SELECT hashtextextended(coalesce(entity_type, table_name), 0) FROM {changes}
            WHERE NOT processed AND next_attempt_at IS NOT NULL AND dead_at IS NULL
              AND hashtextextended(coalesce(entity_type, table_name), 0) > found.hash
            ORDER BY 1 LIMIT 1), found.place + 1
    FROM found WHERE found.hash IS NOT NULL AND found.place < %(types_max)s
  )
  SELECT hash, place FROM found WHERE hash IS NOT NULL
  UNION ALL
  SELECT DISTINCT hashtextextended(named.type, 0), 0 FROM unnest(%(types)s::text[]) AS named(type) WHERE %(among)s
) AS found

-- name: of_type
-- Not a statement: whether n is a waiting change of the type t, and wanted.
hashtextextended(coalesce(n.entity_type, n.table_name), 0) = t.hash
AND (t.hash = ANY (ARRAY(SELECT hashtextextended(named.type, 0) FROM unnest(%(types)s::text[]) AS named(type)))) = %(among)s
AND (coalesce(n.entity_type, n.table_name) = ANY (%(types)s::text[])) = %(among)s
AND NOT n.processed AND n.next_attempt_at IS NOT NULL AND n.dead_at IS NULL

-- name: due
-- Waiting changes that are due, of each type the earliest: a type with a million of them does not fill the page. In the
-- index's order, so that a full page ends the scan; of two changes of one key the later is held. A change that must not
-- be read gives an empty row.
WITH page AS MATERIALIZED (
  SELECT w.id, w.next_attempt_at
  FROM ({waiting_types}) AS t
  CROSS JOIN LATERAL (
    SELECT n.id, n.next_attempt_at, row_number() OVER (ORDER BY n.next_attempt_at) AS place
    FROM {changes} AS n
    WHERE {of_type} AND n.next_attempt_at <= now() AND n.shard = ANY (%(shards)s::smallint[])
    ORDER BY n.next_attempt_at
    LIMIT %(limit)s
  ) AS w
  ORDER BY w.place
  LIMIT %(limit)s
)
SELECT {columns}
FROM (
  SELECT f.*, {fits}
  FROM (SELECT page.id FROM page ORDER BY page.next_attempt_at) AS ordered
  LEFT JOIN LATERAL (
    SELECT {texts} FROM {changes} AS n WHERE n.id = ordered.id AND {readable} LIMIT 1
  ) AS f ON true
) AS c

-- name: waiting_rows
-- Not a statement: the table of what waits.
{changes}

-- name: next_due
-- Seconds until the next waiting change of these shards is due; NULL: none waits, or only for ever. And the type to go on from, if not
-- all were visited.
WITH types AS MATERIALIZED ({waiting_types})
SELECT (
  SELECT extract(epoch FROM nullif(min(w.next_attempt_at), 'infinity') - now())::float8
  FROM types AS t
  CROSS JOIN LATERAL (
    SELECT n.next_attempt_at
    FROM {waiting_rows} AS n
    WHERE {of_type} AND n.next_attempt_at > now() AND n.shard = ANY (%(shards)s::smallint[])
    ORDER BY n.next_attempt_at
    LIMIT 1
  ) AS w
), (SELECT max(hash) FROM types HAVING max(place) >= %(types_max)s)

-- name: chains
-- The causes of these changes: each change and its causes up to a bound, the newest first, as a text. "..." stands for
-- further ones, beyond the bound or removed by retention. Types and ids are cut, as nothing else bounds their length.
-- Not a part of {columns}: setting it up would cost each fetch of a single row a tenth.
WITH RECURSIVE link AS (
  SELECT c.id AS newest, 1 AS step, c.caused_by, coalesce(c.entity_type, c.table_name) AS type, c.entity_id, c.operation
  FROM {changes} AS c WHERE c.id = ANY (%(ids)s::uuid[])
  UNION ALL
  SELECT link.newest, link.step + 1, c.caused_by, coalesce(c.entity_type, c.table_name), c.entity_id, c.operation
  FROM link JOIN {changes} AS c ON c.id = link.caused_by
  WHERE link.step < %(bound)s
)
SELECT newest,
       string_agg(left(type, 63) || ' ' || left(entity_id, 63) || ' ' || left(operation, 63), ' <- ' ORDER BY step)
       || CASE WHEN bool_and(caused_by IS NOT NULL) THEN ' <- ...' ELSE '' END
FROM link GROUP BY newest

-- name: marked_since
-- Changes marked processed after a moment, by any session; for observers. Many have the same moment, that of their
-- transaction; the index holds those in the order of their places. For other types only the moment and the place.
SELECT clock_timestamp(), row.*
FROM (SELECT) AS always LEFT JOIN LATERAL (
  SELECT c.processed_at, c.place::text, {columns}
  FROM (
    SELECT m.processed_at, m.place, f.*, {fits}
    FROM (
      SELECT n.*, n.ctid AS place FROM {changes} AS n
      WHERE n.processed AND n.processed_at >= %(after)s::timestamptz AND n.subscription IS NULL
        AND (n.processed_at > %(after)s::timestamptz OR n.ctid > %(place)s::tid)
      ORDER BY n.processed_at LIMIT %(limit)s
    ) AS m
    LEFT JOIN LATERAL (
      SELECT {texts} FROM (SELECT m.*) AS n
      WHERE (coalesce(n.entity_type, n.table_name) = ANY (%(types)s::text[])) = %(among)s AND {readable}
      LIMIT 1
    ) AS f ON true
  ) AS c
) AS row ON true

-- name: settle_processed
-- The common case: fresh changes that are processed. The first session to settle a row wins; the count shows it. They
-- are found as in fetch and updated in place; the guard is written so that it does not offer the fresh changes' index.
WITH marked AS (
  UPDATE {changes} AS c SET processed = true, processed_at = now()
  WHERE c.ctid = ANY (ARRAY(
      SELECT found.ctid
      FROM unnest(%(seqs)s::bigint[], %(shards)s::smallint[]) AS done(seq, shard)
      CROSS JOIN LATERAL (
        SELECT n.ctid FROM {changes} AS n
        WHERE n.shard = done.shard AND n.seq = done.seq
          AND NOT n.processed AND n.next_attempt_at IS NULL AND n.dead_at IS NULL
        LIMIT 1
      ) AS found
    ))
    AND NOT c.processed AND coalesce(c.next_attempt_at, c.dead_at) IS NULL
  RETURNING 1
)
SELECT count(*)::int, now() FROM marked

-- name: keep_attempts
-- Not a statement: what is kept of the attempts of failed (seq, attempt), in place of the oldest of the same changes.
forgotten AS (
  DELETE FROM {attempts} AS a
  WHERE a.id = ANY (ARRAY(
    SELECT o.id FROM failed AS f CROSS JOIN LATERAL (
      SELECT t.id FROM {attempts} AS t WHERE t.seq = f.seq AND t.subscription = %(subscription_name)s
      ORDER BY t.id DESC OFFSET %(attempts_kept)s - 1
    ) AS o WHERE f.attempt IS NOT NULL
  ))
), kept AS (
  INSERT INTO {attempts} (seq, subscription, attempt, consumer, handler, started_at, ended_at, outcome, error_kind, error_class,
                          error_text, frames)
  SELECT f.seq, %(subscription_name)s, a.attempt, coalesce(a.consumer, %(process)s), nullif(a.handler, ''),
         statement_timestamp() - make_interval(secs => coalesce(a.ended_s_ago, 0) + a.took_s),
         statement_timestamp() - make_interval(secs => coalesce(a.ended_s_ago, 0)),
         a.outcome, a.kind, a.error, a.text, coalesce(a.frames, '{{}}')
  FROM failed AS f CROSS JOIN LATERAL jsonb_to_record(f.attempt) AS a(
    attempt integer, consumer uuid, handler text, ended_s_ago float8, took_s float8, outcome text, kind text, error text,
    text text, frames text[])
  WHERE f.attempt IS NOT NULL
)

-- name: crash_attempt
-- Not a statement: the attempt of s that ended with its process, which it names; NULL: it did not.
CASE WHEN s.error IS NOT NULL THEN jsonb_build_object('attempt', s.failures, 'consumer', s.former, 'handler', s.handler,
  'outcome', 'crashed', 'kind', 'crash', 'error', 'CrashedError', 'text', s.error) END

-- name: settle_others
-- Retries, dead letters, discards, and waiting changes that are processed. `failures`: an earlier settle whose answer
-- was lost may have recorded the outcome; then the row's count differs.
WITH settled AS (
  UPDATE {changes} AS c
  SET processed = s.processed,
      processed_at = CASE WHEN s.processed THEN now() END,
      next_attempt_at = CASE WHEN s.pauses THEN 'infinity' ELSE now() + make_interval(secs => s.delay_s) END,
      dead_at = CASE WHEN s.dead THEN now() END,
      error_count = c.error_count + s.failed,
      last_error = coalesce(s.error, c.last_error),
      error_summary = CASE WHEN s.error IS NULL THEN c.error_summary ELSE s.summary END,
      error_kind = CASE WHEN s.error IS NULL THEN c.error_kind ELSE s.kind END,
      started_by = NULL
  FROM unnest(%(ids)s::uuid[], %(processed)s::bool[], %(dead)s::bool[], %(pauses)s::bool[], %(failed)s::int[],
              %(delays)s::float8[], %(errors)s::text[], %(summaries)s::text[], %(requeued)s::bool[],
              %(failures)s::int[], %(kinds)s::text[], %(attempts)s::jsonb[])
         AS s(id, processed, dead, pauses, failed, delay_s, error, summary, requeued, failures, kind, attempt)
  WHERE c.id = s.id AND NOT c.processed AND c.dead_at IS NULL
    AND (s.failures IS NULL OR (c.error_count = s.failures AND (c.next_attempt_at IS NOT NULL) = s.requeued))
  RETURNING c.seq, s.attempt
), failed AS (SELECT seq, attempt FROM settled), {keep_attempts}
SELECT count(*)::int, now() FROM settled

-- name: lock
-- Before a settle that leaves out rows locked by others.
SELECT c.id FROM {changes} AS c WHERE c.id = ANY (%(ids)s::uuid[]) FOR UPDATE OF c SKIP LOCKED

-- name: there
-- Those of the rows not locked that exist.
SELECT c.id FROM {changes} AS c WHERE c.id = ANY (%(ids)s::uuid[])

-- name: start
-- On a shard whose owner died, before a handler starts. The failures of a suspect include the start that failed. A row
-- that the dead owner's session still locks is not waited for: this session settles all other changes.
WITH free AS (
  SELECT c.ctid AS place, c.seq, c.started_by AS former, s.failures, s.error, s.handler
  FROM unnest(%(ids)s::uuid[], %(failures)s::int[], %(errors)s::text[], %(handlers)s::text[])
       AS s(id, failures, error, handler)
  JOIN {changes} AS c ON c.id = s.id
  WHERE NOT c.processed AND c.dead_at IS NULL
  FOR UPDATE OF c SKIP LOCKED
), started AS (
  UPDATE {changes} AS c
  SET started_by = %(process)s, error_count = free.failures, last_error = coalesce(free.error, c.last_error),
      error_summary = coalesce(free.error, c.error_summary),
      error_kind = CASE WHEN free.error IS NULL THEN c.error_kind ELSE 'crash' END
  FROM free WHERE c.ctid = free.place
  RETURNING c.id
), failed AS (SELECT s.seq, {crash_attempt} AS attempt FROM free AS s), {keep_attempts}
SELECT id FROM started

-- name: unstart
-- At an orderly stop, or on a new session. A row that a handler in a thread still locks is skipped: it ends by itself.
UPDATE {changes} SET started_by = NULL
WHERE id IN (
  SELECT id FROM {changes} WHERE id = ANY (%(ids)s::uuid[]) AND started_by = %(process)s AND NOT processed
  FOR UPDATE SKIP LOCKED
)

-- name: suspect
-- Before a suspect runs: a row if it is still one, and whether the last counted attempt ended in the same way.
SELECT last_error IS NOT DISTINCT FROM %(crashed)s FROM {changes} WHERE id = %(id)s AND started_by <> %(process)s AND NOT processed AND dead_at IS NULL

-- name: take
-- For a transactional handler: those of its changes that are still as they were read and that no other session holds. A
-- change that another session holds is skipped: it still runs there, which never means that it is processed.
--
-- This and the next two run on a connection of the application, with its search_path: so every name, operators
-- included, is qualified as the server's own. The application's limits for idle or long transactions do not apply to a
-- handler, whose limit is the consumer's; the limit for whole transactions exists from PostgreSQL 17 on.
WITH begun AS MATERIALIZED (
  SELECT pg_catalog.pg_current_xact_id()::pg_catalog.text AS xid,
         pg_catalog.set_config('cdc.cause', %(cause)s, true),
         pg_catalog.set_config('idle_in_transaction_session_timeout', '0', true),
         CASE WHEN pg_catalog.current_setting('transaction_timeout', true) IS NOT NULL
              THEN pg_catalog.set_config('transaction_timeout', '0', true) END
)
SELECT begun.xid
FROM begun
CROSS JOIN ROWS FROM (
  pg_catalog.unnest(%(ids)s::pg_catalog.uuid[]), pg_catalog.unnest(%(requeued)s::pg_catalog.bool[]),
  pg_catalog.unnest(%(failures)s::pg_catalog.int4[])
) AS want(id, requeued, failures)
JOIN {changes} AS c ON c.id OPERATOR(pg_catalog.=) want.id
WHERE NOT c.processed AND c.dead_at IS NULL
  AND (c.next_attempt_at IS NOT NULL) OPERATOR(pg_catalog.=) want.requeued
  AND c.error_count OPERATOR(pg_catalog.=) want.failures
FOR UPDATE OF c SKIP LOCKED

-- name: cause
-- The same transaction goes on with another change.
SELECT pg_catalog.set_config('cdc.cause', %(cause)s, true)

-- name: mark
-- The same changes, in the same transaction; no rows: the handler has ended the transaction it was given. And whether
-- that transaction has written a captured change.
UPDATE {changes} SET processed = true, processed_at = pg_catalog.clock_timestamp(), next_attempt_at = NULL
WHERE id OPERATOR(pg_catalog.=) ANY (%(ids)s::pg_catalog.uuid[]) AND NOT processed
  AND pg_catalog.pg_current_xact_id() OPERATOR(pg_catalog.=) %(xid)s::pg_catalog.xid8
RETURNING processed_at, pg_catalog.current_setting('cdc.captured', true) OPERATOR(pg_catalog.=) 'on'::pg_catalog.text

-- name: standing
-- Not a statement: of each type the TRUNCATE that holds it back now, where there is one; of many only some are examined.
SELECT DISTINCT ON (b.entity_type) b.entity_type, b.seq, b.clear, t.changed_at
FROM (SELECT * FROM {barriers} ORDER BY entity_type, seq LIMIT 1000) AS b
CROSS JOIN LATERAL (
  SELECT n.changed_at FROM {changes} AS n
  WHERE n.id = b.id AND NOT n.processed AND (n.dead_at IS NULL OR n.next_attempt_at = 'infinity') LIMIT 1
) AS t
ORDER BY b.entity_type, b.seq

-- name: held_by_truncate
-- Not a statement: whether one of these keeps c from starting, as an expression over c. For figures: of changes that are
-- read, {barred} says so.
EXISTS (
  SELECT FROM standing AS s
  WHERE s.entity_type = coalesce(c.entity_type, c.table_name) AND (c.seq > s.seq OR c.seq = s.seq AND NOT s.clear)
)

-- name: truncate_age
-- Not a statement: for how long the first of these has stood, in seconds; 0: there is none.
coalesce((SELECT extract(epoch FROM now() - min(s.changed_at) FILTER (WHERE isfinite(s.changed_at)))::float8
          FROM standing AS s), 0)

-- name: figures
-- For the metrics; a count that reaches its bound means "more".
WITH standing AS MATERIALIZED ({standing})
SELECT
  (SELECT count(*) FROM (SELECT FROM {changes} WHERE NOT processed AND next_attempt_at IS NULL AND dead_at IS NULL
                         LIMIT %(bound)s) AS f)::int AS fresh,
  (SELECT count(*) FROM (SELECT FROM {changes}
                         WHERE NOT processed AND next_attempt_at <= 'infinity' AND dead_at IS NULL
                         LIMIT %(bound)s) AS w)::int AS waiting,
  (SELECT count(*) FROM (SELECT FROM {changes} WHERE NOT processed AND dead_at IS NOT NULL LIMIT %(bound)s) AS d)::int AS dead,
  -- The oldest that could run now: of each shard the lowest fresh number that nothing holds back, and the waiting change
  -- that has been due the longest. A shard whose first rows are all blocked is left out: any number of them may lie
  -- behind one key.
  greatest(
    coalesce((
      SELECT extract(epoch FROM now() - min(c.changed_at) FILTER (WHERE isfinite(c.changed_at)))::float8
      FROM generate_series(0, %(shards)s - 1) AS s(shard)
      CROSS JOIN LATERAL (
        SELECT c.changed_at
        FROM (
          SELECT n.seq, n.entity_type, n.table_name, n.entity_id, n.changed_at FROM {changes} AS n
          WHERE n.shard = s.shard AND NOT n.processed AND n.next_attempt_at IS NULL AND n.dead_at IS NULL
          ORDER BY n.seq LIMIT %(per_shard)s
        ) AS c
        WHERE NOT {held} AND NOT {held_by_truncate}
        ORDER BY c.seq LIMIT 1
      ) AS c), 0),
    coalesce((
      SELECT extract(epoch FROM now() - min(next_attempt_at))::float8 FROM {changes}
      WHERE NOT processed AND next_attempt_at <= 'infinity' AND next_attempt_at <= now() AND dead_at IS NULL
        AND next_attempt_at > '-infinity'), 0),
    0) AS oldest_ready_age_s,
  pg_total_relation_size({regclass}::regclass)::bigint AS table_bytes,
  coalesce(pg_stat_get_dead_tuples({regclass}::regclass), 0)::bigint AS dead_tuples,
  (SELECT count(DISTINCT (k.entity_type, k.entity_id))
   FROM (SELECT coalesce(w.entity_type, w.table_name) AS entity_type, w.entity_id FROM {changes} AS w
         WHERE {holds} LIMIT %(bound)s) AS k)::int AS blocked_keys,
  pg_notification_queue_usage() AS notify_queue_usage,
  {truncate_age} AS truncate_age_s,
  coalesce((SELECT extract(epoch FROM now() - min(dead_at))::float8 FROM {changes}
            WHERE NOT processed AND dead_at IS NOT NULL AND dead_at > '-infinity' AND dead_at < 'infinity'), 0) AS dead_age_s

-- name: outside
-- The types of the first fresh changes of each shard that no handler here wants, with their numbers.
SELECT type, count(*)::int
FROM (
  SELECT coalesce(fresh.entity_type, fresh.table_name) AS type
  FROM generate_series(0, %(shards)s - 1) AS s(shard)
  CROSS JOIN LATERAL (
    SELECT n.entity_type, n.table_name FROM {changes} AS n
    WHERE n.shard = s.shard AND NOT n.processed AND n.next_attempt_at IS NULL AND n.dead_at IS NULL
    ORDER BY n.seq LIMIT %(scan)s
  ) AS fresh
) AS looked
WHERE (type = ANY (%(types)s::text[])) <> %(among)s
GROUP BY type ORDER BY 2 DESC, 1 LIMIT %(bound)s

-- name: figures_some
-- The same, but only of these types, or (not among) only of others. No index finds the fresh changes of a type, so only
-- the first ones of each shard are examined; wanted changes beyond those are not counted.
WITH standing AS MATERIALIZED (
  SELECT * FROM ({standing}) AS of_all WHERE (of_all.entity_type = ANY (%(types)s::text[])) = %(among)s
), looked AS MATERIALIZED (
  SELECT c.* FROM generate_series(0, %(shards)s - 1) AS s(shard)
  CROSS JOIN LATERAL (
    SELECT n.shard, n.seq, n.entity_type, n.table_name, n.entity_id, n.changed_at FROM {changes} AS n
    WHERE n.shard = s.shard AND NOT n.processed AND n.next_attempt_at IS NULL AND n.dead_at IS NULL
    ORDER BY n.seq LIMIT %(scan)s
  ) AS c
), ours AS MATERIALIZED (
  SELECT *, row_number() OVER (PARTITION BY shard ORDER BY seq) AS place FROM looked
  WHERE (coalesce(entity_type, table_name) = ANY (%(types)s::text[])) = %(among)s
), waiting AS MATERIALIZED (
  SELECT w.next_attempt_at
  FROM ({waiting_types}) AS t
  CROSS JOIN LATERAL (
    SELECT n.next_attempt_at FROM {changes} AS n WHERE {of_type} ORDER BY n.next_attempt_at LIMIT %(bound)s
  ) AS w
)
SELECT
  least((SELECT count(*) FROM ours), %(bound)s)::int AS fresh,
  least((SELECT count(*) FROM waiting), %(bound)s)::int AS waiting,
  (SELECT count(*) FROM (
     SELECT coalesce(entity_type, table_name) AS type FROM {changes}
     WHERE NOT processed AND dead_at IS NOT NULL ORDER BY dead_at DESC LIMIT %(bound)s
   ) AS d WHERE (d.type = ANY (%(types)s::text[])) = %(among)s)::int AS dead,
  greatest(
    coalesce((SELECT extract(epoch FROM now() - min(c.changed_at) FILTER (WHERE isfinite(c.changed_at)))::float8
              FROM ours AS c WHERE c.place <= %(per_shard)s AND NOT {held} AND NOT {held_by_truncate}), 0),
    coalesce((SELECT extract(epoch FROM now() - min(next_attempt_at))::float8
              FROM waiting WHERE next_attempt_at <= now() AND next_attempt_at > '-infinity'), 0),
    0) AS oldest_ready_age_s,
  pg_total_relation_size({regclass}::regclass)::bigint AS table_bytes,
  coalesce(pg_stat_get_dead_tuples({regclass}::regclass), 0)::bigint AS dead_tuples,
  (SELECT count(DISTINCT (k.entity_type, k.entity_id))
   FROM (SELECT coalesce(w.entity_type, w.table_name) AS entity_type, w.entity_id FROM {changes} AS w
         WHERE {holds} LIMIT %(bound)s) AS k
   WHERE (k.entity_type = ANY (%(types)s::text[])) = %(among)s)::int AS blocked_keys,
  pg_notification_queue_usage() AS notify_queue_usage,
  {truncate_age} AS truncate_age_s,
  coalesce((SELECT extract(epoch FROM now() - min(d.dead_at))::float8 FROM (
     SELECT coalesce(entity_type, table_name) AS type, dead_at FROM {changes}
     WHERE NOT processed AND dead_at IS NOT NULL AND dead_at > '-infinity' AND dead_at < 'infinity'
     ORDER BY dead_at LIMIT %(bound)s
   ) AS d WHERE (d.type = ANY (%(types)s::text[])) = %(among)s), 0) AS dead_age_s
