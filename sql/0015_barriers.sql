-- What happens to a whole table as a change, such as a TRUNCATE: the table of those that are not settled, and the functions
-- that write one. Safe to run again; takes no lock that a writer or a consumer waits for.

-- Such a change is a barrier for its type: it starts when all before it is settled, and nothing after it starts before it is
-- settled itself. A row here finds it by its type. Whether it stands is said by its change alone (barred()), so a mark
-- by hand counts; a row that is gone, or names no change, holds nothing. Consumers remove those that stand no more.
CREATE TABLE IF NOT EXISTS @schema@.cdc_barriers (
  entity_type text NOT NULL,
  seq bigint NOT NULL,
  id uuid NOT NULL,
  -- By shard, up to which number no fresh change of the type is left: so that a backlog of other types, of any length, is
  -- walked once. They were all committed when the table was locked for it, and none comes later.
  examined bigint[] NOT NULL DEFAULT pg_catalog.array_fill(0::bigint, ARRAY[64]),
  -- None is left in any shard.
  clear boolean NOT NULL DEFAULT false,
  PRIMARY KEY (entity_type, seq)
);
REVOKE ALL ON TABLE @schema@.cdc_barriers FROM PUBLIC;
COMMENT ON TABLE @schema@.cdc_barriers IS 'changes of whole tables that are not settled: what they hold back';

-- Writes a change of a whole table, without a row, so that its entity id is empty; its barrier; and its wake-up. For the
-- functions that capture, with whose rights it runs: they belong to one role.
CREATE OR REPLACE FUNCTION @schema@.capture_barrier(
  p_operation text, p_table_schema text, p_table_name text, p_entity_type text, p_old jsonb, p_new jsonb, p_metadata jsonb
) RETURNS void
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $cdc$
DECLARE
  v_cause CONSTANT text := current_setting('cdc.cause', true);
  v_id CONSTANT uuid := gen_random_uuid();
  v_type CONSTANT text := @schema@.bounded_text(p_entity_type);
  v_caused_by uuid;
  v_depth integer := 0;
  v_seq bigint;
  v_shard smallint;
  v_rung pg_lsn;
BEGIN
  -- As capture_entity_change() does.
  IF v_cause ~ '^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12},[0-9]{1,9}$' THEN
    v_caused_by := left(v_cause, 36);
    v_depth := least(substr(v_cause, 38)::integer, 999999998) + 1;
    PERFORM set_config('cdc.captured', 'on', true);
  END IF;
  -- Before any number is drawn: see capture_entity_change().
  PERFORM pg_current_xact_id();
  INSERT INTO @schema@.entity_changes AS captured
    (id, table_schema, table_name, operation, entity_id, entity_type, old_data, new_data, metadata, caused_by, depth, shard)
  VALUES (v_id, p_table_schema, p_table_name, p_operation, '', v_type, p_old, p_new,
    jsonb_build_object('timestamp', now()) || p_metadata, v_caused_by, v_depth, (hashtext('') & 63)::smallint)
  RETURNING captured.seq, captured.shard INTO v_seq, v_shard;
  INSERT INTO @schema@.cdc_barriers (entity_type, seq, id) VALUES (v_type, v_seq, v_id);
  v_rung := pg_logical_emit_message(true, @prefix_literal@, v_seq || ',' || v_shard);
END
$cdc$;
REVOKE ALL ON FUNCTION @schema@.capture_barrier(text, text, text, text, jsonb, jsonb, jsonb) FROM PUBLIC;

-- Statement trigger: capture_truncate(entity_type, 'event' | 'refuse').
--
--   entity_type   empty: default_entity_type() of the table's name.
--   'event'       the TRUNCATE is captured: without a row, so its entity id is empty.
--   'refuse'      it is an error.
--
-- Its lock of the table, ACCESS EXCLUSIVE, is there before the number is drawn: whoever wrote the table before has
-- committed with a lower one, and whoever writes it later draws a higher one.
CREATE OR REPLACE FUNCTION @schema@.capture_truncate() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET timezone = 'UTC'
SET row_security = on
AS $cdc$
BEGIN
  IF TG_OP <> 'TRUNCATE' OR TG_ARGV[1] IS DISTINCT FROM 'event' AND TG_ARGV[1] IS DISTINCT FROM 'refuse' THEN
    RAISE EXCEPTION 'trigger % on %.%: capture_truncate() takes an entity type and ''event'' or ''refuse'', for TRUNCATE',
        TG_NAME, TG_TABLE_SCHEMA, TG_TABLE_NAME
      USING HINT = 'create the trigger again: cdc track TABLE --truncate event', ERRCODE = 'trigger_protocol_violated';
  END IF;
  IF TG_ARGV[1] = 'refuse' THEN
    RAISE EXCEPTION 'TRUNCATE of %.% is refused: its changes are captured, and its rows would go without one',
        TG_TABLE_SCHEMA, TG_TABLE_NAME
      USING HINT = 'DELETE captures each row; or have TRUNCATE captured: cdc track TABLE --truncate event',
        ERRCODE = 'object_not_in_prerequisite_state';
  END IF;
  PERFORM @schema@.capture_barrier('TRUNCATE'::text, TG_TABLE_SCHEMA::text, TG_TABLE_NAME::text,
    coalesce(nullif(TG_ARGV[0], ''), @schema@.default_entity_type(TG_TABLE_NAME::text)), NULL::jsonb, NULL::jsonb,
    '{}'::jsonb);
  RETURN NULL;
END
$cdc$;
REVOKE ALL ON FUNCTION @schema@.capture_truncate() FROM PUBLIC;

-- Whether such a change keeps the change of this type with this number from starting: one before it, of its type; or it is one
-- itself, and not all before it is settled. Of that, fresh changes are looked for by consumers. STABLE: it sees what the
-- statement sees that calls it. With the rights of its caller.
CREATE OR REPLACE FUNCTION @schema@.barred(p_entity_type text, p_seq bigint) RETURNS boolean
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off
AS $cdc$
BEGIN
  RETURN EXISTS (
    SELECT FROM @schema@.cdc_barriers AS b
    WHERE b.entity_type = p_entity_type AND b.seq < p_seq AND EXISTS (
      SELECT FROM @schema@.entity_changes AS t
      WHERE t.id = b.id AND NOT t.processed AND (t.dead_at IS NULL OR t.next_attempt_at = 'infinity')
    )
  ) OR EXISTS (
    SELECT FROM @schema@.cdc_barriers AS b
    WHERE b.entity_type = p_entity_type AND b.seq = p_seq AND (NOT b.clear OR EXISTS (
      SELECT FROM @schema@.entity_changes AS w
      WHERE hashtextextended(coalesce(w.entity_type, w.table_name), 0) = hashtextextended(p_entity_type, 0)
        AND coalesce(w.entity_type, w.table_name) = p_entity_type AND w.seq < p_seq
        AND NOT w.processed AND w.next_attempt_at IS NOT NULL AND w.dead_at IS NULL
    ))
  );
END
$cdc$;
REVOKE ALL ON FUNCTION @schema@.barred(text, bigint) FROM PUBLIC;
