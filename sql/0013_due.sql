-- Events without a table, now or later: publish_change(), the table of what is due later, and the function that publishes
-- it when it is due. Safe to run again; takes no lock that a writer or a consumer waits for.

-- Not rows of entity_changes in a state of their own: there they would hold back the later changes of their key, and every
-- reader of the outbox would have to leave them out.
CREATE TABLE IF NOT EXISTS @schema@.cdc_due_changes (
  due timestamptz NOT NULL,
  number bigint GENERATED ALWAYS AS IDENTITY,
  id uuid NOT NULL DEFAULT pg_catalog.gen_random_uuid(),
  entity_type text NOT NULL,
  entity_id text NOT NULL,
  operation text NOT NULL,
  old_data jsonb,
  new_data jsonb,
  metadata jsonb,
  caused_by uuid,
  depth integer NOT NULL DEFAULT 0,
  written_at timestamptz NOT NULL DEFAULT pg_catalog.now(),
  PRIMARY KEY (due, number)
);
-- Rows come and go; the head of the index is read every second.
ALTER TABLE @schema@.cdc_due_changes SET (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 1000);
REVOKE ALL ON TABLE @schema@.cdc_due_changes FROM PUBLIC;
REVOKE ALL ON SEQUENCE @schema@.cdc_due_changes_number_seq FROM PUBLIC;
COMMENT ON TABLE @schema@.cdc_due_changes IS 'events that publish_change() is to publish later, when they are due';

-- An event without a table: the same row and the same wake-up as of a captured change. Returns its seq; or NULL where it is
-- due later than now, because its seq is drawn when it is published.
CREATE OR REPLACE FUNCTION @schema@.publish_change(
  entity_type text,
  entity_id text,
  operation text DEFAULT 'INSERT',
  new_data jsonb DEFAULT NULL,
  old_data jsonb DEFAULT NULL,
  metadata jsonb DEFAULT NULL,
  due timestamptz DEFAULT NULL
) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET row_security = on
AS $cdc$
DECLARE
  -- See capture_entity_change(). Here the transaction may well have none yet.
  v_xid CONSTANT xid8 := pg_current_xact_id();
  v_cause CONSTANT text := current_setting('cdc.cause', true);
  v_type CONSTANT text := @schema@.bounded_text(publish_change.entity_type);
  v_id CONSTANT text := @schema@.bounded_text(publish_change.entity_id);
  v_caused_by uuid;
  v_depth integer := 0;
  v_metadata jsonb;
  v_seq bigint;
  v_shard smallint;
  v_rung pg_lsn;
BEGIN
  IF publish_change.entity_type IS NULL OR publish_change.entity_id IS NULL THEN
    RAISE EXCEPTION 'publish_change() needs an entity type and an entity id' USING ERRCODE = 'null_value_not_allowed';
  END IF;
  IF (publish_change.operation = ANY ('{INSERT,UPDATE,DELETE,READ}')) IS NOT TRUE THEN
    RAISE EXCEPTION 'publish_change() knows no operation %', coalesce(left(publish_change.operation, 100), 'NULL')
      USING HINT = 'one of INSERT, UPDATE, DELETE and READ', ERRCODE = 'invalid_parameter_value';
  END IF;
  IF publish_change.due = 'infinity' THEN
    RAISE EXCEPTION 'publish_change() publishes nothing that is due at infinity: it would never come'
      USING HINT = 'give a time, or leave due out to publish now', ERRCODE = 'invalid_parameter_value';
  END IF;
  IF v_cause ~ '^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12},[0-9]{1,9}$' THEN
    v_caused_by := left(v_cause, 36);
    v_depth := least(substr(v_cause, 38)::integer, 999999998) + 1;
    PERFORM set_config('cdc.captured', 'on', true);
  END IF;
  IF publish_change.due > clock_timestamp() THEN
    -- Here, and not when it is published: metadata that grows too large is an error of its writer, and would stop all
    -- others there. What is no object stays as its writer gave it.
    v_metadata := coalesce(publish_change.metadata, '{}');
    IF jsonb_typeof(v_metadata) = 'object' THEN
      v_metadata := v_metadata || jsonb_build_object(
        'due', (to_jsonb(publish_change.due AT TIME ZONE 'UTC') #>> '{}') || '+00:00',
        'written_at', (to_jsonb(now() AT TIME ZONE 'UTC') #>> '{}') || '+00:00');
    END IF;
    INSERT INTO @schema@.cdc_due_changes
      (due, entity_type, entity_id, operation, old_data, new_data, metadata, caused_by, depth)
    VALUES (publish_change.due, v_type, v_id, publish_change.operation, publish_change.old_data,
      publish_change.new_data, v_metadata, v_caused_by, v_depth);
    RETURN NULL;
  END IF;
  INSERT INTO @schema@.entity_changes AS published
    (table_name, operation, entity_id, entity_type, old_data, new_data, metadata, caused_by, depth, shard)
  VALUES (
    v_type,
    publish_change.operation,
    v_id,
    v_type,
    publish_change.old_data,
    publish_change.new_data,
    publish_change.metadata,
    v_caused_by,
    v_depth,
    (hashtext(v_id) & 63)::smallint
  )
  RETURNING published.seq, published.shard INTO v_seq, v_shard;
  v_rung := pg_logical_emit_message(true, @prefix_literal@, v_seq || ',' || v_shard);
  RETURN v_seq;
END
$cdc$;
REVOKE ALL ON FUNCTION
  @schema@.publish_change(text, text, text, jsonb, jsonb, jsonb, timestamp with time zone) FROM PUBLIC;
-- That of an earlier version would make every call without `due` ambiguous. Whoever might call it may call this one.
DO $cdc$
DECLARE
  v_earlier CONSTANT regprocedure := pg_catalog.to_regprocedure(
    pg_catalog.format('%I.publish_change(text, text, text, jsonb, jsonb, jsonb)', @schema_literal@));
  v_granted record;
BEGIN
  IF v_earlier IS NULL THEN
    RETURN;
  END IF;
  FOR v_granted IN
    SELECT a.grantee::regrole AS role, CASE WHEN a.is_grantable THEN ' WITH GRANT OPTION' END AS further
    FROM pg_catalog.pg_proc AS p CROSS JOIN LATERAL pg_catalog.aclexplode(p.proacl) AS a
    WHERE p.oid = v_earlier AND a.grantee <> p.proowner AND a.grantee <> 0::oid
  LOOP
    EXECUTE pg_catalog.concat(pg_catalog.format('GRANT EXECUTE ON FUNCTION %I.publish_change(text, text, text, jsonb, jsonb,'
      ' jsonb, timestamp with time zone) TO %s', @schema_literal@, v_granted.role), v_granted.further);
  END LOOP;
  EXECUTE pg_catalog.format('DROP FUNCTION %s', v_earlier);
END
$cdc$;

-- Publishes what is due, the first due first, then as it was written: at most so many events, of so many bytes and one.
-- Returns 0 where it published something: there may be more. Else the seconds until the next one is due, NULL where there
-- is none. Within one transaction a row leaves the one table and enters the other, so each is published once. Values are
-- moved as they are stored: one that made an error here would stop all others, for ever.
--
-- It runs with the rights of the owner of the outbox, because it calls no code of others, and those that do may not read.
-- The caller sees to it that no other one publishes at the same time: their numbers would interleave.
CREATE OR REPLACE FUNCTION @schema@.publish_due(p_events integer, p_bytes bigint) RETURNS double precision
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET row_security = on
-- The statistics of a queue are wrong as soon as they are taken.
SET enable_seqscan = off
SET jit = off
AS $cdc$
DECLARE
  v_first timestamptz;
  v_xid xid8;
  v_published integer;
BEGIN
  SELECT d.due INTO v_first FROM @schema@.cdc_due_changes AS d ORDER BY d.due LIMIT 1;
  IF v_first <= now() THEN
    -- Before any number is drawn: see capture_entity_change().
    v_xid := pg_current_xact_id();
    -- One that somebody is about to delete is left for the next time.
    WITH head AS MATERIALIZED (
      SELECT d.ctid AS place, d.due, d.number, coalesce(pg_column_size(d.old_data), 0)
        + coalesce(pg_column_size(d.new_data), 0) + coalesce(pg_column_size(d.metadata), 0) AS bytes
      FROM @schema@.cdc_due_changes AS d
      WHERE d.due <= now()
      ORDER BY d.due, d.number LIMIT p_events
      FOR UPDATE SKIP LOCKED
    ), fitting AS MATERIALIZED (
      SELECT h.place, coalesce(sum(h.bytes) OVER (
          ORDER BY h.due, h.number ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), 0) AS bytes_before
      FROM head AS h
    ), taken AS (
      DELETE FROM @schema@.cdc_due_changes AS d
      WHERE d.ctid = ANY (ARRAY(SELECT f.place FROM fitting AS f WHERE f.bytes_before < p_bytes))
      RETURNING d.*
    ), made AS (
      INSERT INTO @schema@.entity_changes AS made
        (id, table_name, operation, entity_id, entity_type, old_data, new_data, metadata, caused_by, depth, shard)
      SELECT t.id, t.entity_type, t.operation, t.entity_id, t.entity_type, t.old_data, t.new_data,
        t.metadata, t.caused_by, t.depth, (hashtext(t.entity_id) & 63)::smallint
      FROM taken AS t ORDER BY t.due, t.number
      RETURNING pg_logical_emit_message(true, @prefix_literal@, made.seq || ',' || made.shard) AS woken
    )
    SELECT count(woken) INTO v_published FROM made;
    IF v_published > 0 THEN
      RETURN 0;
    END IF;
  END IF;
  RETURN (SELECT extract(epoch FROM d.due - clock_timestamp()) FROM @schema@.cdc_due_changes AS d
    WHERE d.due > now() ORDER BY d.due LIMIT 1);
END
$cdc$;
REVOKE ALL ON FUNCTION @schema@.publish_due(integer, bigint) FROM PUBLIC;
