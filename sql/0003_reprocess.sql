-- For operators: the function that requeues dead letters. Safe to run again; takes no lock that a writer or a consumer
-- waits for.

DO $cdc$
DECLARE
  v_old record;
BEGIN
  -- CREATE OR REPLACE keeps the grants, but cannot change a result type.
  FOR v_old IN
    SELECT p.oid::regprocedure AS name
    FROM pg_catalog.pg_proc AS p
    WHERE p.oid = pg_catalog.to_regprocedure(
        pg_catalog.format('%I.reprocess_failed_actions(text, integer)', @schema_literal@))
      AND (pg_catalog.pg_get_function_result(p.oid) <> 'TABLE(requeued_count integer)'
           OR p.proargnames <> ARRAY['p_entity_type', 'p_max_errors', 'requeued_count'])
  LOOP
    EXECUTE pg_catalog.format('DROP FUNCTION %s', v_old.name);
  END LOOP;
END
$cdc$;

-- Requeues dead letters with at least p_max_errors failed attempts (of one entity type, or of all), with all their
-- attempts. They are waiting and due at once, and not fresh, because a waiting change runs before the later ones of its
-- key. Returns how many. Runs with its caller's rights, so the caller needs the right to update the table.
CREATE OR REPLACE FUNCTION @schema@.reprocess_failed_actions(
  p_entity_type text DEFAULT NULL,
  p_max_errors integer DEFAULT 3
) RETURNS TABLE (requeued_count integer)
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $cdc$
BEGIN
  UPDATE @schema@.entity_changes
  SET next_attempt_at = now(), dead_at = NULL, error_count = 0
  WHERE dead_at IS NOT NULL
    AND NOT processed
    AND error_count >= p_max_errors
    AND (p_entity_type IS NULL OR coalesce(entity_type, table_name) = p_entity_type);
  GET DIAGNOSTICS requeued_count = ROW_COUNT;
  IF requeued_count > 0 THEN
    -- An empty payload names no change: look at all of them.
    PERFORM pg_notify('entity_change', '');
  END IF;
  RETURN NEXT;
END
$cdc$;
