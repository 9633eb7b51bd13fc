-- The states of a change, by its columns alone: the indexes that find them. And the functions that write the outbox and
-- send the wake-up. Safe to run again.
--
-- No value of a row makes its writer's statement fail: a value that JSON cannot represent is left out, and a marker
-- stands in its place. A fault of the trigger itself (a misspelt option, a key column that does not exist) is an error.
-- Locks: ACCESS EXCLUSIVE on entity_changes until the transaction ends, where something of an earlier version is there:
-- for three scans of the table, one for each index that is made, some seconds each for ten million rows. A later run
-- takes SHARE ROW EXCLUSIVE for a moment.

-- The server parses a CHECK anew for each captured row. publish_change() refuses other operations, and a row that came
-- with one in another way is a dead letter, as whatever a consumer cannot read is. The state of a row is a function of its
-- columns that needs no constraint: outbox.sql.
DO $cdc$
DECLARE
  v_outbox CONSTANT regclass := pg_catalog.format('%I.entity_changes', @schema_literal@)::regclass;
BEGIN
  IF EXISTS (
    SELECT FROM pg_catalog.pg_constraint
    WHERE conrelid = v_outbox AND conname = ANY ('{entity_changes_operation_check,entity_changes_state_check}')
  ) THEN
    ALTER TABLE @schema@.entity_changes
      DROP CONSTRAINT IF EXISTS entity_changes_operation_check,
      DROP CONSTRAINT IF EXISTS entity_changes_state_check;
  END IF;
END
$cdc$;
-- The shard of a row, for one that is written without it: capturing computes it itself (cdc.core.model.SHARDS = 64). As a
-- generated column the server parsed its expression for each captured row. By the id alone, without the type.
CREATE OR REPLACE FUNCTION @schema@.fill_shard() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $cdc$
BEGIN
  NEW.shard := (hashtext(NEW.entity_id) & 63)::smallint;
  RETURN NEW;
END
$cdc$;
REVOKE ALL ON FUNCTION @schema@.fill_shard() FROM PUBLIC;
DO $cdc$
BEGIN
  IF EXISTS (
    SELECT FROM pg_catalog.pg_attribute
    WHERE attrelid = pg_catalog.format('%I.entity_changes', @schema_literal@)::regclass AND attname = 'shard'
      AND attgenerated <> ''
  ) THEN
    ALTER TABLE @schema@.entity_changes ALTER COLUMN shard DROP EXPRESSION, ALTER COLUMN shard SET NOT NULL;
  END IF;
END
$cdc$;
CREATE OR REPLACE TRIGGER fill_shard BEFORE INSERT ON @schema@.entity_changes
  FOR EACH ROW WHEN (NEW.shard IS NULL) EXECUTE FUNCTION @schema@.fill_shard();

DO $cdc$
DECLARE
  v_index record;
BEGIN
  -- Those of an earlier version also hold what is processed and looks as if it waited.
  FOR v_index IN
    SELECT c.relname FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_index AS i ON i.indexrelid = c.oid
    WHERE i.indrelid = pg_catalog.format('%I.entity_changes', @schema_literal@)::regclass
      AND c.relname = ANY ('{entity_changes_waiting,entity_changes_holding_back}')
      AND pg_catalog.strpos(pg_catalog.pg_get_expr(i.indpred, i.indrelid), 'NOT processed') = 0
  LOOP
    EXECUTE pg_catalog.format('DROP INDEX %I.%I', @schema_literal@, v_index.relname);
  END LOOP;
END
$cdc$;
-- A B-tree entry has at most 2,704 bytes, and an update that would make a longer one fails. So these two hold a 64-bit hash of
-- the type and of the key; a query that uses them compares the text as well.
--
-- Retries of one entity type by their due time, so that many of one type do not delay those of another. Neither predicate
-- implies that of another index of waiting changes: with statistics from when nothing waited, all would look equally
-- cheap, and a query that used the wrong one would read every waiting change.
CREATE INDEX IF NOT EXISTS entity_changes_waiting
  ON @schema@.entity_changes (pg_catalog.hashtextextended(coalesce(entity_type, table_name), 0), next_attempt_at)
  WHERE NOT processed AND next_attempt_at IS NOT NULL AND dead_at IS NULL;
-- Does an earlier change of this key hold it back?
CREATE INDEX IF NOT EXISTS entity_changes_holding_back
  ON @schema@.entity_changes (
    pg_catalog.hashtextextended(entity_id, pg_catalog.hashtextextended(coalesce(entity_type, table_name), 0)), seq
  )
  WHERE NOT processed AND next_attempt_at IS NOT NULL;
-- What waits, by its next attempt, and what is dead, by when it died: before, an index each. The predicate says
-- `<= 'infinity'`, so that a query for the waiting changes of one type, which asks for IS NOT NULL, is not offered this one.
CREATE INDEX IF NOT EXISTS entity_changes_failed ON @schema@.entity_changes (dead_at, next_attempt_at)
  WHERE NOT processed AND (next_attempt_at <= 'infinity' OR dead_at IS NOT NULL);
DROP INDEX IF EXISTS @schema@.entity_changes_due, @schema@.entity_changes_dead;

-- Row trigger: capture_entity_change([entity_type [, options]]).
--
--   entity_type   empty or left out: default_entity_type() of the table's name.
--   options       one JSON object, every member optional:
--     "key": ["a", "b"]      the columns that identify a row
--     "exclude": ["secret"]  columns that are neither captured nor converted
--     "columns": ["a", "b"]  instead of "exclude": only these columns are captured
--     "virtual": true        virtual generated columns have their value, at some cost; otherwise they are null
--     "handled": true        writers may declare that they handle a change themselves
--     "schema_in_key": true  the key says the table's schema first, for one table in many schemas: tenant_1/42
--
-- Arguments behind these two are not read here. `cdc track` keeps there what it needs itself.
--
-- A writer that handles some entity types itself, for example in a webhook, lists them in the setting cdc.handled,
-- separated by commas. Their changes are captured as processed, and no wake-up is sent. Any role may set it, so it has
-- an effect only where the trigger has the option.
--
-- The key is one text. One column: its text. Several: the JSON array of their values, so that different keys have
-- different texts. Without "key" it is the column id, or, if there is none, the primary key (looked up for each row:
-- `cdc track` writes it into the options instead). An UPDATE that gives a row another key is captured as two changes,
-- a DELETE of the old key and an INSERT of the new one, like an UPDATE that moves a row to another partition.
-- A schema in front of a key ends at the first slash: one in its name is written %2F, and a percent sign %25.
--
-- It runs with its owner's rights and its own search_path, so that a writer of the application's table needs no right
-- on the outbox and cannot substitute functions or operators. The types of the table's columns may define casts to
-- json, which are called here, so the owner is a role with few other rights: capture_role.sql.
-- The other settings make the JSON of a row and the text of a key independent of the writer's session. They are all the
-- settings that PostgreSQL's output functions read. extra_float_digits at 0 would lose digits. With row_security at off,
-- a table with policies would refuse the roles that the policies apply to.
CREATE OR REPLACE FUNCTION @schema@.capture_entity_change() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET timezone = 'UTC'
SET datestyle = 'ISO, YMD'
SET bytea_output = 'hex'
SET intervalstyle = 'postgres'
SET extra_float_digits = 1
SET lc_monetary = 'C'
SET quote_all_identifiers = off
SET row_security = on
AS $cdc$
DECLARE
  -- Assignments only, no queries, wherever the row passes: plpgsql evaluates these without an executor. And few of them,
  -- that call few functions: each is set up anew in each transaction, which is most of what it costs. So what few rows
  -- need is asked for at once, and looked at one by one only where something of it is there. OLD of an INSERT and NEW of a
  -- DELETE are NULL.
  v_old jsonb;
  v_new jsonb;
  v_key_column text := 'id';
  v_entity_id text;
  v_moved_from text;
  v_metadata jsonb;
  v_operation text;
  v_entity_type text;
  v_table_schema name;
  v_table_name name;
  v_options jsonb;
  v_excluded text[];
  v_stored text[];
  v_nulls jsonb;
  v_virtual boolean;
  v_unusual boolean;
  v_stays boolean := true;
  v_key jsonb;
  v_values jsonb;
  v_caused_by uuid;
  v_depth integer;
  v_done_at timestamptz;
  v_done_why text;
  v_rung pg_lsn;
  v_read_only text;
  v_converted boolean;
BEGIN
  IF TG_ARGV[1] <> '{"key": ["id"]}' THEN
    v_options := nullif(TG_ARGV[1], '');
    IF v_options - '{key,exclude}'::text[] <> '{}' THEN
      -- A misspelt "exclude" would publish what was to be left out.
      IF v_options - '{key,exclude,columns,virtual,handled,schema_in_key}'::text[] <> '{}' THEN
        RAISE EXCEPTION 'trigger % on %.%: options may have "key", "exclude", "columns", "virtual", "handled" and '
            '"schema_in_key", not %',
            TG_NAME, TG_TABLE_SCHEMA, TG_TABLE_NAME,
            v_options - '{key,exclude,columns,virtual,handled,schema_in_key}'::text[]
          USING HINT = 'create the trigger again with `cdc track`', ERRCODE = 'invalid_parameter_value';
      END IF;
      IF v_options ? 'columns' THEN
        SELECT array_agg(attname::text) INTO v_excluded FROM pg_attribute
        WHERE attrelid = TG_RELID AND attnum > 0 AND NOT attisdropped AND NOT v_options -> 'columns' ? attname::text;
      END IF;
      v_virtual := v_options -> 'virtual' = 'true';
      v_unusual := coalesce(v_options -> 'handled', v_options -> 'schema_in_key') IS NOT NULL;
    END IF;
    IF v_options ? 'exclude' THEN
      FOR i IN 0 .. jsonb_array_length(v_options -> 'exclude') - 1 LOOP
        v_excluded := v_excluded || (v_options -> 'exclude' ->> i);
      END LOOP;
    END IF;
    IF v_virtual THEN
      v_excluded := coalesce(v_excluded, '{}');
      SELECT array_agg(attname::text) INTO v_stored FROM pg_attribute
      WHERE attrelid = TG_RELID AND attnum > 0 AND NOT attisdropped
        AND (attgenerated <> 'v' OR attname = ANY (v_excluded));
    END IF;
    IF v_excluded IS NOT NULL THEN
      v_nulls := jsonb_object(v_excluded, array_fill(NULL::text, ARRAY[cardinality(v_excluded)]));
    END IF;
    v_key := coalesce(v_options -> 'key', '["id"]');
    v_key_column := CASE jsonb_array_length(v_key) WHEN 1 THEN v_key ->> 0 END;
  END IF;

  -- Casts of others may run here, so this is read only, which nothing within the subtransaction can undo and which ends
  -- with it: else a cast could write changes, or alter this function, whose owner it runs as, and have code of its own run
  -- with the rights of every later writer. Two things a cast could leave behind even so: a search_path for the rest of
  -- this function, and rows in temporary tables whose deferred triggers run as this owner (from PostgreSQL 18 on). Where
  -- one of them is possible, the subtransaction is undone once its values are there. It takes no transaction id.
  BEGIN
    IF v_excluded IS NULL THEN
      -- CASE evaluates in this order.
      v_old := CASE set_config('transaction_read_only', 'on', true) WHEN 'on' THEN to_jsonb(OLD) END;
      v_new := to_jsonb(NEW);
    ELSE
      v_read_only := set_config('transaction_read_only', 'on', true);
      IF TG_OP <> 'INSERT' THEN
        v_old := to_jsonb(jsonb_populate_record(OLD, v_nulls)) - v_excluded;
      END IF;
      IF TG_OP <> 'DELETE' THEN
        v_new := to_jsonb(jsonb_populate_record(NEW, v_nulls)) - v_excluded;
      END IF;
      IF v_stored IS NOT NULL THEN
        v_old := v_old || @schema@.captured_row(OLD, TG_RELID, v_stored);
        v_new := v_new || @schema@.captured_row(NEW, TG_RELID, v_stored);
      END IF;
    END IF;
    IF pg_catalog.pg_my_temp_schema() OPERATOR(pg_catalog.<>) 0
      OR pg_catalog.current_setting('search_path') OPERATOR(pg_catalog.<>) 'pg_catalog, pg_temp'
    THEN
      v_converted := true;
      RAISE assert_failure;
    END IF;
  EXCEPTION WHEN OTHERS OR assert_failure THEN
    IF v_converted IS NULL THEN
      BEGIN
        v_read_only := set_config('transaction_read_only', 'on', true);
        IF TG_OP <> 'INSERT' THEN
          v_old := @schema@.captured_row(OLD, TG_RELID, v_excluded);
        END IF;
        IF TG_OP <> 'DELETE' THEN
          v_new := @schema@.captured_row(NEW, TG_RELID, v_excluded);
        END IF;
        v_converted := true;
        RAISE assert_failure;
      EXCEPTION WHEN assert_failure THEN
        IF v_converted IS NULL THEN
          RAISE;
        END IF;
      END;
    END IF;
  END;

  -- The usual row: its key is one column, and stays as it is; the table is no partition, and the trigger as it should be,
  -- without an unusual option; no change has caused it. Below all of this is looked at once more, one by one. Readers
  -- conclude from transaction ids whether a lower seq may still appear, so this transaction has its id, which is never
  -- NULL, before it draws the number; in an AFTER trigger it has one already. That a table is no partition, NULL, comes
  -- out of the relation cache.
  IF v_key_column IS NOT NULL AND v_unusual IS NOT TRUE THEN
    v_entity_id := coalesce(v_new, v_old) ->> v_key_column;
    v_entity_type := nullif(TG_ARGV[0], '');
    IF v_entity_type IS NULL THEN
      v_entity_type := @schema@.default_entity_type(TG_TABLE_NAME::text);
    END IF;
    IF v_old IS NOT NULL AND v_new IS NOT NULL THEN
      v_stays := v_old ->> v_key_column = v_entity_id;
    END IF;
    IF v_stays
      AND octet_length(v_entity_id || v_entity_type) <= 1000
      AND pg_partition_root(TG_RELID) IS NULL
      AND TG_WHEN = 'AFTER'
      AND coalesce(current_setting('cdc.cause', true), '') = ''
      AND pg_current_xact_id() IS NOT NULL
      AND (v_new ?| '{user_id,chat_id,room_id}') IS NOT TRUE
    THEN
      INSERT INTO @schema@.entity_changes
        (table_schema, table_name, operation, entity_id, entity_type, old_data, new_data, metadata, shard)
      VALUES (TG_TABLE_SCHEMA, TG_TABLE_NAME, TG_OP, v_entity_id, v_entity_type, v_old, v_new,
        CASE WHEN v_new IS NOT NULL THEN jsonb_build_object('timestamp', now()) END, (hashtext(v_entity_id) & 63)::smallint)
      -- The wake-up. Not NOTIFY: that takes a lock of the whole cluster until after the commit's flush.
      RETURNING pg_logical_emit_message(true, @prefix_literal@, concat_ws(',', seq, shard)) INTO v_rung;
      RETURN NULL;
    END IF;
  END IF;

  -- All but a key of one column that stays as it is: one of several, or to be found; and partitions.
  IF v_entity_id IS NULL
    OR coalesce(v_old, v_new) ->> v_key_column IS DISTINCT FROM v_entity_id
    OR pg_partition_root(TG_RELID) IS NOT NULL
  THEN
    IF TG_LEVEL <> 'ROW' THEN
      RAISE EXCEPTION 'trigger % on %.%: capture_entity_change() captures rows', TG_NAME, TG_TABLE_SCHEMA, TG_TABLE_NAME
        USING HINT = 'create the trigger FOR EACH ROW', ERRCODE = 'trigger_protocol_violated';
    END IF;

    IF pg_partition_root(TG_RELID) IS NOT NULL THEN
      SELECT n.nspname, c.relname INTO v_table_schema, v_table_name
      FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
      WHERE c.oid = pg_partition_root(TG_RELID);
    END IF;

    v_key := coalesce(v_key, '["id"]');
    IF v_key_column IS NOT NULL THEN
      v_entity_id := coalesce(v_new, v_old) ->> v_key_column;
      v_moved_from := coalesce(v_old ->> v_key_column, 'null');
    END IF;

    -- All but a key of one column that is there and not NULL.
    IF v_entity_id IS NULL THEN
      IF v_options -> 'key' IS NULL AND NOT coalesce(v_new, v_old) ? 'id' THEN
        SELECT jsonb_agg(a.attname ORDER BY k.place) INTO v_key
        FROM pg_index AS i
        CROSS JOIN LATERAL unnest(i.indkey) WITH ORDINALITY AS k (attnum, place)
        JOIN pg_attribute AS a ON a.attrelid = i.indrelid AND a.attnum = k.attnum
        WHERE i.indrelid = TG_RELID AND i.indisprimary;
        IF v_key IS NULL THEN
          RAISE EXCEPTION 'table %.% has neither a column id nor a primary key to tell its rows apart',
              coalesce(v_table_schema, TG_TABLE_SCHEMA), coalesce(v_table_name, TG_TABLE_NAME)
            USING HINT = 'name the key columns: cdc track TABLE --key col[,col]', ERRCODE = 'undefined_column';
        END IF;
      END IF;
      v_values := '[[], []]';
      FOR i IN 0 .. jsonb_array_length(v_key) - 1 LOOP
        IF NOT coalesce(v_new, v_old) ? (v_key ->> i) THEN
          RAISE EXCEPTION 'table %.% has no column % to use as its key',
              coalesce(v_table_schema, TG_TABLE_SCHEMA), coalesce(v_table_name, TG_TABLE_NAME), v_key -> i
            USING HINT = 'name the key columns anew: cdc track TABLE --key col[,col]', ERRCODE = 'undefined_column';
        END IF;
        v_values := jsonb_build_array(
          v_values -> 0 || jsonb_build_array(coalesce(v_new, v_old) -> (v_key ->> i)),
          v_values -> 1 || jsonb_build_array(v_old -> (v_key ->> i)));
      END LOOP;
      IF jsonb_array_length(v_key) = 1 THEN
        -- A key column that holds NULL. Refusing the application's write would be worse than one shared key.
        v_entity_id := coalesce(v_values -> 0 ->> 0, 'null');
        v_moved_from := coalesce(v_values -> 1 ->> 0, 'null');
      ELSE
        v_entity_id := v_values ->> 0;
        v_moved_from := v_values ->> 1;
      END IF;
    END IF;
    IF TG_OP <> 'UPDATE' OR v_moved_from = v_entity_id THEN
      v_moved_from := NULL;
    END IF;
  END IF;

  v_entity_type := coalesce(nullif(TG_ARGV[0], ''), @schema@.default_entity_type(coalesce(v_table_name, TG_TABLE_NAME)::text));

  -- Only keys that the row has a column for, and nothing that is excluded.
  IF v_new ?| '{user_id,chat_id,room_id}' THEN
    v_metadata := CASE WHEN v_new ? 'user_id' THEN jsonb_build_object('user_id', v_new -> 'user_id') ELSE '{}' END
      || CASE WHEN v_new ? 'chat_id' OR v_new ? 'room_id' THEN jsonb_build_object(
          'chat_id', coalesce(nullif(v_new -> 'chat_id', 'null'), v_new -> 'room_id', v_new -> 'chat_id')) ELSE '{}' END;
  END IF;

  IF pg_current_xact_id() IS NULL
    OR current_setting('cdc.cause', true) <> ''
    OR octet_length(v_entity_id || v_entity_type) > 1000
    OR v_moved_from IS NOT NULL
    OR v_unusual AND (v_options ? 'schema_in_key' OR current_setting('cdc.handled', true) <> '')
  THEN
    -- Who writes in the name of a change says so by this setting: "its id,its depth" (cdc.model.Change.cause). Anybody
    -- may set it to anything, and that must not fail the application's write. Nine digits and one more are an integer
    -- still, and at the top the depth stands still.
    IF current_setting('cdc.cause', true) ~ '^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12},[0-9]{1,9}$' THEN
      v_caused_by := left(current_setting('cdc.cause'), 36);
      v_depth := least(substr(current_setting('cdc.cause'), 38)::integer, 999999998) + 1;
      -- A consumer whose handlers share a transaction names the cause anew for each of them only if they write here.
      PERFORM set_config('cdc.captured', 'on', true);
    END IF;
    IF v_options -> 'handled' = 'true'
      AND v_entity_type = ANY (string_to_array(current_setting('cdc.handled', true), ','))
    THEN
      v_done_at := now();
      v_done_why := 'discarded: its writer handles it (cdc.handled)';
    END IF;
    IF v_options -> 'schema_in_key' = 'true' THEN
      v_entity_id := replace(replace(coalesce(v_table_schema, TG_TABLE_SCHEMA), '%', '%25'), '/', '%2F')
        || '/' || v_entity_id;
      v_moved_from := left(v_entity_id, strpos(v_entity_id, '/')) || v_moved_from;
    END IF;
    IF octet_length(v_entity_id || v_entity_type) > 1000 THEN
      v_entity_id := @schema@.bounded_text(v_entity_id);
      v_entity_type := @schema@.bounded_text(v_entity_type);
    END IF;
    IF v_moved_from IS NOT NULL THEN
      v_moved_from := @schema@.bounded_text(v_moved_from);
      INSERT INTO @schema@.entity_changes
        (table_schema, table_name, operation, entity_id, entity_type, old_data, metadata, caused_by, depth,
         processed, processed_at, last_error, shard)
      VALUES (
        coalesce(v_table_schema, TG_TABLE_SCHEMA), coalesce(v_table_name, TG_TABLE_NAME), 'DELETE', v_moved_from,
        v_entity_type, v_old, jsonb_build_object('timestamp', now(), 'moved_to', v_entity_id), v_caused_by,
        coalesce(v_depth, 0), v_done_at IS NOT NULL, v_done_at, v_done_why, (hashtext(v_moved_from) & 63)::smallint
      )
      RETURNING CASE WHEN v_done_at IS NULL THEN
        pg_logical_emit_message(true, @prefix_literal@, concat_ws(',', seq, shard))
      END INTO v_rung;
      v_operation := 'INSERT';
      v_metadata := jsonb_build_object('moved_from', v_moved_from) || coalesce(v_metadata, '{}');
      v_old := NULL;
    END IF;
  END IF;

  INSERT INTO @schema@.entity_changes
    (table_schema, table_name, operation, entity_id, entity_type, old_data, new_data, metadata, caused_by, depth,
     processed, processed_at, last_error, shard)
  VALUES (
    coalesce(v_table_schema, TG_TABLE_SCHEMA),
    coalesce(v_table_name, TG_TABLE_NAME),
    coalesce(v_operation, TG_OP),
    v_entity_id,
    v_entity_type,
    v_old,
    v_new,
    -- Documented: none for a DELETE (its old_data says the same).
    CASE WHEN v_new IS NOT NULL THEN jsonb_build_object('timestamp', now()) || coalesce(v_metadata, '{}') END,
    v_caused_by,
    coalesce(v_depth, 0),
    v_done_at IS NOT NULL,
    v_done_at,
    v_done_why,
    (hashtext(v_entity_id) & 63)::smallint
  )
  RETURNING CASE WHEN v_done_at IS NULL THEN pg_logical_emit_message(true, @prefix_literal@, concat_ws(',', seq, shard)) END
  INTO v_rung;

  -- Created BEFORE by mistake, or INSTEAD OF, the trigger must not swallow the row.
  IF TG_WHEN = 'AFTER' THEN
    RETURN NULL;
  ELSIF TG_OP = 'DELETE' THEN
    RETURN OLD;
  END IF;
  RETURN NEW;
END
$cdc$;
REVOKE ALL ON FUNCTION @schema@.capture_entity_change() FROM PUBLIC;
