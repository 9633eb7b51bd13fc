-- What consumers did of late, by what it was done to. {changes} and {attempts} are qualified tables. Each statement looks at
-- a bounded number of rows, in the order of an index.

-- name: processed
-- By type and operation: how many a second, and how long after they were written. Beyond the bound, over the time that
-- those took.
WITH looked AS MATERIALIZED (
  SELECT processed_at, changed_at, left(coalesce(entity_type, table_name), 200) AS type, left(operation, 200) AS operation
  FROM {changes}
  WHERE processed AND processed_at > now() - make_interval(secs => %(seconds)s::float8) AND processed_at < 'infinity'
    AND subscription IS NULL
  ORDER BY processed_at DESC LIMIT %(bound)s
), span AS MATERIALIZED (
  SELECT CASE WHEN count(*) < %(bound)s THEN %(seconds)s::float8
              ELSE greatest(extract(epoch FROM now() - min(processed_at))::float8, 1) END AS seconds
  FROM looked
), groups AS (
  SELECT l.type, l.operation, count(*) AS count,
         percentile_cont(ARRAY[0.5, 0.99]::float8[])
           WITHIN GROUP (ORDER BY CASE WHEN isfinite(l.changed_at)
             THEN greatest(extract(epoch FROM l.processed_at - l.changed_at)::float8, 0) END) AS latencies
  FROM looked AS l GROUP BY l.type, l.operation
)
SELECT g.type AS entity_type, g.operation, g.count / span.seconds AS per_s, g.latencies[1] AS latency_p50_s,
       g.latencies[2] AS latency_p99_s
FROM groups AS g CROSS JOIN span ORDER BY g.count DESC, g.type, g.operation LIMIT %(shown)s

-- name: failed
-- By subscription, handler and kind of error: how many attempts, after how many of them the change was dead, and when the
-- last one was. Attempts are numbered as they end.
WITH looked AS MATERIALIZED (
  SELECT a.subscription, left(a.handler, 200) AS handler, left(a.error_kind, 200) AS kind, a.outcome, a.ended_at
  FROM {attempts} AS a ORDER BY a.id DESC LIMIT %(bound)s
)
SELECT l.subscription, l.handler, l.kind AS error_kind, count(*)::int AS attempts,
       (count(*) FILTER (WHERE l.outcome IN ('dead', 'refused')))::int AS dead, max(l.ended_at) AS last_at,
       (SELECT count(*) >= %(bound)s AND min(o.ended_at) > now() - make_interval(secs => %(seconds)s::float8)
        FROM looked AS o) AS more
FROM looked AS l
WHERE l.ended_at > now() - make_interval(secs => %(seconds)s::float8)
GROUP BY l.subscription, l.handler, l.kind ORDER BY count(*) DESC, l.subscription, l.handler, l.kind LIMIT %(shown)s
