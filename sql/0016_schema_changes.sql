-- DDL as a change of the operation SCHEMA: the columns that tables had, and the function of the event triggers, which
-- `cdc db ddl` makes. Safe to run again; takes no lock that a writer or a consumer waits for.

-- What was told last of each table whose trigger asks for it. The oids tell a row of before a restore: of it the trigger is
-- none of the table's.
CREATE TABLE IF NOT EXISTS @schema@.cdc_columns (
  relation oid PRIMARY KEY,
  trigger oid NOT NULL,
  table_schema text NOT NULL,
  table_name text NOT NULL,
  entity_type text NOT NULL,
  -- NULL: the table is gone, or is captured no more. The role that captures may delete nothing.
  columns jsonb
);
REVOKE ALL ON TABLE @schema@.cdc_columns FROM PUBLIC;
COMMENT ON TABLE @schema@.cdc_columns IS 'the columns of tables whose DDL is captured, as they were told last';

-- The row that the table should have in cdc_columns; none, unless a trigger that captures it asks for it: its third argument
-- is an object with "ddl": "event". Of several triggers the first by name counts. Of the columns those are told that are
-- captured: {"total": {"type": "numeric(10,2)", "nullable": false, "position": 3}}. A position is a column's for good, so it
-- shows what was renamed.
CREATE OR REPLACE FUNCTION @schema@.captured_columns(p_relation oid) RETURNS SETOF @schema@.cdc_columns
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
SET quote_all_identifiers = off
AS $cdc$
DECLARE
  v_trigger record;
  v_options jsonb;
BEGIN
  FOR v_trigger IN
    SELECT t.oid, n.nspname::text, coalesce(r.relname, c.relname)::text AS relname,
      convert_from(given.arguments[1], 'UTF8') AS entity_type, convert_from(given.arguments[2], 'UTF8') AS options,
      convert_from(given.arguments[3], 'UTF8')::jsonb ->> 'ddl' AS ddl
    FROM pg_trigger AS t
    JOIN pg_proc AS p ON p.oid = t.tgfoid
    JOIN pg_type AS y ON y.typnamespace = p.pronamespace AND y.oid = pg_typeof(NULL::@schema@.cdc_columns)
    -- Of the outbox's own: who may create in its schema may make one that is called alike.
    JOIN pg_proc AS g ON g.pronamespace = y.typnamespace AND g.proname = 'capture_entity_change' AND g.pronargs = 0
      AND g.proowner = p.proowner
    JOIN pg_class AS c ON c.oid = t.tgrelid
    JOIN pg_namespace AS n ON n.oid = c.relnamespace
    LEFT JOIN pg_class AS r ON r.oid = pg_partition_root(t.tgrelid)
    @given@
    WHERE t.tgrelid = p_relation AND t.tgparentid = 0 AND t.tgnargs > 2
      AND (p.proname = 'capture_entity_change' OR @is_table_function@)
    ORDER BY t.tgname
  LOOP
    CONTINUE WHEN v_trigger.ddl IS DISTINCT FROM 'event';
    v_options := coalesce(nullif(v_trigger.options, '')::jsonb, '{}');
    RETURN QUERY
      SELECT p_relation, v_trigger.oid, v_trigger.nspname, v_trigger.relname,
        coalesce(nullif(v_trigger.entity_type, ''), @schema@.default_entity_type(v_trigger.relname)),
        (SELECT coalesce(jsonb_object_agg(a.attname, jsonb_build_object(
           'type', format_type(a.atttypid, a.atttypmod), 'nullable', NOT a.attnotnull, 'position', a.attnum)), '{}')
         FROM pg_attribute AS a
         WHERE a.attrelid = p_relation AND a.attnum > 0 AND NOT a.attisdropped
           AND (v_options -> 'exclude' ? a.attname::text) IS NOT TRUE
           AND (v_options -> 'columns' ? a.attname::text) IS NOT FALSE);
    RETURN;
  END LOOP;
END
$cdc$;
REVOKE ALL ON FUNCTION @schema@.captured_columns(oid) FROM PUBLIC;

-- Event triggers: on ddl_command_end for the commands by which columns or names of tables change, and on sql_drop. Compares
-- the tables that a command is about with cdc_columns, and writes a change for each that differs, for the type that it had.
--
-- It runs in the transaction of whoever issues DDL, in any role. So it calls nothing but the server's own functions and
-- those of its own role. The DDL neither fails nor waits because of it: a fault is a warning, a row that somebody else has
-- locked is passed over, and what was not told is found by the next command about the table. Its INSERT waits where that
-- of capture_entity_change() would.
--
-- What a serializable transaction reads may fail it at its commit. So cdc_columns is read for tables alone that have a
-- trigger with three arguments, or lost one; and by its key, which marks a page of the index and a row, not the table.
CREATE OR REPLACE FUNCTION @schema@.capture_ddl() RETURNS event_trigger
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET timezone = 'UTC'
SET row_security = on
SET enable_seqscan = off
SET jit = off  -- a scan that is switched off and is needed all the same counts as dear enough to be compiled
AS $cdc$
DECLARE
  v_tables oid[];
  v_dropped oid[] := '{}';
  v_triggers oid[] := '{}';
  v_changed oid[] := '{}';  -- that have lost a trigger, or got one
  v_relation oid;
  v_before record;
  v_now record;
  v_known boolean;
BEGIN
  IF TG_EVENT = 'sql_drop' THEN
    WITH dropped AS MATERIALIZED (
      SELECT classid, objid, objsubid, schema_name, object_name, address_names FROM pg_event_trigger_dropped_objects()
      WHERE classid IN ('pg_class'::regclass, 'pg_trigger'::regclass) AND NOT is_temporary
    ), triggers AS MATERIALIZED (
      SELECT objid, address_names[1] AS table_schema, address_names[2] AS table_name FROM dropped
      WHERE classid = 'pg_trigger'::regclass
    ), tables AS MATERIALIZED (
      SELECT objid FROM dropped WHERE classid = 'pg_class'::regclass AND objsubid = 0
        AND (schema_name, object_name) IN (SELECT table_schema, table_name FROM triggers)
    )
    SELECT ARRAY(SELECT objid FROM triggers), ARRAY(SELECT objid FROM tables),
      ARRAY(SELECT objid FROM dropped WHERE classid = 'pg_class'::regclass AND objsubid <> 0),
      ARRAY(SELECT to_regclass(format('%I.%I', table_schema, table_name))::oid FROM triggers)
    INTO v_triggers, v_dropped, v_tables, v_changed;
    v_changed := v_changed || v_dropped;
    v_tables := v_tables || v_changed;
  ELSIF TG_TAG IN ('ALTER SCHEMA', 'ALTER TYPE', 'ALTER DOMAIN', 'ALTER EXTENSION') THEN
    -- Of these nothing says which tables they are about.
    v_tables := ARRAY(SELECT relation FROM @schema@.cdc_columns WHERE columns IS NOT NULL);
  ELSE
    v_tables := ARRAY(
      WITH RECURSIVE altered (relation) AS (
        SELECT coalesce(t.tgrelid, d.objid)
        FROM pg_event_trigger_ddl_commands() AS d
        LEFT JOIN pg_trigger AS t ON t.oid = d.objid AND d.classid = 'pg_trigger'::regclass
        WHERE d.classid IN ('pg_class'::regclass, 'pg_trigger'::regclass)
        UNION
        SELECT i.inhrelid FROM altered JOIN pg_inherits AS i ON i.inhparent = altered.relation
      )
      SELECT relation FROM altered);
    IF TG_TAG = 'CREATE TRIGGER' THEN
      v_changed := v_tables;
    END IF;
  END IF;

  FOR v_relation IN
    SELECT DISTINCT u.relation FROM unnest(v_tables) AS u (relation)
    WHERE EXISTS (SELECT FROM pg_trigger AS t WHERE t.tgrelid = u.relation AND t.tgnargs > 2 AND NOT t.tgisinternal)
      OR u.relation = ANY (v_changed)
    ORDER BY u.relation
  LOOP
    BEGIN
      SELECT * INTO v_before FROM @schema@.cdc_columns AS c WHERE c.relation = v_relation;
      v_known := FOUND;
      SELECT * INTO v_now FROM @schema@.captured_columns(v_relation);
      CONTINUE WHEN v_now.relation IS NULL AND v_before.columns IS NULL
        OR v_known AND v_now.relation IS NOT NULL AND v_before.columns IS NOT NULL AND v_before = v_now
        -- While its trigger is disabled nothing is captured.
        OR EXISTS (SELECT FROM pg_trigger AS t WHERE t.oid = v_now.trigger AND t.tgenabled IN ('D', 'R'));
      IF v_known THEN
        PERFORM FROM @schema@.cdc_columns AS c
        WHERE c.relation = v_relation AND c.columns IS NOT DISTINCT FROM v_before.columns FOR UPDATE SKIP LOCKED;
        CONTINUE WHEN NOT FOUND;
      END IF;
      IF v_now.relation IS NULL THEN
        UPDATE @schema@.cdc_columns SET columns = NULL WHERE relation = v_relation;
      ELSE
        INSERT INTO @schema@.cdc_columns AS c (relation, trigger, table_schema, table_name, entity_type, columns)
        VALUES (v_now.relation, v_now.trigger, v_now.table_schema, v_now.table_name, v_now.entity_type, v_now.columns)
        ON CONFLICT (relation) DO UPDATE SET trigger = excluded.trigger, table_schema = excluded.table_schema,
          table_name = excluded.table_name, entity_type = excluded.entity_type, columns = excluded.columns;
      END IF;
      -- Of another trigger it is of before a restore, or of a table that was captured otherwise.
      IF v_known AND v_before.trigger IS DISTINCT FROM v_now.trigger AND v_before.trigger <> ALL (v_triggers) THEN
        v_before.columns := NULL;
      END IF;
      IF v_now.relation IS NOT NULL AND TG_TAG <> 'CREATE TRIGGER'
        AND (v_before.columns, v_before.table_schema, v_before.table_name)
          IS DISTINCT FROM (v_now.columns, v_now.table_schema, v_now.table_name)
      THEN
        PERFORM @schema@.capture_barrier('SCHEMA'::text, v_now.table_schema, v_now.table_name,
          CASE WHEN v_before.columns IS NULL THEN v_now.entity_type ELSE v_before.entity_type END,
          v_before.columns, v_now.columns, jsonb_build_object('command', TG_TAG) || CASE
            WHEN v_before.columns IS NOT NULL
              AND (v_before.table_schema, v_before.table_name) <> (v_now.table_schema, v_now.table_name)
            THEN jsonb_build_object('renamed_from',
              jsonb_build_object('schema', v_before.table_schema, 'table', v_before.table_name))
            ELSE '{}' END);
      ELSIF v_relation = ANY (v_dropped) AND v_before.columns IS NOT NULL THEN
        PERFORM @schema@.capture_barrier('SCHEMA'::text, v_before.table_schema, v_before.table_name, v_before.entity_type,
          v_before.columns, NULL::jsonb, jsonb_build_object('command', TG_TAG));
      END IF;
    EXCEPTION WHEN OTHERS THEN
      RAISE WARNING 'a change of the columns of % is not told: SQLSTATE %', v_relation::regclass, SQLSTATE
        USING HINT = 'the next ALTER TABLE tells it, if it can; see cdc doctor';
    END;
  END LOOP;
EXCEPTION WHEN OTHERS THEN
  RAISE WARNING 'DDL is not told: SQLSTATE %', SQLSTATE USING HINT = 'see cdc doctor';
END
$cdc$;
REVOKE ALL ON FUNCTION @schema@.capture_ddl() FROM PUBLIC;
