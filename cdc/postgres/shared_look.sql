-- What the consumers of one process look at each second, for all of them at once. {subscriptions} and {subscription_changes} are
-- those of the progress; the numbers of locks are those of cdc/postgres/shard_locks.py.

-- name: look
-- Of each of these subscriptions: what changes when its consumers, their shards, its name or what is paused change, and in how
-- many seconds the first of its changes is due that waits; NULL: none waits. And of all: the snapshot, the number drawn last,
-- which is read after it, and in how many seconds the first event is due that is to be published later.
WITH held AS MATERIALIZED (
  SELECT l.classid::bigint AS class,
    string_agg(l.pid::text, ' ' ORDER BY l.pid) FILTER (WHERE l.objid = %(members)s::bigint::oid) AS members,
    count(DISTINCT l.objid) FILTER (WHERE l.objid < %(members)s::bigint::oid) AS taken,
    count(*) FILTER (WHERE l.objid = %(readers)s::bigint::oid) AS readers
  FROM pg_locks AS l
  WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 2
    AND l.database = (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database())
    AND l.classid = ANY (%(classes)s::bigint[]::oid[])
  GROUP BY l.classid
)
SELECT want.subscription,
  concat_ws(',', coalesce(held.members, ''), held.taken, held.readers, coalesce(s.name, ''), controls.ids) AS shares,
  CASE WHEN first.next_attempt_at = '-infinity' THEN 0
       WHEN first.next_attempt_at < 'infinity' THEN greatest(0, extract(epoch FROM first.next_attempt_at - clock_timestamp()))
  END::float8 AS due_s,
  at.xmin, at.next_xid, CASE WHEN drawn.is_called THEN drawn.last_value ELSE drawn.last_value - 1 END,
  extract(epoch FROM events.due - clock_timestamp())::float8 AS events_due_s
FROM (
  SELECT pg_snapshot_xmin(s)::text::bigint AS xmin,
         pg_snapshot_xmin(s)::text::bigint + age(pg_snapshot_xmin(s)::xid) AS next_xid
  FROM pg_current_snapshot() AS s
) AS at
CROSS JOIN {numbers} AS drawn
CROSS JOIN (
  SELECT string_agg(c.id::text, ' ' ORDER BY c.id) AS ids FROM {controls} AS c
  WHERE c.until IS NULL OR c.until > clock_timestamp()
) AS controls
LEFT JOIN LATERAL (
  SELECT d.due FROM {due_changes} AS d WHERE isfinite(d.due) ORDER BY d.due LIMIT 1
) AS events ON true
CROSS JOIN unnest(%(subscriptions)s::smallint[], %(classes)s::bigint[]) AS want(subscription, class)
LEFT JOIN held ON held.class = want.class
LEFT JOIN {subscriptions} AS s ON s.subscription = want.subscription
LEFT JOIN LATERAL (
  SELECT e.next_attempt_at FROM {subscription_changes} AS e
  WHERE e.subscription = want.subscription AND e.next_attempt_at <= 'infinity'
  ORDER BY e.next_attempt_at LIMIT 1
) AS first ON true
