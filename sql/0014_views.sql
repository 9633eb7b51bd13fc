-- For operators: two views. Safe to run again; takes no lock that a writer or a consumer waits for.

DO $cdc$
DECLARE
  v_old record;
BEGIN
  -- CREATE OR REPLACE keeps the grants, but cannot change columns. A view that has others is dropped first.
  FOR v_old IN
    SELECT expected.name, expected.columns
    FROM (VALUES
      ('action_processing_dashboard',
       'entity_type text, pending bigint, processed_today bigint, failed bigint,'
       ' last_processed_at timestamp with time zone, avg_processing_seconds numeric'),
      ('recent_action_history',
       'id uuid, entity_type text, operation text, changed_at timestamp with time zone, processed boolean,'
       ' processed_at timestamp with time zone, processing_delay_seconds numeric, error_count integer,'
       ' last_error text, preview text')
    ) AS expected (name, columns)
    JOIN pg_catalog.pg_class AS c
      ON c.oid = pg_catalog.to_regclass(pg_catalog.format('%I.%I', @schema_literal@, expected.name)) AND c.relkind = 'v'
    WHERE expected.columns <> (
      SELECT pg_catalog.string_agg(
        a.attname || ' ' || pg_catalog.format_type(a.atttypid, a.atttypmod), ', ' ORDER BY a.attnum)
      FROM pg_catalog.pg_attribute AS a WHERE a.attrelid = c.oid AND a.attnum > 0
    )
  LOOP
    EXECUTE pg_catalog.format('DROP VIEW %I.%I', @schema_literal@, v_old.name);
  END LOOP;
END
$cdc$;

-- The documented columns. The documented query reads the whole history at each refresh; this one reads what is not
-- processed, through the partial indexes, and what was processed today, through the index on processed_at:
--   pending              fresh or waiting. Documented: also dead letters, which are not tried again.
--   failed               not processed, and an attempt has failed: waiting for a retry, or dead. Documented: also what
--                        failed once and was processed since.
--   processed_today      by the day it was processed (in the session's TimeZone). Documented: by the day of the change.
--                        One that somebody marked without a time counts by its own.
--   last_processed_at    when it was processed. Documented: when it was changed. NULL if nothing was processed today.
--   avg_processing_seconds   of today, not of all time. One without a time of its own has no duration.
-- Infinite times, which only others write, are none: before version 17 the server refuses to subtract them, and many
-- readers have no value for them.
CREATE OR REPLACE VIEW @schema@.action_processing_dashboard AS
SELECT
  coalesce(entity_type, table_name) AS entity_type,
  count(*) FILTER (WHERE NOT processed AND dead_at IS NULL) AS pending,
  count(*) FILTER (WHERE processed) AS processed_today,
  count(*) FILTER (WHERE NOT processed AND (error_count > 0 OR dead_at IS NOT NULL)) AS failed,
  max(coalesce(processed_at, changed_at)) FILTER (WHERE processed AND isfinite(coalesce(processed_at, changed_at)))
    AS last_processed_at,
  avg(CASE WHEN isfinite(processed_at) AND isfinite(changed_at) THEN extract(epoch FROM processed_at - changed_at) END)
    FILTER (WHERE processed) AS avg_processing_seconds
FROM (
  SELECT entity_type, table_name, processed, dead_at, error_count, processed_at, changed_at
  FROM @schema@.entity_changes WHERE NOT processed AND next_attempt_at IS NULL AND dead_at IS NULL
  UNION ALL
  SELECT entity_type, table_name, processed, dead_at, error_count, processed_at, changed_at
  FROM @schema@.entity_changes WHERE NOT processed AND dead_at IS NULL AND next_attempt_at <= 'infinity'
  UNION ALL
  SELECT entity_type, table_name, processed, dead_at, error_count, processed_at, changed_at
  FROM @schema@.entity_changes WHERE NOT processed AND dead_at IS NOT NULL
  UNION ALL
  SELECT entity_type, table_name, processed, dead_at, error_count, processed_at, changed_at
  FROM @schema@.entity_changes WHERE processed AND processed_at >= date_trunc('day', now())
  UNION ALL
  SELECT entity_type, table_name, processed, dead_at, error_count, processed_at, changed_at
  FROM @schema@.entity_changes WHERE processed AND processed_at IS NULL AND changed_at >= date_trunc('day', now())
) AS change
GROUP BY 1;

-- As documented. A change of the last 24 hours that is processed was processed in the last 24 hours, so the index on
-- processed_at finds it, and none on changed_at is needed. An infinite processed_at is none here.
CREATE OR REPLACE VIEW @schema@.recent_action_history AS
SELECT
  id,
  entity_type,
  operation,
  changed_at,
  processed,
  CASE WHEN isfinite(processed_at) THEN processed_at END AS processed_at,
  CASE WHEN isfinite(processed_at) THEN extract(epoch FROM processed_at - changed_at) END AS processing_delay_seconds,
  error_count,
  last_error,
  CASE
    WHEN entity_type = 'reaction' THEN new_data ->> 'reaction'
    WHEN entity_type = 'message' THEN left(new_data ->> 'content', 50)
  END AS preview
FROM (
  SELECT id, entity_type, operation, changed_at, processed, processed_at, error_count, last_error, new_data
  FROM @schema@.entity_changes WHERE NOT processed AND next_attempt_at IS NULL AND dead_at IS NULL
  UNION ALL
  SELECT id, entity_type, operation, changed_at, processed, processed_at, error_count, last_error, new_data
  FROM @schema@.entity_changes WHERE NOT processed AND dead_at IS NULL AND next_attempt_at <= 'infinity'
  UNION ALL
  SELECT id, entity_type, operation, changed_at, processed, processed_at, error_count, last_error, new_data
  FROM @schema@.entity_changes WHERE NOT processed AND dead_at IS NOT NULL
  UNION ALL
  SELECT id, entity_type, operation, changed_at, processed, processed_at, error_count, last_error, new_data
  FROM @schema@.entity_changes WHERE processed AND processed_at > now() - interval '24 hours'
  UNION ALL
  SELECT id, entity_type, operation, changed_at, processed, processed_at, error_count, last_error, new_data
  FROM @schema@.entity_changes WHERE processed AND processed_at IS NULL
) AS change
WHERE changed_at > now() - interval '24 hours' AND isfinite(changed_at)
ORDER BY changed_at DESC;

REVOKE ALL ON @schema@.action_processing_dashboard, @schema@.recent_action_history FROM PUBLIC;
