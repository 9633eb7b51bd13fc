-- What operators have paused. {controls} is the qualified table; the first column of all is what a Pause begins with.

-- name: is_pause
-- Not a statement: whether the row c is one, and not the limit of a handler.
(c.rate IS NULL AND c.at_once IS NULL)

-- name: pause
-- In place of one of the same. What is over goes. No row: there are too many.
WITH replaced AS (
  DELETE FROM {controls} AS c
  WHERE c.until <= clock_timestamp()
     OR (c.subscription IS NOT DISTINCT FROM %(subscription)s::text AND c.entity_type IS NOT DISTINCT FROM %(entity_type)s::text
         AND c.handler IS NOT DISTINCT FROM %(handler)s::text AND c.entity_id IS NOT DISTINCT FROM %(entity_id)s::text
         AND {is_pause})
)
INSERT INTO {controls} (subscription, entity_type, handler, entity_id, because, set_by, until)
SELECT %(subscription)s::text, %(entity_type)s::text, %(handler)s::text, %(entity_id)s::text, %(because)s::text,
       %(set_by)s::text, clock_timestamp() + make_interval(secs => %(for_s)s::double precision)
WHERE (SELECT count(*) FROM {controls} AS c WHERE c.until IS NULL OR c.until > clock_timestamp()) < %(max)s::integer
RETURNING id

-- name: pause_keys
-- Several keys, each in place of a pause of the same. No row: there are too many.
WITH asked AS (
  SELECT DISTINCT a.type, a.id FROM unnest(%(types)s::text[], %(ids)s::text[]) AS a(type, id)
), replaced AS (
  DELETE FROM {controls} AS c
  WHERE c.until <= clock_timestamp()
     OR (c.subscription IS NOT DISTINCT FROM %(subscription)s::text AND c.handler IS NULL AND {is_pause}
         AND EXISTS (SELECT FROM asked AS a WHERE a.type = c.entity_type AND a.id = c.entity_id))
)
INSERT INTO {controls} (subscription, entity_type, entity_id, because, set_by, until)
SELECT %(subscription)s::text, a.type, a.id, %(because)s::text, %(set_by)s::text,
       clock_timestamp() + make_interval(secs => %(for_s)s::double precision)
FROM asked AS a
WHERE (SELECT count(*) FROM {controls} AS c WHERE c.until IS NULL OR c.until > clock_timestamp())
      + (SELECT count(*) FROM asked) <= %(max)s::integer
ORDER BY a.type, a.id
RETURNING id

-- name: resume_these
DELETE FROM {controls} AS c
WHERE (c.until IS NULL OR c.until > clock_timestamp()) AND {is_pause} AND c.id = ANY (%(ids)s::bigint[])
RETURNING c.id

-- name: resume
DELETE FROM {controls} AS c
WHERE (c.until IS NULL OR c.until > clock_timestamp()) AND {is_pause} AND (%(all)s::boolean OR (
  c.subscription IS NOT DISTINCT FROM %(subscription)s::text AND c.entity_type IS NOT DISTINCT FROM %(entity_type)s::text
  AND c.handler IS NOT DISTINCT FROM %(handler)s::text AND c.entity_id IS NOT DISTINCT FROM %(entity_id)s::text))
RETURNING c.id

-- name: in_force
-- Those in force, of all subscriptions.
SELECT c.id, c.subscription, c.entity_type, c.handler, c.entity_id, c.because, c.set_by,
       extract(epoch FROM clock_timestamp() - c.set_at)::float8 AS age_s,
       extract(epoch FROM c.until - clock_timestamp())::float8 AS ends_in_s,
       c.role::text AS role, c.set_at, c.until
FROM {controls} AS c WHERE (c.until IS NULL OR c.until > clock_timestamp()) AND {is_pause} ORDER BY c.id LIMIT %(max)s::integer

-- name: oldest_ready
-- As in outbox.sql, for changes of these types, or (not among) of others, that are not of one of these keys: how old the
-- oldest is that could run, in seconds; 0: none. Of each shard the first fresh ones are examined.
WITH standing AS MATERIALIZED (
  SELECT * FROM ({standing}) AS of_all WHERE (of_all.entity_type = ANY (%(types)s::text[])) = %(among)s
), keys AS MATERIALIZED (
  SELECT k.type, k.id FROM unnest(%(key_types)s::text[], %(key_ids)s::text[]) AS k(type, id)
), looked AS MATERIALIZED (
  SELECT c.* FROM generate_series(0, %(shards)s - 1) AS s(shard)
  CROSS JOIN LATERAL (
    SELECT n.shard, n.seq, n.entity_type, n.table_name, n.entity_id, n.changed_at FROM {changes} AS n
    WHERE n.shard = s.shard AND NOT n.processed AND n.next_attempt_at IS NULL AND n.dead_at IS NULL
    ORDER BY n.seq LIMIT %(scan)s
  ) AS c
), ours AS MATERIALIZED (
  SELECT * FROM looked AS l
  WHERE (coalesce(l.entity_type, l.table_name) = ANY (%(types)s::text[])) = %(among)s
    AND NOT EXISTS (SELECT FROM keys AS k WHERE k.type = coalesce(l.entity_type, l.table_name) AND k.id = l.entity_id)
), waiting AS MATERIALIZED (
  SELECT w.next_attempt_at
  FROM ({waiting_types}) AS t
  CROSS JOIN LATERAL (
    SELECT n.next_attempt_at FROM {changes} AS n
    WHERE {of_type} AND NOT EXISTS (
      SELECT FROM keys AS k WHERE k.type = coalesce(n.entity_type, n.table_name) AND k.id = n.entity_id)
    ORDER BY n.next_attempt_at LIMIT 1
  ) AS w
)
SELECT greatest(
  coalesce((SELECT extract(epoch FROM now() - min(c.changed_at) FILTER (WHERE isfinite(c.changed_at)))::float8
            FROM ours AS c WHERE NOT {held} AND NOT {held_by_truncate}), 0),
  coalesce((SELECT extract(epoch FROM now() - min(w.next_attempt_at))::float8
            FROM waiting AS w WHERE w.next_attempt_at <= now() AND w.next_attempt_at > '-infinity'), 0),
  0)
