-- A subscription's statements, in place of those of the same names in outbox.sql; what is not here is read by those of
-- outbox.sql, from the blocks of this file. {changes} is the table of changes, {positions} and {subscription_changes} are
-- those of the progress.
--
-- What the columns of entity_changes say about a change is the default subscription's. To another one they say only in
-- which half of an index by shard and number it stands: that of fresh changes, or that of all others, which is made with
-- the first subscription. Each change is in exactly one of them, whatever was written by hand.

-- name: is_for
-- Not a statement: whether h is for this one, or for all. What is for another is nothing to it, not even a number to pass.
(h.subscription IS NULL OR h.subscription = %(subscription)s::smallint)

-- name: halves
-- Not a statement: all changes that are for this one or for all. Who asks for them by shard and in the order of their numbers
-- gets the two halves merged.
(
 (SELECT h.seq, h.shard, h.id, h.entity_type, h.entity_id, h.table_schema, h.table_name, h.operation, h.old_data, h.new_data,
         h.metadata, h.changed_at, h.caused_by, h.depth, h.replay_of, h.xmin
  FROM {changes} AS h WHERE NOT h.processed AND h.next_attempt_at IS NULL AND h.dead_at IS NULL AND {is_for}
  ORDER BY h.shard, h.seq)
 UNION ALL
 (SELECT h.seq, h.shard, h.id, h.entity_type, h.entity_id, h.table_schema, h.table_name, h.operation, h.old_data, h.new_data,
         h.metadata, h.changed_at, h.caused_by, h.depth, h.replay_of, h.xmin
  FROM {changes} AS h WHERE (h.processed OR h.next_attempt_at IS NOT NULL OR h.dead_at IS NOT NULL) AND {is_for}
  ORDER BY h.shard, h.seq)
)

-- name: source
-- Not a statement.
(SELECT a.*, NULL::jsonb AS tried FROM {halves} AS a)

-- name: position
-- Not a statement: that of the shard that is asked for; NULL: the subscription was dropped.
(SELECT p.seq FROM {positions} AS p WHERE p.subscription = %(subscription)s::smallint AND p.shard = want.shard)

-- name: row_of
-- Not a statement: the number of n if n has a row. No join, so that it is one probe for each n whatever the statistics.
(SELECT s.seq FROM {subscription_changes} AS s
 WHERE s.subscription = %(subscription)s::smallint AND s.shard = n.shard AND s.seq = n.seq LIMIT 1)

-- name: fresh
-- Not a statement: whether n of the shard that is asked for is fresh.
n.seq > {position} AND {row_of} IS NULL

-- name: maybe_fresh
-- Not a statement: as in outbox.sql.
n.seq > {position}

-- name: holds
-- Not a statement: whether w holds back the later changes of its key.
w.next_attempt_at IS NOT NULL AND (w.dead_at IS NULL OR w.next_attempt_at = 'infinity')

-- name: held
-- Not a statement: whether an earlier change of c's key waits. One that is gone from the outbox holds nothing back. Written
-- so that only the index of keys fits.
CASE WHEN (
  SELECT o.next_attempt_at FROM {subscription_changes} AS o
  WHERE o.subscription = %(subscription)s::smallint AND o.next_attempt_at <= 'infinity'
  ORDER BY o.next_attempt_at LIMIT 1
) IS NOT NULL THEN EXISTS (
  SELECT FROM {subscription_changes} AS w
  WHERE w.subscription - %(subscription)s::smallint = 0
    AND w.key_hash = hashtextextended(c.entity_id, hashtextextended(coalesce(c.entity_type, c.table_name), 0))
    AND {holds} AND w.seq - c.seq < 0
    AND (
      SELECT a.seq FROM {halves} AS a
      WHERE a.shard = w.shard AND a.seq = w.seq AND a.entity_id = c.entity_id
        AND coalesce(a.entity_type, a.table_name) = coalesce(c.entity_type, c.table_name)
      LIMIT 1
    ) IS NOT NULL
) ELSE false END

-- name: is_barrier
-- Not a statement: whether n is a change of a whole table. Written as in the index of these.
n.operation IN ('TRUNCATE', 'SCHEMA')

-- name: standing
-- Not a statement: such changes that are not settled here: fresh, waiting, or dead and holding back. The rows of
-- cdc_barriers are those that the default subscription has not settled, and say nothing about this one. All that are kept
-- are looked at, by their index: as a rule there is none.
SELECT coalesce(n.entity_type, n.table_name) AS entity_type, n.seq, n.changed_at
FROM {changes} AS n
CROSS JOIN LATERAL (SELECT n.shard) AS want
CROSS JOIN LATERAL (SELECT n.subscription) AS h
LEFT JOIN LATERAL (
  SELECT s.next_attempt_at, s.dead_at FROM {subscription_changes} AS s
  WHERE s.subscription = %(subscription)s::smallint AND s.shard = n.shard AND s.seq = n.seq LIMIT 1
) AS s ON true
WHERE {is_barrier} AND {is_for} AND (
  s.next_attempt_at IS NOT NULL AND (s.dead_at IS NULL OR s.next_attempt_at = 'infinity')
  OR n.seq > {position} AND {row_of} IS NULL
)

-- name: barred
-- Not a statement: whether n must not start: a change of a whole table of its type stands before it; or n is one, and a
-- change of its type before it is fresh or waits. Of the fresh ones before it only so many of each shard are walked: while
-- there are more, it does not start. All that it waits for were committed when its table was locked for it.
CASE WHEN (SELECT EXISTS (SELECT FROM {changes} AS n WHERE {is_barrier})) THEN
  coalesce(n.entity_type, n.table_name) = ANY (ARRAY(SELECT b.entity_type FROM ({standing}) AS b)) AND (
    EXISTS (
      SELECT FROM ({standing}) AS b WHERE b.entity_type = coalesce(n.entity_type, n.table_name) AND b.seq < n.seq
    )
    OR {is_barrier} AND EXISTS (
      SELECT FROM {positions} AS q
      CROSS JOIN LATERAL (
        SELECT max(e.place) AS last, bool_or(e.open) AS open
        FROM (
          SELECT e.seq, row_number() OVER (ORDER BY e.seq) AS place,
            coalesce(e.entity_type, e.table_name) = coalesce(n.entity_type, n.table_name)
            AND (
              SELECT s.seq FROM {subscription_changes} AS s
              WHERE s.subscription = %(subscription)s::smallint AND s.shard = e.shard AND s.seq = e.seq
                AND (s.next_attempt_at IS NULL OR s.dead_at IS NOT NULL)
              LIMIT 1
            ) IS NULL AS open
          FROM {halves} AS e
          WHERE e.shard = q.shard AND e.seq > q.seq AND e.seq < n.seq
          ORDER BY e.seq LIMIT 2000
        ) AS e
      ) AS walked
      WHERE q.subscription = %(subscription)s::smallint AND (walked.open OR walked.last >= 2000)
    )
    OR {is_barrier} AND (
      SELECT w.seq FROM {subscription_changes} AS w
      WHERE w.subscription = %(subscription)s::smallint
        AND w.type_hash = hashtextextended(coalesce(n.entity_type, n.table_name), 0)
        AND w.next_attempt_at IS NOT NULL AND w.dead_at IS NULL AND w.seq - n.seq < 0
        AND (
          SELECT a.seq FROM {halves} AS a
          WHERE a.shard = w.shard AND a.seq = w.seq
            AND coalesce(a.entity_type, a.table_name) = coalesce(n.entity_type, n.table_name)
          LIMIT 1
        ) IS NOT NULL
      ORDER BY w.next_attempt_at LIMIT 1
    ) IS NOT NULL
  )
ELSE false END

-- name: texts
-- Not a statement: as in outbox.sql, with what the subscription has tried.
n.seq, n.shard, n.id, n.entity_type, n.entity_id, n.table_schema, n.table_name, n.operation,
n.old_data::text AS old_data, n.new_data::text AS new_data, n.metadata::text AS metadata,
n.changed_at, coalesce((n.tried ->> 'count')::int, 0) AS error_count, (n.tried ->> 'started_by')::uuid AS started_by,
n.caused_by, n.depth, n.replay_of, {barred} AS barred

-- name: named
-- The subscription of this name, and its types.
SELECT subscription, types FROM {subscriptions} WHERE name = %(name)s

-- name: check
-- Whether all of it may be read.
SELECT {every_column} FROM {changes}
WHERE EXISTS (SELECT FROM {positions}) AND EXISTS (SELECT FROM {subscription_changes}) LIMIT 0

-- name: filtered
SELECT t.name FROM unnest(ARRAY[{regclass}, {positions_regclass}, {subscription_changes_regclass}]) AS t(name)
WHERE row_security_active(to_regclass(t.name)::oid)

-- name: missing_rights
SELECT string_agg(name, ', '), {positions_regclass}
FROM unnest(%(position_rights)s::text[]) AS r(name)
WHERE NOT has_table_privilege({positions_regclass}::regclass, name)
HAVING count(*) > 0
UNION ALL
SELECT string_agg(name, ', '), {subscription_changes_regclass}
FROM unnest(%(subscription_rights)s::text[]) AS r(name)
WHERE NOT has_table_privilege({subscription_changes_regclass}::regclass, name)
HAVING count(*) > 0
UNION ALL
{missing_of_attempts}

-- name: indexed
-- Those of the indexes that only subscriptions read by that are missing.
SELECT needed.name
FROM unnest(%(indexes)s::text[]) AS needed(name)
WHERE NOT EXISTS (
  SELECT FROM pg_index AS x JOIN pg_class AS i ON i.oid = x.indexrelid
  WHERE x.indrelid = {regclass}::regclass AND i.relname = needed.name AND x.indisvalid
)

-- name: waiting_types
-- Not a statement: as in outbox.sql.
SELECT hash, place FROM (
  WITH RECURSIVE found(hash, place) AS (
    (SELECT type_hash, 1 FROM {subscription_changes}
     WHERE subscription = %(subscription)s::smallint AND next_attempt_at IS NOT NULL AND dead_at IS NULL
       AND NOT %(among)s AND type_hash >= %(from)s
     ORDER BY 1 LIMIT 1)
    UNION ALL
    SELECT (SELECT type_hash FROM {subscription_changes}
            WHERE subscription = %(subscription)s::smallint AND next_attempt_at IS NOT NULL AND dead_at IS NULL
              AND type_hash > found.hash
            ORDER BY 1 LIMIT 1), found.place + 1
    FROM found WHERE found.hash IS NOT NULL AND found.place < %(types_max)s
  )
  SELECT hash, place FROM found WHERE hash IS NOT NULL
  UNION ALL
  SELECT DISTINCT hashtextextended(named.type, 0), 0 FROM unnest(%(types)s::text[]) AS named(type) WHERE %(among)s
) AS found

-- name: of_type
-- Not a statement: whether n is a waiting change of the type t, and wanted. Its text is compared with its change.
n.subscription = %(subscription)s::smallint AND n.type_hash = t.hash
AND (t.hash = ANY (ARRAY(SELECT hashtextextended(named.type, 0) FROM unnest(%(types)s::text[]) AS named(type)))) = %(among)s
AND n.next_attempt_at IS NOT NULL AND n.dead_at IS NULL

-- name: due
-- As in outbox.sql.
WITH page AS MATERIALIZED (
  SELECT due.seq, due.shard, due.next_attempt_at, due.tried
  FROM ({waiting_types}) AS t
  CROSS JOIN LATERAL (
    SELECT n.seq, n.shard, n.next_attempt_at, n.tried, row_number() OVER (ORDER BY n.next_attempt_at) AS place
    FROM {waiting_rows} AS n
    WHERE {of_type} AND n.next_attempt_at <= now() AND n.shard = ANY (%(shards)s::smallint[])
      AND (
        SELECT a.seq FROM {halves} AS a
        WHERE a.shard = n.shard AND a.seq = n.seq
          AND (coalesce(a.entity_type, a.table_name) = ANY (%(types)s::text[])) = %(among)s
        LIMIT 1
      ) IS NOT NULL
    ORDER BY n.next_attempt_at
    LIMIT %(limit)s
  ) AS due
  ORDER BY due.place
  LIMIT %(limit)s
)
SELECT {columns}
FROM (
  SELECT f.*, {fits}
  FROM (SELECT * FROM page ORDER BY page.next_attempt_at) AS ordered
  LEFT JOIN LATERAL (
    SELECT {texts} FROM (SELECT a.*, ordered.tried FROM {halves} AS a) AS n
    WHERE n.shard = ordered.shard AND n.seq = ordered.seq AND {readable}
    LIMIT 1
  ) AS f ON true
) AS c

-- name: waiting_rows
-- Not a statement: the table of what waits.
{subscription_changes}

-- name: recorded
-- Not a statement: whether s only says that its start was recorded, so that its change is fresh to who has started it.
s.next_attempt_at = '-infinity' AND s.dead_at IS NULL

-- name: all_positions
-- Not a statement: by shard, the first of which is at 1.
SELECT ARRAY(SELECT p.seq FROM {positions} AS p WHERE p.subscription = %(subscription)s::smallint ORDER BY p.shard) AS seqs

-- name: unless_there
-- Not a statement: where another session was first, its row stays, and none is returned. A start that was recorded is ours.
ON CONFLICT (subscription, seq) DO UPDATE
  SET next_attempt_at = NULL, type_hash = NULL, key_hash = NULL, tried = NULL
  WHERE {recorded}

-- name: settle_processed
-- Fresh changes that are processed. The first session to settle one wins, and the count shows it: its row is there, or
-- the position has passed it. For many changes all positions are read at once: they stand beside each other, and a search
-- for each change would take longer. Not for a few: while an old snapshot is held, each position has many versions.
WITH at AS MATERIALIZED ({all_positions}), done AS (
  INSERT INTO {subscription_changes} AS s (seq, subscription, shard)
  SELECT want.seq, %(subscription)s::smallint, want.shard
  FROM unnest(%(seqs)s::bigint[], %(shards)s::smallint[]) AS want(seq, shard)
  WHERE want.seq > CASE WHEN cardinality(%(seqs)s::bigint[]) > %(shards_max)s
    THEN (SELECT at.seqs FROM at WHERE cardinality(at.seqs) = %(shards_max)s + 1)[want.shard + 1]
    ELSE {position} END
  {unless_there}
  RETURNING 1
)
SELECT count(*)::int, now() FROM done

-- name: settle_moving
-- The same for many changes, by moving the positions themselves: what they pass needs no row, now or later. A position moves
-- as far as it is proved, up to the first change that is open and not one of these; what is behind that one gets a row. Only
-- the owner's session moves positions, and passes over those that a transactional handler's mark has locked. None moves
-- where more than so many rows lie between the positions: the last column says so. `lasts`: by shard, the highest of the
-- numbers; 0: there is none.
--
-- A row that is met on the way: done by another session, which was first; or with a recorded start, which was ours; or
-- waiting or dead, by another session, and stays.
WITH ours AS MATERIALIZED (
  SELECT p.shard, p.seq AS before, least(p.candidate, (%(lasts)s::bigint[])[p.shard + 1]) AS last
  FROM {positions} AS p
  WHERE p.subscription = %(subscription)s::smallint AND p.owner = %(process)s::uuid
    AND p.seq < p.candidate AND p.seq < (%(lasts)s::bigint[])[p.shard + 1]
    AND p.candidate_xid <= pg_snapshot_xmin(pg_current_snapshot())
  FOR NO KEY UPDATE SKIP LOCKED
), moving AS MATERIALIZED (
  SELECT ours.shard, ours.before, coalesce((
    SELECT n.seq - 1 FROM {halves} AS n
    WHERE n.shard = ours.shard AND n.seq > ours.before AND n.seq <= ours.last
      AND n.seq NOT IN (SELECT w FROM unnest(%(seqs)s::bigint[]) AS w) AND {open}
    ORDER BY n.seq LIMIT 1
  ), ours.last) AS seq
  FROM ours
), ahead AS MATERIALIZED (
  SELECT min(each.before) FILTER (WHERE each.seq > each.before) AS lowest, count(*) AS shards,
    max(each.seq) FILTER (WHERE each.seq > each.before) AS highest,
    array_agg(greatest(each.at, each.before) ORDER BY each.shard) AS ats,
    array_agg(each.before ORDER BY each.shard) AS befores, array_agg(each.seq ORDER BY each.shard) AS seqs
  FROM (
    SELECT e.shard, max(e.at) AS at, max(e.before) AS before, max(e.seq) AS seq
    FROM (
      SELECT p.shard, p.seq AS at, 0::bigint AS before, 0::bigint AS seq FROM {positions} AS p
      WHERE p.subscription = %(subscription)s::smallint
      UNION ALL
      SELECT moving.shard, 0, moving.before, moving.seq FROM moving
    ) AS e
    GROUP BY e.shard
  ) AS each
), between AS MATERIALIZED (
  SELECT s.ctid AS place, s.seq, s.shard, coalesce({recorded}, false) AS recorded,
    s.next_attempt_at IS NULL AND s.dead_at IS NULL AS done
  FROM {subscription_changes} AS s
  WHERE s.subscription = %(subscription)s::smallint
    AND s.seq > (SELECT ahead.lowest FROM ahead) AND s.seq <= (SELECT ahead.highest FROM ahead)
  LIMIT %(between_max)s + 1
), passed AS MATERIALIZED (
  SELECT ahead.befores, ahead.seqs FROM ahead WHERE (SELECT count(*) FROM between) <= %(between_max)s
), moved AS (
  UPDATE {positions} AS p SET seq = moving.seq FROM moving
  WHERE p.subscription = %(subscription)s::smallint AND p.shard = moving.shard AND moving.seq > moving.before
    AND EXISTS (SELECT FROM passed)
), met AS MATERIALIZED (
  SELECT b.* FROM between AS b
  WHERE b.seq > (SELECT passed.befores FROM passed)[b.shard + 1] AND b.seq <= (SELECT passed.seqs FROM passed)[b.shard + 1]
), gone AS (
  DELETE FROM {subscription_changes} AS s USING met
  WHERE s.ctid = met.place AND (met.done OR met.recorded)
    AND s.dead_at IS NULL AND (s.next_attempt_at IS NULL OR s.next_attempt_at = '-infinity')
), given AS MATERIALIZED (
  SELECT want.seq, want.shard, coalesce(want.seq <= (SELECT passed.seqs FROM passed)[want.shard + 1], false) AS passed
  FROM unnest(%(seqs)s::bigint[], %(shards)s::smallint[]) AS want(seq, shard)
  WHERE want.seq > (SELECT ahead.ats FROM ahead WHERE ahead.shards = %(shards_max)s + 1)[want.shard + 1]
), done AS (
  INSERT INTO {subscription_changes} AS s (seq, subscription, shard)
  SELECT given.seq, %(subscription)s::smallint, given.shard FROM given WHERE NOT given.passed
  {unless_there}
  RETURNING 1
)
SELECT (SELECT count(*) FROM done)::int + (SELECT count(*) FROM given WHERE given.passed)::int
     - (SELECT count(*) FILTER (WHERE met.seq IN (SELECT w FROM unnest(%(seqs)s::bigint[]) AS w))
        FROM met WHERE NOT met.recorded)::int,
  now(), NOT EXISTS (SELECT FROM passed)

-- name: failures
-- Not a statement: how many failed attempts s has.
coalesce((s.tried ->> 'count')::int, 0)

-- name: row_there
-- Not a statement: the row of the change that is wanted, if it has one, as r.
LEFT JOIN LATERAL (
  SELECT s.ctid AS place FROM {subscription_changes} AS s
  WHERE s.subscription = %(subscription)s::smallint AND s.shard = want.shard AND s.seq = want.seq
  LIMIT 1
) AS r ON true

-- name: settle_others
-- Retries, dead letters, discards, and waiting changes that are processed. What is done and not above the position needs no
-- row. `failures`: as in outbox.sql.
WITH given AS MATERIALIZED (
  SELECT want.*, r.place, {position} AS position,
    CASE WHEN want.pauses THEN 'infinity' ELSE now() + make_interval(secs => want.delay_s) END AS next_attempt_at,
    CASE WHEN want.dead THEN now() END AS dead_at,
    CASE WHEN NOT want.processed THEN hashtextextended(want.type, 0) END AS type_hash,
    CASE WHEN NOT want.processed THEN hashtextextended(want.entity_id, hashtextextended(want.type, 0)) END AS key_hash
  FROM unnest(%(seqs)s::bigint[], %(shards)s::smallint[], %(types)s::text[], %(entity_ids)s::text[],
              %(processed)s::bool[], %(dead)s::bool[], %(pauses)s::bool[], %(failed)s::int[], %(delays)s::float8[],
              %(errors)s::text[], %(summaries)s::text[], %(requeued)s::bool[], %(failures)s::int[], %(kinds)s::text[],
              %(attempts)s::jsonb[])
         AS want(seq, shard, type, entity_id, processed, dead, pauses, failed, delay_s, error, summary, requeued, failures,
                 kind, attempt)
  {row_there}
), gone AS (
  DELETE FROM {subscription_changes} AS s USING given AS g
  WHERE s.ctid = g.place AND g.requeued AND g.processed AND g.seq <= g.position
    AND s.next_attempt_at IS NOT NULL AND s.dead_at IS NULL AND (g.failures IS NULL OR {failures} = g.failures)
  RETURNING 1
), changed AS (
  UPDATE {subscription_changes} AS s
  SET next_attempt_at = g.next_attempt_at, dead_at = g.dead_at, type_hash = g.type_hash, key_hash = g.key_hash,
      tried = CASE WHEN NOT g.processed THEN jsonb_strip_nulls(jsonb_build_object(
        'count', {failures} + g.failed, 'error', coalesce(g.error, s.tried ->> 'error'),
        'summary', CASE WHEN g.error IS NULL THEN s.tried ->> 'summary' ELSE g.summary END,
        'kind', CASE WHEN g.error IS NULL THEN s.tried ->> 'kind' ELSE g.kind END)) END
  FROM given AS g
  WHERE s.ctid = g.place AND g.requeued AND g.seq > CASE WHEN g.processed THEN g.position ELSE 0 END
    AND s.next_attempt_at IS NOT NULL AND s.dead_at IS NULL AND (g.failures IS NULL OR {failures} = g.failures)
  RETURNING s.seq
), added AS (
  INSERT INTO {subscription_changes} AS s
    (seq, subscription, shard, next_attempt_at, dead_at, type_hash, key_hash, tried)
  SELECT g.seq, %(subscription)s::smallint, g.shard, g.next_attempt_at, g.dead_at, g.type_hash, g.key_hash,
    CASE WHEN NOT g.processed THEN
      jsonb_strip_nulls(
        jsonb_build_object('count', g.failed, 'error', g.error, 'summary', g.summary, 'kind', g.kind)) END
  FROM given AS g WHERE NOT g.requeued AND g.seq > g.position
  ON CONFLICT (subscription, seq) DO UPDATE
    SET next_attempt_at = excluded.next_attempt_at, dead_at = excluded.dead_at, type_hash = excluded.type_hash,
        key_hash = excluded.key_hash,
        tried = CASE WHEN excluded.tried IS NOT NULL THEN (coalesce(s.tried, '{{}}') - 'started_by') || excluded.tried
          || jsonb_build_object('count', {failures} + (excluded.tried ->> 'count')::int) END
    WHERE {recorded}
  RETURNING s.seq
), failed AS (
  SELECT g.seq, g.attempt FROM given AS g WHERE g.attempt IS NOT NULL
    AND g.seq = ANY (ARRAY(SELECT seq FROM changed UNION ALL SELECT seq FROM added))
), {keep_attempts}
SELECT (SELECT count(*) FROM gone)::int + (SELECT count(*) FROM changed)::int + (SELECT count(*) FROM added)::int, now()

-- name: locked
-- Before a settle that leaves out what others hold: the numbers of those. What a transactional handler has taken is held
-- by a lock of its number, as it may have no row yet; a row of another state by whoever has locked it.
WITH given AS MATERIALIZED (
  SELECT want.seq, r.place FROM unnest(%(seqs)s::bigint[], %(shards)s::smallint[]) AS want(seq, shard) {row_there}
)
SELECT given.seq FROM given WHERE NOT pg_try_advisory_xact_lock(hashint8extended(given.seq, %(locks)s::bigint))
UNION ALL
SELECT given.seq FROM given
WHERE given.place IS NOT NULL AND given.seq <> ALL (ARRAY(
  SELECT s.seq FROM given JOIN {subscription_changes} AS s ON s.ctid = given.place FOR UPDATE OF s SKIP LOCKED
))

-- name: start
-- On a shard whose owner died, before a handler starts. One that was fresh gets a row, which makes it waiting for everybody
-- else, and due at once. The position does not pass it. A row that another session has locked is not waited for. None of a
-- key gets one behind a change that another session has taken: that one stays fresh, and holds nothing back.
WITH given AS MATERIALIZED (
  SELECT want.*, r.place, {position} AS position
  FROM unnest(%(seqs)s::bigint[], %(shards)s::smallint[], %(types)s::text[], %(entity_ids)s::text[],
              %(requeued)s::bool[], %(failures)s::int[], %(errors)s::text[], %(handlers)s::text[])
         AS want(seq, shard, type, entity_id, requeued, failures, error, handler)
  {row_there}
), free AS MATERIALIZED (
  SELECT s.ctid AS place, s.seq, (s.tried ->> 'started_by')::uuid AS former, g.failures, g.error, g.handler
  FROM given AS g JOIN {subscription_changes} AS s ON s.ctid = g.place
  WHERE g.requeued AND s.next_attempt_at IS NOT NULL AND s.dead_at IS NULL
  FOR UPDATE OF s SKIP LOCKED
), changed AS (
  UPDATE {subscription_changes} AS s
  SET tried = coalesce(s.tried, '{{}}') || jsonb_build_object('started_by', %(process)s::uuid, 'count', free.failures)
    || CASE WHEN free.error IS NULL THEN '{{}}' ELSE jsonb_build_object('error', free.error, 'summary', free.error, 'kind', 'crash') END
  FROM free WHERE s.ctid = free.place
  RETURNING s.seq
), fresh_ones AS MATERIALIZED (
  SELECT g.*, pg_try_advisory_xact_lock(hashint8extended(g.seq, %(locks)s::bigint)) AS locked
  FROM given AS g WHERE NOT g.requeued AND g.seq > g.position
), added AS (
  INSERT INTO {subscription_changes} AS s (seq, subscription, shard, next_attempt_at, type_hash, key_hash, tried)
  SELECT g.seq, %(subscription)s::smallint, g.shard, '-infinity', hashtextextended(g.type, 0),
    hashtextextended(g.entity_id, hashtextextended(g.type, 0)),
    jsonb_build_object('started_by', %(process)s::uuid, 'count', g.failures)
  FROM fresh_ones AS g WHERE g.locked AND NOT EXISTS (
    SELECT FROM fresh_ones AS e WHERE NOT e.locked AND e.type = g.type AND e.entity_id = g.entity_id AND e.seq < g.seq
  )
  ON CONFLICT (subscription, seq) DO UPDATE SET tried = s.tried || excluded.tried WHERE {recorded}
  RETURNING s.seq
), failed AS (SELECT s.seq, {crash_attempt} AS attempt FROM free AS s), {keep_attempts}
SELECT seq FROM changed UNION ALL SELECT seq FROM added

-- name: unstart
-- At an orderly stop, or on a new session. What was fresh before waits from now on, and is due at once: another session may
-- own its shard by now, and has read on behind it, where it would not be found before a later change of its key.
WITH given AS MATERIALIZED (
  SELECT want.seq, r.place FROM unnest(%(seqs)s::bigint[], %(shards)s::smallint[]) AS want(seq, shard) {row_there}
), free AS MATERIALIZED (
  SELECT s.ctid AS place FROM given JOIN {subscription_changes} AS s ON s.ctid = given.place
  WHERE (s.tried ->> 'started_by')::uuid = %(process)s::uuid
  FOR UPDATE OF s SKIP LOCKED
)
UPDATE {subscription_changes} AS s
SET tried = s.tried - 'started_by', next_attempt_at = CASE WHEN {recorded} THEN now() ELSE s.next_attempt_at END
FROM free WHERE s.ctid = free.place

-- name: suspect
SELECT s.tried ->> 'error' IS NOT DISTINCT FROM %(crashed)s FROM {subscription_changes} AS s
WHERE s.subscription = %(subscription)s::smallint AND s.shard = %(shard)s::smallint AND s.seq = %(seq)s::bigint
  AND (s.tried ->> 'started_by')::uuid <> %(process)s::uuid AND s.next_attempt_at IS NOT NULL AND s.dead_at IS NULL

-- name: refuse
-- Dead letters of changes whose values cannot be read.
WITH given AS MATERIALIZED (
  SELECT g.*, want.seq, want.shard, r.place, {position} AS position,
    hashtextextended(want.type, 0) AS type_hash,
    hashtextextended(want.entity_id, hashtextextended(want.type, 0)) AS key_hash
  FROM unnest(%(ids)s::uuid[], %(errors)s::text[], %(summaries)s::text[], %(pauses)s::bool[])
       AS g(id, error, summary, pauses)
  CROSS JOIN LATERAL (
    SELECT c.seq, c.shard, c.entity_id, coalesce(c.entity_type, c.table_name) AS type
    FROM {changes} AS c WHERE c.id = g.id LIMIT 1
  ) AS want
  {row_there}
), changed AS (
  UPDATE {subscription_changes} AS s
  SET dead_at = now(), next_attempt_at = CASE WHEN g.pauses THEN 'infinity'::timestamptz END,
      tried = jsonb_build_object('count', {failures} + 1, 'error', g.error, 'summary', g.summary, 'kind', 'unreadable')
  FROM given AS g
  WHERE s.ctid = g.place AND s.next_attempt_at IS NOT NULL AND s.dead_at IS NULL
  RETURNING g.id, s.seq, (s.tried ->> 'count')::int AS attempt, g.error
), added AS (
  INSERT INTO {subscription_changes} AS s
    (seq, subscription, shard, next_attempt_at, dead_at, type_hash, key_hash, tried)
  SELECT g.seq, %(subscription)s::smallint, g.shard, CASE WHEN g.pauses THEN 'infinity'::timestamptz END, now(), g.type_hash,
    g.key_hash, jsonb_build_object('count', 1, 'error', g.error, 'summary', g.summary, 'kind', 'unreadable')
  FROM given AS g WHERE g.seq > g.position
  ON CONFLICT (subscription, seq) DO NOTHING
  RETURNING s.seq
), refused AS (
  SELECT id, seq, attempt, error FROM changed
  UNION ALL
  SELECT g.id, g.seq, 1, g.error FROM given AS g WHERE g.seq = ANY (ARRAY(SELECT seq FROM added))
), failed AS (SELECT s.seq, {refusal} AS attempt FROM refused AS s), {keep_attempts}
SELECT id FROM refused

-- name: take
-- For a transactional handler: those of its changes that are still as they were read and that no other session has taken.
-- A lock of the number, because a fresh one has no row; of so many only, as all sessions of a server share the room for locks,
-- and who finds none is refused, be it a writer. What is handled twice at once for want of a lock is marked once. Every name
-- is qualified, as in outbox.sql.
WITH begun AS MATERIALIZED (
  SELECT pg_catalog.pg_current_xact_id()::pg_catalog.text AS xid,
         pg_catalog.set_config('cdc.cause', %(cause)s, true),
         pg_catalog.set_config('idle_in_transaction_session_timeout', '0', true),
         CASE WHEN pg_catalog.current_setting('transaction_timeout', true) IS NOT NULL
              THEN pg_catalog.set_config('transaction_timeout', '0', true) END
), open AS MATERIALIZED (
  SELECT want.seq, want.place
  FROM ROWS FROM (
    pg_catalog.unnest(%(ids)s::pg_catalog.uuid[]), pg_catalog.unnest(%(seqs)s::pg_catalog.int8[]),
    pg_catalog.unnest(%(shards)s::pg_catalog.int2[]), pg_catalog.unnest(%(requeued)s::pg_catalog.bool[]),
    pg_catalog.unnest(%(failures)s::pg_catalog.int4[])
  ) WITH ORDINALITY AS want(id, seq, shard, requeued, failures, place)
  JOIN {changes} AS c ON c.id OPERATOR(pg_catalog.=) want.id
  JOIN {positions} AS p
    ON p.subscription OPERATOR(pg_catalog.=) %(subscription)s::pg_catalog.int2
   AND p.shard OPERATOR(pg_catalog.=) want.shard
  LEFT JOIN {subscription_changes} AS s
    ON s.subscription OPERATOR(pg_catalog.=) %(subscription)s::pg_catalog.int2
   AND s.shard OPERATOR(pg_catalog.=) want.shard AND s.seq OPERATOR(pg_catalog.=) want.seq
  WHERE s.dead_at IS NULL
    AND CASE WHEN want.requeued THEN s.next_attempt_at IS NOT NULL
        ELSE want.seq OPERATOR(pg_catalog.>) p.seq AND (s.seq IS NULL
          OR s.next_attempt_at OPERATOR(pg_catalog.=) '-infinity'::pg_catalog.timestamptz) END
    AND coalesce((s.tried OPERATOR(pg_catalog.->>) 'count'::pg_catalog.text)::pg_catalog.int4, 0)
      OPERATOR(pg_catalog.=) want.failures
)
SELECT begun.xid FROM begun CROSS JOIN open
WHERE CASE WHEN open.place OPERATOR(pg_catalog.<=) 100
      THEN pg_catalog.pg_try_advisory_xact_lock(pg_catalog.hashint8extended(open.seq, %(locks)s::pg_catalog.int8))
      ELSE true END

-- name: mark
-- The same changes, in the same transaction; no rows: the handler has ended the transaction it was given. The position is
-- read as it is now, and stays so until the commit: what another session has settled is not settled twice. Of such a
-- change the first column is NULL. All positions are locked before a row is written: who moves some of them may wait for
-- that row.
WITH at AS MATERIALIZED (
  SELECT p.shard, p.seq FROM {positions} AS p
  WHERE p.subscription OPERATOR(pg_catalog.=) %(subscription)s::pg_catalog.int2
    AND p.shard OPERATOR(pg_catalog.=) ANY (%(shards)s::pg_catalog.int2[])
  ORDER BY p.shard FOR SHARE
), want AS MATERIALIZED (
  SELECT w.seq, w.shard, w.requeued, r.place
  FROM ROWS FROM (
    pg_catalog.unnest(%(seqs)s::pg_catalog.int8[]), pg_catalog.unnest(%(shards)s::pg_catalog.int2[]),
    pg_catalog.unnest(%(requeued)s::pg_catalog.bool[])
  ) AS w(seq, shard, requeued)
  LEFT JOIN LATERAL (
    SELECT s.ctid AS place FROM {subscription_changes} AS s
    WHERE s.subscription OPERATOR(pg_catalog.=) %(subscription)s::pg_catalog.int2
      AND s.shard OPERATOR(pg_catalog.=) w.shard AND s.seq OPERATOR(pg_catalog.=) w.seq
    LIMIT 1
  ) AS r ON w.requeued
  WHERE pg_catalog.pg_current_xact_id() OPERATOR(pg_catalog.=) %(xid)s::pg_catalog.xid8
    AND (SELECT pg_catalog.count(*) FROM at) OPERATOR(pg_catalog.>=) 0
), gone AS (
  DELETE FROM {subscription_changes} AS s USING want, at
  WHERE want.requeued AND at.shard OPERATOR(pg_catalog.=) want.shard AND want.seq OPERATOR(pg_catalog.<=) at.seq
    AND s.ctid OPERATOR(pg_catalog.=) want.place AND s.next_attempt_at IS NOT NULL AND s.dead_at IS NULL
  RETURNING s.seq
), changed AS (
  UPDATE {subscription_changes} AS s SET next_attempt_at = NULL, type_hash = NULL, key_hash = NULL, tried = NULL
  FROM want, at
  WHERE want.requeued AND at.shard OPERATOR(pg_catalog.=) want.shard AND want.seq OPERATOR(pg_catalog.>) at.seq
    AND s.ctid OPERATOR(pg_catalog.=) want.place AND s.next_attempt_at IS NOT NULL AND s.dead_at IS NULL
  RETURNING s.seq
), added AS (
  INSERT INTO {subscription_changes} AS s (seq, subscription, shard)
  SELECT want.seq, %(subscription)s::pg_catalog.int2, want.shard
  FROM want JOIN at ON at.shard OPERATOR(pg_catalog.=) want.shard
  WHERE NOT want.requeued AND want.seq OPERATOR(pg_catalog.>) at.seq
  ON CONFLICT (subscription, seq) DO UPDATE
    SET next_attempt_at = NULL, type_hash = NULL, key_hash = NULL, tried = NULL
    WHERE s.next_attempt_at OPERATOR(pg_catalog.=) '-infinity'::pg_catalog.timestamptz AND s.dead_at IS NULL
  RETURNING s.seq
), marked AS (
  SELECT seq FROM gone UNION ALL SELECT seq FROM changed UNION ALL SELECT seq FROM added
)
SELECT CASE WHEN marked.seq IS NOT NULL THEN pg_catalog.clock_timestamp() END,
       pg_catalog.current_setting('cdc.captured', true) OPERATOR(pg_catalog.=) 'on'::pg_catalog.text
FROM want LEFT JOIN marked ON marked.seq OPERATOR(pg_catalog.=) want.seq

-- name: open
-- Not a statement: whether n keeps the position below it: it is of a type that is wanted, and neither done nor an
-- exception. To who has started it one whose start was recorded is fresh, and its outcome is a row above the position.
(coalesce(n.entity_type, n.table_name) = ANY (%(types)s::text[])) = %(among)s
AND (
  SELECT s.seq FROM {subscription_changes} AS s
  WHERE s.subscription = %(subscription)s::smallint AND s.shard = n.shard AND s.seq = n.seq
    AND NOT coalesce({recorded}, false)
  LIMIT 1
) IS NULL

-- name: advance
-- Moves the positions of these shards. A candidate that is proved stays so: the position moves up to it, or to what is before
-- the first change that is still to be done; and what is done up to there needs no row any more. One that is reached is
-- followed by another, the highest number that this statement sees, or that of the change so many above the position. An id
-- from the future is of before a restore. So each change is looked up once as the position passes it, and none of those
-- behind one that is still to be done.
--
-- A mark may be committed between the snapshot of what moves a position and the lock of it: its row says done, and is behind
-- the position. So rows are removed from where the position was at the look before, `since`, by shard; NULL: there was none.
--
-- Returns how many shards have a candidate that is not proved yet; how many pages all positions are in; of how many subscriptions
-- they are; and where the positions were, by shard.
WITH horizon AS MATERIALIZED (
  SELECT pg_snapshot_xmin(s)::text::bigint AS xmin,
         pg_snapshot_xmin(s)::text::bigint + age(pg_snapshot_xmin(s)::xid) AS next_xid
  FROM pg_current_snapshot() AS s
), at AS MATERIALIZED (
  SELECT p.shard, p.seq, p.candidate, p.candidate_xid::text::bigint AS candidate_xid,
    least((%(since)s::bigint[])[p.shard + 1], p.seq) AS since
  FROM {positions} AS p
  WHERE p.subscription = %(subscription)s::smallint AND p.shard = ANY (%(shards)s::smallint[])
  ORDER BY p.shard
  FOR NO KEY UPDATE SKIP LOCKED
), proved AS MATERIALIZED (
  SELECT at.shard, at.seq AS before, coalesce((
    SELECT n.seq - 1 FROM {halves} AS n
    WHERE n.shard = at.shard AND n.seq > at.seq AND n.seq <= at.candidate AND {open}
    ORDER BY n.seq LIMIT 1
  ), at.candidate) AS seq
  FROM at, horizon
  WHERE at.candidate_xid <= horizon.xmin
), followed AS MATERIALIZED (
  SELECT now_at.shard, now_at.seq, (
    SELECT max(n.seq) FROM (
      SELECT n.seq FROM {halves} AS n WHERE n.shard = now_at.shard AND n.seq > now_at.seq
      ORDER BY n.seq LIMIT %(scan)s
    ) AS n
  ) AS candidate
  FROM (
    SELECT at.shard, coalesce(proved.seq, at.seq) AS seq
    FROM at CROSS JOIN horizon LEFT JOIN proved ON proved.shard = at.shard
    WHERE proved.seq = at.candidate OR at.candidate IS NULL OR at.candidate_xid > horizon.next_xid
  ) AS now_at
), moved AS (
  UPDATE {positions} AS p
  SET seq = coalesce(proved.seq, at.seq),
      candidate = CASE WHEN followed.shard IS NULL THEN at.candidate ELSE followed.candidate END,
      candidate_xid = CASE WHEN followed.shard IS NULL THEN at.candidate_xid::text::xid8
                           WHEN followed.candidate IS NOT NULL THEN horizon.next_xid::text::xid8 END
  FROM at CROSS JOIN horizon
    LEFT JOIN proved ON proved.shard = at.shard
    LEFT JOIN followed ON followed.shard = at.shard
  WHERE p.subscription = %(subscription)s::smallint AND p.shard = at.shard
    AND (proved.seq > at.seq OR followed.candidate IS NOT NULL OR followed.shard IS NOT NULL AND at.candidate IS NOT NULL)
), passed AS MATERIALIZED (
  SELECT min(went.since) FILTER (WHERE went.seq > went.since) AS lowest,
    max(went.seq) FILTER (WHERE went.seq > went.since) AS highest, array_agg(went.before ORDER BY n.shard) AS at,
    array_agg(went.since ORDER BY n.shard) AS befores, array_agg(went.seq ORDER BY n.shard) AS seqs
  FROM generate_series(0, %(shards_max)s) AS n(shard)
  LEFT JOIN (
    SELECT at.shard, at.seq AS before, at.since, coalesce(proved.seq, at.seq) AS seq
    FROM at LEFT JOIN proved ON proved.shard = at.shard
  ) AS went ON went.shard = n.shard
), gone AS (
  DELETE FROM {subscription_changes} AS s
  WHERE s.subscription = %(subscription)s::smallint
    AND s.seq > (SELECT passed.lowest FROM passed) AND s.seq <= (SELECT passed.highest FROM passed)
    AND s.seq > (SELECT passed.befores FROM passed)[s.shard + 1] AND s.seq <= (SELECT passed.seqs FROM passed)[s.shard + 1]
    AND s.next_attempt_at IS NULL AND s.dead_at IS NULL
)
SELECT (SELECT count(*) FROM at CROSS JOIN horizon
        WHERE at.candidate_xid > horizon.xmin AND at.candidate_xid <= horizon.next_xid)::int
     + (SELECT count(*) FROM followed WHERE followed.candidate IS NOT NULL)::int,
  (pg_relation_size({positions_regclass}::regclass) / current_setting('block_size')::int)::int,
  (SELECT count(*) FROM {subscriptions})::int, (SELECT passed.at FROM passed)

-- name: figures
-- As in outbox.sql; of the changes above the positions only the first of each shard are examined. The oldest is of these types,
-- and of none of these keys.
WITH keys AS MATERIALIZED (
  SELECT k.type, k.id, hashtextextended(k.id, hashtextextended(k.type, 0)) AS hash
  FROM unnest(%(held_types)s::text[], %(held_ids)s::text[]) AS k(type, id)
), standing AS MATERIALIZED (
  SELECT s.* FROM ({standing}) AS s WHERE (s.entity_type = ANY (%(types)s::text[])) = %(among)s
), looked AS MATERIALIZED (
  SELECT c.*, row_number() OVER (PARTITION BY c.shard ORDER BY c.seq) AS place
  FROM {positions} AS p
  CROSS JOIN LATERAL (
    SELECT n.* FROM (
      SELECT n.shard, n.seq, n.entity_type, n.table_name, n.entity_id, n.changed_at FROM {halves} AS n
      WHERE n.shard = p.shard AND n.seq > p.seq
      ORDER BY n.seq LIMIT %(scan)s
    ) AS n
    WHERE (coalesce(n.entity_type, n.table_name) = ANY (%(types)s::text[])) = %(among)s
      AND {row_of} IS NULL
  ) AS c
  WHERE p.subscription = %(subscription)s::smallint
)
SELECT
  least((SELECT count(*) FROM looked), %(bound)s)::int AS fresh,
  (SELECT count(*) FROM (
     SELECT FROM {subscription_changes}
     WHERE subscription = %(subscription)s::smallint AND next_attempt_at <= 'infinity' AND dead_at IS NULL
     LIMIT %(bound)s) AS w)::int AS waiting,
  (SELECT count(*) FROM (
     SELECT FROM {subscription_changes}
     WHERE subscription = %(subscription)s::smallint AND dead_at IS NOT NULL LIMIT %(bound)s) AS d)::int AS dead,
  greatest(
    coalesce((SELECT extract(epoch FROM now() - min(c.changed_at) FILTER (WHERE isfinite(c.changed_at)))::float8
              FROM looked AS c WHERE c.place <= %(per_shard)s AND NOT {held}
                AND NOT EXISTS (
                  SELECT FROM standing AS b WHERE b.entity_type = coalesce(c.entity_type, c.table_name) AND b.seq < c.seq)
                AND NOT EXISTS (SELECT FROM keys AS k WHERE k.type = coalesce(c.entity_type, c.table_name) AND k.id = c.entity_id)), 0),
    coalesce((
      SELECT extract(epoch FROM now() - min(next_attempt_at))::float8 FROM {subscription_changes}
      WHERE subscription = %(subscription)s::smallint AND next_attempt_at <= 'infinity' AND next_attempt_at <= now()
        AND next_attempt_at > '-infinity' AND dead_at IS NULL
        AND (type_hash = ANY (ARRAY(SELECT hashtextextended(t, 0) FROM unnest(%(types)s::text[]) AS t))) = %(among)s
        AND NOT EXISTS (SELECT FROM keys AS k WHERE k.hash = key_hash)), 0),
    0) AS oldest_ready_age_s,
  pg_total_relation_size({regclass}::regclass)::bigint AS table_bytes,
  coalesce(pg_stat_get_dead_tuples({regclass}::regclass), 0)::bigint AS dead_tuples,
  (SELECT count(DISTINCT k.key_hash) FROM (
     SELECT w.key_hash FROM {subscription_changes} AS w
     WHERE w.subscription = %(subscription)s::smallint AND w.next_attempt_at <= 'infinity' AND {holds} LIMIT %(bound)s) AS k)::int AS blocked_keys,
  pg_notification_queue_usage() AS notify_queue_usage,
  coalesce((SELECT extract(epoch FROM now() - min(b.changed_at) FILTER (WHERE isfinite(b.changed_at)))::float8
            FROM standing AS b), 0) AS truncate_age_s,
  coalesce((SELECT extract(epoch FROM now() - min(dead_at))::float8 FROM {subscription_changes}
            WHERE subscription = %(subscription)s::smallint AND dead_at IS NOT NULL
              AND dead_at > '-infinity' AND dead_at < 'infinity'), 0) AS dead_age_s
