-- Capture: what writes the outbox and rings. Safe to run again; locks no table.

-- Row trigger: capture_entity_change([entity_type [, options]]).
--
--   entity_type   empty or left out: 'reaction', 'message', 'task' for the three documented tables, else the table's name.
--   options       one JSON object: {"key": ["a", "b"], "exclude": ["secret"]}, or "columns" with all that is captured
--                 in the place of "exclude".
--
-- A writer that handles some entity types itself, as in the webhook, says so by the setting cdc.handled, a list with
-- commas: their changes are captured as processed already, and nobody is rung for.
--
-- The key is one text. One column: its text. Several: the JSON array of their values, in which no two keys look alike.
-- Without "key" it is the column id, or, where there is none, the primary key (looked up for each row: `cdc track`
-- writes it into the options instead).
--
-- It runs with its owner's rights and its own search_path, so that a writer of the application's table needs no right
-- on the outbox and cannot slip in functions or operators of its own. The other settings make one row the same JSON,
-- and one key the same text, whatever the writer's session has set; extra_float_digits at 0 would even lose digits.
CREATE OR REPLACE FUNCTION @schema@.capture_entity_change() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET timezone = 'UTC'
SET bytea_output = 'hex'
SET intervalstyle = 'postgres'
SET extra_float_digits = 1
AS $cdc$
DECLARE
  -- Assignments only, no queries, wherever the row passes: plpgsql evaluates these without an executor. And few of them:
  -- each is set up anew in each transaction, which is most of what it costs. So what few tables need is asked for at
  -- once, and looked at one by one only where something of it is there. OLD of an INSERT and NEW of a DELETE are NULL.
  v_old jsonb := to_jsonb(OLD);
  v_new jsonb := to_jsonb(NEW);
  v_entity_id text := CASE
    WHEN coalesce(TG_ARGV[1], '') IN ('', '{"key": ["id"]}') THEN coalesce(v_new, v_old) ->> 'id'
  END;
  v_entity_type text;
  v_table_schema name;
  v_table_name name;
  v_options jsonb;
  v_key jsonb;
  v_values jsonb;
  v_caused_by uuid;
  v_depth integer;
  v_done_at timestamptz;
  v_done_why text;
  v_rung pg_lsn;
BEGIN
  -- All but a table whose key is its column id: other options, or a key to be found; and partitions. That a table is none,
  -- NULL, comes out of the relation cache.
  IF v_entity_id IS NULL OR pg_partition_root(TG_RELID) IS NOT NULL THEN
    IF TG_LEVEL <> 'ROW' THEN
      RAISE EXCEPTION 'trigger % on %.%: capture_entity_change() captures rows', TG_NAME, TG_TABLE_SCHEMA, TG_TABLE_NAME
        USING HINT = 'create the trigger FOR EACH ROW', ERRCODE = 'trigger_protocol_violated';
    END IF;

    v_options := nullif(TG_ARGV[1], '');
    -- A misspelt "exclude" would publish what was to be left out.
    IF v_options - '{key,exclude,columns}'::text[] <> '{}' THEN
      RAISE EXCEPTION 'trigger % on %.%: options may have "key", "exclude" and "columns", not %',
          TG_NAME, TG_TABLE_SCHEMA, TG_TABLE_NAME, v_options - '{key,exclude,columns}'::text[]
        USING HINT = 'create the trigger again with `cdc track`', ERRCODE = 'invalid_parameter_value';
    END IF;

    IF pg_partition_root(TG_RELID) IS NOT NULL THEN
      SELECT n.nspname, c.relname INTO v_table_schema, v_table_name
      FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
      WHERE c.oid = pg_partition_root(TG_RELID);
    END IF;

    v_key := coalesce(v_options -> 'key', '["id"]');
    IF jsonb_array_length(v_key) = 1 THEN
      v_entity_id := coalesce(v_new, v_old) ->> (v_key ->> 0);
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
      v_values := '[]';
      FOR i IN 0 .. jsonb_array_length(v_key) - 1 LOOP
        IF NOT coalesce(v_new, v_old) ? (v_key ->> i) THEN
          RAISE EXCEPTION 'table %.% has no column % to use as its key',
              coalesce(v_table_schema, TG_TABLE_SCHEMA), coalesce(v_table_name, TG_TABLE_NAME), v_key -> i
            USING HINT = 'name the key columns anew: cdc track TABLE --key col[,col]', ERRCODE = 'undefined_column';
        END IF;
        v_values := v_values || jsonb_build_array(coalesce(v_new, v_old) -> (v_key ->> i));
      END LOOP;
      IF jsonb_array_length(v_key) = 1 THEN
        -- A key column that holds NULL. Refusing the application's write would be worse than one shared key.
        v_entity_id := coalesce(v_values ->> 0, 'null');
      ELSE
        v_entity_id := v_values::text;
      END IF;
    END IF;

    IF v_options ? 'columns' THEN
      v_old := CASE WHEN v_old IS NOT NULL THEN coalesce(
        (SELECT jsonb_object_agg(key, value) FROM jsonb_each(v_old) WHERE v_options -> 'columns' ? key), '{}') END;
      v_new := CASE WHEN v_new IS NOT NULL THEN coalesce(
        (SELECT jsonb_object_agg(key, value) FROM jsonb_each(v_new) WHERE v_options -> 'columns' ? key), '{}') END;
    END IF;
    IF v_options ? 'exclude' THEN
      FOR i IN 0 .. jsonb_array_length(v_options -> 'exclude') - 1 LOOP
        v_old := v_old - (v_options -> 'exclude' ->> i);
        v_new := v_new - (v_options -> 'exclude' ->> i);
      END LOOP;
    END IF;
  END IF;

  v_entity_type := coalesce(nullif(TG_ARGV[0], ''), CASE coalesce(v_table_name, TG_TABLE_NAME)
    WHEN 'whatsapp_message_reactions' THEN 'reaction'
    WHEN 'whatsapp_messages' THEN 'message'
    WHEN 'tasks' THEN 'task'
    ELSE coalesce(v_table_name, TG_TABLE_NAME)
  END);

  -- Readers conclude from transaction ids whether a lower seq may still appear, so this transaction has its id, which is
  -- never NULL, before it draws the number. In an AFTER trigger it has one already.
  IF pg_current_xact_id() IS NULL
    OR current_setting('cdc.cause', true) <> ''
    OR current_setting('cdc.handled', true) <> ''
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
    IF v_entity_type = ANY (string_to_array(current_setting('cdc.handled', true), ',')) THEN
      v_done_at := now();
      v_done_why := 'discarded: its writer handles it (cdc.handled)';
    END IF;
  END IF;

  INSERT INTO @schema@.entity_changes
    (table_schema, table_name, operation, entity_id, entity_type, old_data, new_data, metadata, caused_by, depth,
     processed, processed_at, last_error)
  VALUES (
    coalesce(v_table_schema, TG_TABLE_SCHEMA),
    coalesce(v_table_name, TG_TABLE_NAME),
    TG_OP,
    v_entity_id,
    v_entity_type,
    v_old,
    v_new,
    -- Documented: none for a DELETE (its old_data says the same). Only keys that the row has a column for, and nothing
    -- that is excluded.
    CASE WHEN v_new IS NOT NULL THEN
      jsonb_build_object('timestamp', now())
      || CASE WHEN v_new ? 'user_id' THEN jsonb_build_object('user_id', v_new -> 'user_id') ELSE '{}' END
      || CASE WHEN v_new ? 'chat_id' OR v_new ? 'room_id' THEN jsonb_build_object(
          'chat_id', coalesce(nullif(v_new -> 'chat_id', 'null'), v_new -> 'room_id', v_new -> 'chat_id')) ELSE '{}' END
    END,
    v_caused_by,
    coalesce(v_depth, 0),
    v_done_at IS NOT NULL,
    v_done_at,
    v_done_why
  )
  -- The doorbell. Not NOTIFY: that takes a lock of the whole cluster until after the commit's flush.
  RETURNING CASE WHEN NOT processed THEN pg_logical_emit_message(true, @prefix_literal@, seq || ',' || shard) END
  INTO v_rung;

  -- Nobody looks at this after the row is written; created BEFORE by mistake, the trigger must not swallow the row.
  IF TG_OP = 'DELETE' THEN
    RETURN OLD;
  END IF;
  RETURN NEW;
END
$cdc$;
REVOKE ALL ON FUNCTION @schema@.capture_entity_change() FROM PUBLIC;

-- An event without a table: the same row and the same ringing. Returns its seq.
CREATE OR REPLACE FUNCTION @schema@.publish_change(
  entity_type text,
  entity_id text,
  operation text DEFAULT 'INSERT',
  new_data jsonb DEFAULT NULL,
  old_data jsonb DEFAULT NULL,
  metadata jsonb DEFAULT NULL
) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $cdc$
DECLARE
  -- See capture_entity_change(). Here the transaction may well have none yet.
  v_xid CONSTANT xid8 := pg_current_xact_id();
  v_cause CONSTANT text := current_setting('cdc.cause', true);
  v_caused_by uuid;
  v_depth integer := 0;
  v_seq bigint;
  v_shard smallint;
  v_rung pg_lsn;
BEGIN
  IF publish_change.entity_type IS NULL OR publish_change.entity_id IS NULL THEN
    RAISE EXCEPTION 'publish_change() needs an entity type and an entity id' USING ERRCODE = 'null_value_not_allowed';
  END IF;
  IF v_cause ~ '^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12},[0-9]{1,9}$' THEN
    v_caused_by := left(v_cause, 36);
    v_depth := least(substr(v_cause, 38)::integer, 999999998) + 1;
    PERFORM set_config('cdc.captured', 'on', true);
  END IF;
  INSERT INTO @schema@.entity_changes AS published
    (table_name, operation, entity_id, entity_type, old_data, new_data, metadata, caused_by, depth)
  VALUES (
    publish_change.entity_type,
    publish_change.operation,
    publish_change.entity_id,
    publish_change.entity_type,
    publish_change.old_data,
    publish_change.new_data,
    publish_change.metadata,
    v_caused_by,
    v_depth
  )
  RETURNING published.seq, published.shard INTO v_seq, v_shard;
  v_rung := pg_logical_emit_message(true, @prefix_literal@, v_seq || ',' || v_shard);
  RETURN v_seq;
END
$cdc$;
REVOKE ALL ON FUNCTION @schema@.publish_change(text, text, text, jsonb, jsonb, jsonb) FROM PUBLIC;

-- For streaming with pgoutput, which insists on a publication and, without wal2json, is what rings. It publishes nothing:
-- messages travel without. It belongs to no schema, and is not needed where wal2json is.
DO $cdc$
BEGIN
  -- "cdc db verify" installs there, for comparison.
  IF @schema_literal@ = 'pg_temp'
    OR EXISTS (SELECT FROM pg_catalog.pg_publication WHERE pubname = @publication_literal@)
  THEN
    RETURN;
  END IF;
  -- A server with a low wal_level warns that this will not do; `cdc doctor` says so when it matters.
  PERFORM pg_catalog.set_config('client_min_messages', 'error', true);
  CREATE PUBLICATION @publication@;
  PERFORM pg_catalog.set_config('client_min_messages', 'warning', true);
EXCEPTION WHEN insufficient_privilege THEN
  RAISE WARNING 'no publication %: that takes the right CREATE on the database', @publication_literal@
    USING HINT = 'only to stream with pgoutput; the owner of the database may create it: CREATE PUBLICATION '
      || pg_catalog.quote_ident(@publication_literal@);
END
$cdc$;
