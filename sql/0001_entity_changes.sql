-- The outbox: one row for each captured change, and its state.
--
-- A table made from the documented SQL (docs/explanation/documented-design.md) is upgraded in place. If there is no table,
-- an empty one is made and upgraded by the same statements, so that both end alike. Safe to run again.
-- Locks: ACCESS EXCLUSIVE on entity_changes until the transaction ends. The table is rewritten twice and indexed, which
-- takes minutes for ten million rows; writers of captured tables wait meanwhile. A later run takes SHARE for a moment.

CREATE TABLE IF NOT EXISTS @schema@.entity_changes (
  id uuid PRIMARY KEY DEFAULT pg_catalog.gen_random_uuid(),
  table_name text NOT NULL,
  operation text NOT NULL,
  entity_id text NOT NULL,
  entity_type text,
  old_data jsonb,
  new_data jsonb,
  metadata jsonb,
  -- The start of the writer's transaction. Not the order in which a row's changes happened: that is seq.
  changed_at timestamptz DEFAULT pg_catalog.now(),
  processed boolean DEFAULT false,
  processed_at timestamptz,
  error_count integer DEFAULT 0,
  last_error text
);

DO $cdc$
DECLARE
  v_outbox CONSTANT regclass := pg_catalog.format('%I.entity_changes', @schema_literal@)::regclass;
  v_names text;
BEGIN
  IF EXISTS (
    SELECT FROM pg_catalog.pg_attribute WHERE attrelid = v_outbox AND attname = 'seq' AND NOT attisdropped
  ) THEN
    RETURN;
  END IF;

  LOCK TABLE @schema@.entity_changes IN ACCESS EXCLUSIVE MODE;

  SELECT pg_catalog.string_agg(name, ', ') INTO v_names
  FROM pg_catalog.unnest(ARRAY[
    'id', 'table_name', 'operation', 'entity_id', 'entity_type', 'old_data', 'new_data', 'metadata', 'changed_at',
    'processed', 'processed_at', 'error_count', 'last_error'
  ]) AS name
  WHERE NOT EXISTS (
    SELECT FROM pg_catalog.pg_attribute WHERE attrelid = v_outbox AND attname = name AND NOT attisdropped
  );
  IF v_names IS NOT NULL THEN
    RAISE EXCEPTION 'the table % is not the documented one: it has no %', v_outbox, v_names
      USING HINT = 'add the columns, rename the table, or install into another schema', ERRCODE = 'undefined_column';
  END IF;

  -- A column's type cannot change under a view. Our two views are recreated; the views of others are not ours to drop.
  SELECT pg_catalog.string_agg(DISTINCT r.ev_class::regclass::text, ', ') INTO v_names
  FROM pg_catalog.pg_depend AS d
  JOIN pg_catalog.pg_rewrite AS r ON d.classid = 'pg_catalog.pg_rewrite'::regclass AND d.objid = r.oid
  WHERE d.refobjid = v_outbox
    AND r.ev_class IS DISTINCT FROM
        pg_catalog.to_regclass(pg_catalog.format('%I.action_processing_dashboard', @schema_literal@))
    AND r.ev_class IS DISTINCT FROM
        pg_catalog.to_regclass(pg_catalog.format('%I.recent_action_history', @schema_literal@));
  IF v_names IS NOT NULL THEN
    RAISE EXCEPTION 'the upgrade changes column types under %, which read %', v_names, v_outbox
      USING HINT = 'drop these views, upgrade, and create them again', ERRCODE = 'dependent_objects_still_exist';
  END IF;
  DROP VIEW IF EXISTS @schema@.action_processing_dashboard, @schema@.recent_action_history;
  -- The partial indexes below replace these two. Every settled change is a write to each index.
  DROP INDEX IF EXISTS @schema@.idx_entity_changes_unprocessed, @schema@.idx_entity_changes_type;

  ALTER TABLE @schema@.entity_changes
    ADD COLUMN seq bigint,
    ADD COLUMN table_schema text,
    ADD COLUMN next_attempt_at timestamptz,
    ADD COLUMN dead_at timestamptz,
    ADD COLUMN started_by uuid,
    -- No foreign key: retention removes causes before their effects. No index: queries go from an effect to its cause only.
    ADD COLUMN caused_by uuid,
    ADD COLUMN depth integer NOT NULL DEFAULT 0,
    ADD COLUMN shard smallint;

  -- The rows of one transaction share their changed_at; ctid is the best known order among them. The documented processor
  -- gave up after three errors: such a change is a dead letter.
  UPDATE @schema@.entity_changes AS change
  SET seq = numbered.seq,
      shard = (pg_catalog.hashtext(entity_id) & 63)::smallint,
      changed_at = coalesce(changed_at, processed_at, pg_catalog.now()),
      processed = coalesce(processed, false),
      processed_at = CASE WHEN processed THEN coalesce(processed_at, changed_at, pg_catalog.now()) ELSE processed_at END,
      error_count = coalesce(error_count, 0),
      dead_at = CASE WHEN processed IS NOT TRUE AND error_count >= 3 THEN pg_catalog.now() END
  FROM (
    SELECT ctid AS place, pg_catalog.row_number() OVER (ORDER BY changed_at, ctid) AS seq
    FROM @schema@.entity_changes
  ) AS numbered
  WHERE change.ctid = numbered.place;

  ALTER TABLE @schema@.entity_changes
    -- A timestamp without zone was written in its writer's TimeZone; it is read in that of the session that upgrades.
    ALTER COLUMN changed_at TYPE timestamptz,
    ALTER COLUMN changed_at SET DEFAULT pg_catalog.now(),
    ALTER COLUMN changed_at SET NOT NULL,
    ALTER COLUMN processed SET DEFAULT false,
    ALTER COLUMN processed SET NOT NULL,
    ALTER COLUMN processed_at TYPE timestamptz,
    ALTER COLUMN error_count SET DEFAULT 0,
    ALTER COLUMN error_count SET NOT NULL,
    -- The promised order needs CACHE 1, the default: a session with cached numbers would give a later change of a row a
    -- lower one. It also needs the number to be drawn while the source row is locked.
    ALTER COLUMN seq SET NOT NULL,
    ALTER COLUMN seq ADD GENERATED ALWAYS AS IDENTITY,
    -- Not generated: the server would parse the expression for each captured row. 0011 fills it in.
    ALTER COLUMN shard SET NOT NULL,
    DROP CONSTRAINT IF EXISTS entity_changes_operation_check;
  PERFORM pg_catalog.setval(
    pg_catalog.format('%I.entity_changes_seq_seq', @schema_literal@),
    (SELECT coalesce(pg_catalog.max(seq), 0) + 1 FROM @schema@.entity_changes),
    false
  );
END
$cdc$;

-- Fresh changes, read by shard in the order of seq.
CREATE INDEX IF NOT EXISTS entity_changes_fresh ON @schema@.entity_changes (shard, seq)
  WHERE NOT processed AND next_attempt_at IS NULL AND dead_at IS NULL;
-- The indexes of what waits or is dead are made by 0005 and 0011.
-- For the views and for pruning.
CREATE INDEX IF NOT EXISTS entity_changes_processed ON @schema@.entity_changes (processed_at)
  WHERE processed;

-- Each row is inserted and soon updated, and the update is never HOT (it moves the row from one index to another). Vacuum
-- starts at a tenth of the default share of dead rows, so that few dead entries precede the first fresh one in its index,
-- and has ten times the default cost limit to keep up. fillfactor stays at 100: free space would serve HOT updates only.
ALTER TABLE @schema@.entity_changes SET (
  autovacuum_vacuum_scale_factor = 0.02,
  autovacuum_vacuum_threshold = 1000,
  autovacuum_vacuum_insert_scale_factor = 0.05,
  autovacuum_analyze_scale_factor = 0.02,
  autovacuum_vacuum_cost_limit = 2000
);

-- Default privileges may have granted rights that PUBLIC does not have otherwise.
REVOKE ALL ON TABLE @schema@.entity_changes FROM PUBLIC;
REVOKE ALL ON SEQUENCE @schema@.entity_changes_seq_seq FROM PUBLIC;

COMMENT ON TABLE @schema@.entity_changes IS 'captured changes: fresh, waiting for a retry, processed, or dead';
COMMENT ON COLUMN @schema@.entity_changes.seq IS 'order of capture, also between the changes of one key';
COMMENT ON COLUMN @schema@.entity_changes.shard IS 'hash of the entity''s id modulo 64: the unit of ownership between consumers';
COMMENT ON COLUMN @schema@.entity_changes.next_attempt_at IS 'set = waiting for its retry, and blocking its key';
COMMENT ON COLUMN @schema@.entity_changes.dead_at IS 'set = dead letter: not tried again until requeued';
COMMENT ON COLUMN @schema@.entity_changes.started_by IS 'the consumer that recorded the start of its handler, after a crash';
COMMENT ON COLUMN @schema@.entity_changes.caused_by IS 'id of the change whose handler made this one';
COMMENT ON COLUMN @schema@.entity_changes.depth IS 'how many changes caused each other before this one';
