-- Limits of handlers: what operators set, and what consumers lease. {controls} and {limit_leases} are the tables.

-- name: now_s
-- Not a statement: the server's time in seconds, also after a wait for a lock.
extract(epoch FROM clock_timestamp())::float8

-- name: others
-- Not a statement: of the row k, what the others have: a lease ends %(lease_s)s after the last request of its consumer, and
-- what it may have used then rests on. A time that is yet to come was written before the server's clock went back: it
-- becomes now, which is later than it was, or a dead consumer would keep its part until then.
SELECT o.key AS consumer,
       CASE WHEN (o.value ->> 3)::float8 > {now_s} THEN jsonb_set(o.value, ARRAY['3'], to_jsonb({now_s})) ELSE o.value END AS value,
       CASE WHEN (o.value ->> 3)::float8 + %(lease_s)s + (o.value ->> 4)::float8 > {now_s} THEN (o.value ->> 0)::int ELSE 0 END AS permits,
       CASE WHEN (o.value ->> 3)::float8 + %(lease_s)s > {now_s} THEN (o.value ->> 1)::int ELSE 0 END AS slots
FROM jsonb_each(k.leases) AS o WHERE o.key <> %(me)s

-- name: lease
-- What is asked for, as far as others do not have it. The row is locked from here to the end of the statement, and what
-- others have is read as it is then; rows come in the order of their keys, so that two consumers do not block each other.
WITH forgotten AS (
  DELETE FROM {limit_leases} AS f
  WHERE f.idle_at < clock_timestamp() - interval '1 minute' AND f.ctid = ANY (ARRAY(
    SELECT old.ctid FROM {limit_leases} AS old WHERE old.idle_at < clock_timestamp() - interval '1 minute'
    LIMIT 100 FOR UPDATE SKIP LOCKED))
)
INSERT INTO {limit_leases} AS k (subscription, handler, key, leases, idle_at)
SELECT %(subscription_name)s, a.handler, a.key,
       jsonb_build_object(%(me)s::text, jsonb_build_array(
         least(a.permits, a.total), least(a.slots, a.slots_total), a.wants, {now_s}, a.for_s, a.total, a.slots_total)),
       clock_timestamp() + make_interval(secs => %(lease_s)s + a.for_s)
FROM unnest(%(handlers)s::text[], %(keys)s::text[], %(permits)s::int[], %(slots)s::int[], %(wants)s::int[],
            %(for_s)s::float8[], %(totals)s::int[], %(slots_totals)s::int[])
       AS a(handler, key, permits, slots, wants, for_s, total, slots_total)
ORDER BY a.handler, a.key
ON CONFLICT (subscription, handler, key) DO UPDATE SET
  idle_at = greatest(k.idle_at, excluded.idle_at),
  leases = (
    SELECT coalesce(jsonb_object_agg(o.consumer, o.value) FILTER (WHERE o.permits > 0 OR o.slots > 0
                      OR (o.value ->> 3)::float8 + %(lease_s)s > {now_s}), '{{}}')
           || jsonb_build_object(%(me)s::text, jsonb_build_array(
             greatest(0, least((m.value ->> 0)::int, (m.value ->> 5)::int - coalesce(sum(o.permits), 0)::int)),
             greatest(0, least((m.value ->> 1)::int, (m.value ->> 6)::int - coalesce(sum(o.slots), 0)::int)),
             m.value -> 2, {now_s}, m.value -> 4, m.value -> 5, m.value -> 6))
    FROM (SELECT excluded.leases -> %(me)s::text AS value) AS m LEFT JOIN LATERAL ({others}) AS o ON true
    GROUP BY m.value
  )
RETURNING k.handler, k.key, {now_s} AS at, k.leases

-- name: set
-- In place of another one of the same handler. No row: there are too many.
WITH replaced AS (
  DELETE FROM {controls} AS c
  WHERE c.handler = %(handler)s::text AND c.subscription IS NOT DISTINCT FROM %(subscription)s::text AND {is_limit}
)
INSERT INTO {controls} (subscription, handler, because, set_by, rate, burst, at_once, by_path)
SELECT %(subscription)s::text, %(handler)s::text, %(because)s::text, %(set_by)s::text, %(rate)s::text, %(burst)s::integer,
       %(at_once)s::integer, %(by_path)s::text
WHERE (SELECT count(*) FROM {controls}) < %(max)s::integer
RETURNING id

-- name: is_limit
-- Not a statement: whether the row c is a limit.
(c.rate IS NOT NULL OR c.at_once IS NOT NULL)

-- name: clear
DELETE FROM {controls} AS c
WHERE {is_limit} AND (%(all)s::boolean
  OR c.handler = %(handler)s::text AND c.subscription IS NOT DISTINCT FROM %(subscription)s::text)
RETURNING c.id

-- name: all
SELECT c.id, c.handler, c.rate, c.burst, c.at_once, c.by_path, c.subscription, c.because, c.set_by, c.role::text AS role, c.set_at
FROM {controls} AS c WHERE {is_limit} ORDER BY c.id LIMIT %(max)s::integer

-- name: in_use
-- Of each limited handler what its consumers have leased now, and how much work they said that they have. Of a bounded
-- number of keys; a lease that is over is left out.
SELECT l.subscription, l.handler, count(DISTINCT l.key)::int AS keys, count(DISTINCT o.key)::int AS consumers,
       coalesce(sum((o.value ->> 0)::int), 0)::int AS permits, max((o.value ->> 5)::int) AS permits_of_key,
       coalesce(sum((o.value ->> 1)::int), 0)::int AS slots, max((o.value ->> 6)::int) AS slots_of_key,
       coalesce(sum((o.value ->> 2)::int), 0)::bigint AS wants
FROM (SELECT k.subscription, k.handler, k.key, k.leases FROM {limit_leases} AS k
      WHERE k.idle_at > clock_timestamp() LIMIT %(max)s::integer) AS l
CROSS JOIN LATERAL jsonb_each(l.leases) AS o
WHERE (o.value ->> 3)::float8 + %(lease_s)s > {now_s}
GROUP BY l.subscription, l.handler ORDER BY l.subscription, l.handler
