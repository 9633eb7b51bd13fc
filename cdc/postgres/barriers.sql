-- Changes of whole tables that are not settled. {barriers} is the qualified table.

-- name: stands
-- Not a statement: whether the barrier t holds back what comes after it, which it does until it is settled. The same is
-- in barred() of sql/.
NOT t.processed AND (t.dead_at IS NULL OR t.next_attempt_at = 'infinity')

-- name: advance
-- Of some barriers, from a type on: those that stand no more are removed. Of each type the first gets how far all fresh
-- changes of the type before it are settled. Only the next one of each shard is looked at where it is of the type; else
-- so many, for a backlog of other types may lie before it. Returns the last type where there may be more, and whether
-- any is left. Of that type only these are looked at: the others wait for them. Rows that another consumer looks at are left
-- to it.
WITH page AS MATERIALIZED (
  SELECT b.entity_type, b.seq, b.examined, b.clear,
         EXISTS (SELECT FROM {changes} AS t WHERE t.id = b.id AND {stands}) AS stands
  FROM {barriers} AS b
  WHERE b.entity_type > %(type)s::text
  ORDER BY b.entity_type, b.seq
  LIMIT %(limit)s
  FOR UPDATE OF b SKIP LOCKED
), first AS MATERIALIZED (
  SELECT f.*, (%(scan)s / count(*) OVER ())::bigint + 1 AS scan,
         EXISTS (
           SELECT FROM unnest(f.examined) WITH ORDINALITY AS shard(seq, number)
           CROSS JOIN LATERAL (
             SELECT coalesce(n.entity_type, n.table_name) = f.entity_type AS of_type FROM {changes} AS n
             WHERE n.shard = shard.number - 1 AND n.seq > shard.seq AND n.seq < f.seq
               AND NOT n.processed AND n.next_attempt_at IS NULL AND n.dead_at IS NULL
             ORDER BY n.seq LIMIT 1
           ) AS next
           WHERE next.of_type
         ) AS waits
  FROM (SELECT page.*, lag(seq) OVER (PARTITION BY entity_type ORDER BY seq) IS NULL AS first FROM page WHERE stands) AS f
  WHERE f.first AND NOT f.clear
), looked AS MATERIALIZED (
  SELECT first.entity_type, first.seq, array_agg(walked.reached ORDER BY shard.number) AS examined,
         bool_and(walked.reached >= first.seq) AS clear
  FROM first
  CROSS JOIN LATERAL unnest(first.examined) WITH ORDINALITY AS shard(seq, number)
  CROSS JOIN LATERAL (
    SELECT coalesce(min(r.seq) FILTER (WHERE r.of_type) - 1, CASE WHEN count(*) < first.scan THEN first.seq END, max(r.seq))
             AS reached
    FROM (
      SELECT n.seq, coalesce(n.entity_type, n.table_name) = first.entity_type AS of_type FROM {changes} AS n
      WHERE n.shard = shard.number - 1 AND n.seq > shard.seq AND n.seq < first.seq
        AND NOT n.processed AND n.next_attempt_at IS NULL AND n.dead_at IS NULL
      ORDER BY n.seq LIMIT first.scan
    ) AS r
  ) AS walked
  WHERE NOT first.waits
  GROUP BY first.entity_type, first.seq
), gone AS (
  DELETE FROM {barriers} AS b USING page
  WHERE b.entity_type = page.entity_type AND b.seq = page.seq AND NOT page.stands
), advanced AS (
  UPDATE {barriers} AS b SET examined = looked.examined, clear = looked.clear FROM looked
  WHERE b.entity_type = looked.entity_type AND b.seq = looked.seq
    AND (b.examined <> looked.examined OR b.clear <> looked.clear)
)
SELECT EXISTS (SELECT FROM {barriers}), (
  SELECT max(page.entity_type) FROM page
  HAVING count(*) = %(limit)s AND EXISTS (SELECT FROM {barriers} AS b WHERE b.entity_type > max(page.entity_type))
)

-- name: oldest
-- Of some that stand the one captured first: its operation, type, number and state, how old it is, and whether all before it is
-- settled.
SELECT t.operation, left(b.entity_type, 200), b.seq,
       CASE WHEN t.dead_at IS NOT NULL THEN 'dead' WHEN t.next_attempt_at IS NOT NULL THEN 'waiting' ELSE 'fresh' END,
       extract(epoch FROM clock_timestamp() - t.changed_at)::float8, b.clear
FROM (SELECT * FROM {barriers} ORDER BY entity_type, seq LIMIT %(limit)s) AS b JOIN {changes} AS t ON t.id = b.id
WHERE {stands} AND isfinite(t.changed_at)
ORDER BY t.changed_at LIMIT 1
