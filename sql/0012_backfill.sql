-- Backfill: which tables are read, how far that is, and the function that writes the rows as changes. Safe to run again;
-- takes no lock that a writer or a consumer waits for.

CREATE TABLE IF NOT EXISTS @schema@.cdc_backfills (
  id integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  table_schema text NOT NULL,
  table_name text NOT NULL,
  condition text,
  key_columns text[] NOT NULL,
  -- Their types, collations and operator classes: with others the rows would come in another order.
  key_order text NOT NULL,
  -- Keys, each value as its type writes it: the first to read, the last that was read, the last to read.
  since_key text[],
  after_key text[],
  until_key text[],
  estimate bigint NOT NULL,
  examined bigint NOT NULL DEFAULT 0,
  written bigint NOT NULL DEFAULT 0,
  rate double precision,
  backlog integer NOT NULL,
  state text NOT NULL DEFAULT 'running',
  -- Nobody but the owner may write it: a condition is an expression of this role, and runs with its rights only.
  started_by text NOT NULL DEFAULT current_user,
  started_at timestamptz NOT NULL DEFAULT pg_catalog.now(),
  changed_at timestamptz NOT NULL DEFAULT pg_catalog.now()
);
-- The index that a table has one of them at a time is made by 0022.
REVOKE ALL ON TABLE @schema@.cdc_backfills FROM PUBLIC;
REVOKE ALL ON SEQUENCE @schema@.cdc_backfills_id_seq FROM PUBLIC;
COMMENT ON TABLE @schema@.cdc_backfills IS 'tables whose rows are read into the outbox, and how far that is';

-- Writes rows of a table as changes of the operation READ, as its trigger captures them (capture_entity_change()): with
-- these arguments of it, and with the same settings; the options may also have "subscription": the number of the only one that
-- takes them. To the default one they are processed then. The caller has locked the rows, and keeps them locked until the
-- commit; so the number of each is drawn under its row's lock, as a writer's is.
--
-- The rows come as one array, so that the caller reads them with its own rights. This role, which calls the casts that
-- others may have made, has hardly any. So it takes the table's name from the type of the rows, not from the caller.
CREATE OR REPLACE FUNCTION @schema@.capture_rows(
  p_rows anyarray, p_entity_type text, p_options jsonb, p_backfill integer
) RETURNS TABLE (written_seq bigint, written_shard smallint, woken pg_lsn)
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
  -- Before any number is drawn: readers conclude from transaction ids whether a lower one may still appear.
  v_xid CONSTANT xid8 := pg_current_xact_id();
  v_table oid;
  v_schema name;
  v_name name;
  v_key text[];
  v_prefix text := '';
  v_excluded text[];
  v_stored text[];
  v_nulls jsonb;
  v_row record;
  v_document jsonb;
  v_documents jsonb[] := '{}';
  v_converted boolean;
BEGIN
  IF p_rows IS NULL THEN
    RETURN;
  END IF;
  SELECT c.oid, n.nspname, c.relname INTO STRICT v_table, v_schema, v_name
  FROM pg_type AS t JOIN pg_class AS c ON c.oid = t.typrelid JOIN pg_namespace AS n ON n.oid = c.relnamespace
  WHERE t.typarray = pg_typeof(p_rows);

  IF p_options ? 'columns' THEN
    SELECT array_agg(attname::text) INTO v_excluded FROM pg_attribute
    WHERE attrelid = v_table AND attnum > 0 AND NOT attisdropped AND NOT p_options -> 'columns' ? attname::text;
  END IF;
  IF p_options ? 'exclude' THEN
    v_excluded := v_excluded || ARRAY(SELECT jsonb_array_elements_text(p_options -> 'exclude'));
  END IF;
  IF p_options -> 'virtual' = 'true' THEN
    v_excluded := coalesce(v_excluded, '{}');
    SELECT array_agg(attname::text) INTO v_stored FROM pg_attribute
    WHERE attrelid = v_table AND attnum > 0 AND NOT attisdropped
      AND (attgenerated <> 'v' OR attname = ANY (v_excluded));
  END IF;
  IF v_excluded IS NOT NULL THEN
    v_nulls := jsonb_object(v_excluded, array_fill(NULL::text, ARRAY[cardinality(v_excluded)]));
  END IF;

  -- Read only, and undone in any case, for the reasons that capture_entity_change() has.
  BEGIN
    PERFORM set_config('transaction_read_only', 'on', true);
    FOREACH v_row IN ARRAY p_rows LOOP
      IF v_excluded IS NULL THEN
        v_document := to_jsonb(v_row);
      ELSE
        v_document := to_jsonb(jsonb_populate_record(v_row, v_nulls)) - v_excluded;
        IF v_stored IS NOT NULL THEN
          v_document := v_document || @schema@.captured_row(v_row, v_table, v_stored);
        END IF;
      END IF;
      v_documents := array_append(v_documents, v_document);
    END LOOP;
    v_converted := true;
    RAISE assert_failure;
  EXCEPTION WHEN OTHERS OR assert_failure THEN
    NULL;
  END;
  -- One of them holds what JSON cannot: value by value.
  IF v_converted IS NULL THEN
    v_documents := '{}';
    BEGIN
      PERFORM set_config('transaction_read_only', 'on', true);
      FOREACH v_row IN ARRAY p_rows LOOP
        v_documents := array_append(v_documents, @schema@.captured_row(v_row, v_table, v_excluded));
      END LOOP;
      v_converted := true;
      RAISE assert_failure;
    EXCEPTION WHEN assert_failure THEN
      IF v_converted IS NULL THEN
        RAISE;
      END IF;
    END;
  END IF;

  IF p_options ? 'key' THEN
    v_key := ARRAY(SELECT jsonb_array_elements_text(p_options -> 'key'));
  ELSIF v_documents[1] ? 'id' THEN
    v_key := '{id}';
  ELSE
    SELECT array_agg(a.attname::text ORDER BY k.place) INTO v_key
    FROM pg_index AS i
    CROSS JOIN LATERAL unnest(i.indkey) WITH ORDINALITY AS k (attnum, place)
    JOIN pg_attribute AS a ON a.attrelid = i.indrelid AND a.attnum = k.attnum
    WHERE i.indrelid = v_table AND i.indisprimary;
  END IF;
  IF NOT coalesce(v_documents[1] ?& v_key, false) THEN
    RAISE EXCEPTION 'table %.% has no column of its key %', v_schema, v_name, v_key
      USING HINT = 'name the key columns anew: cdc track TABLE --key col[,col]', ERRCODE = 'undefined_column';
  END IF;

  IF p_options -> 'schema_in_key' = 'true' THEN
    v_prefix := replace(replace(v_schema, '%', '%25'), '/', '%2F') || '/';
  END IF;
  RETURN QUERY
  INSERT INTO @schema@.entity_changes AS made
    (table_schema, table_name, operation, entity_id, shard, entity_type, new_data, metadata,
     subscription, processed, processed_at)
  SELECT v_schema, v_name, 'READ', e.id, (hashtext(e.id) & 63)::smallint,
    @schema@.bounded_text(coalesce(nullif(p_entity_type, ''), @schema@.default_entity_type(v_name::text))),
    d.document,
    jsonb_build_object('timestamp', now(), 'backfill', p_backfill)
      || CASE WHEN d.document ? 'user_id' THEN jsonb_build_object('user_id', d.document -> 'user_id') ELSE '{}' END
      || CASE WHEN d.document ?| '{chat_id,room_id}' THEN jsonb_build_object('chat_id', coalesce(
           nullif(d.document -> 'chat_id', 'null'), d.document -> 'room_id', d.document -> 'chat_id')) ELSE '{}' END,
    (p_options ->> 'subscription')::smallint, p_options ? 'subscription', CASE WHEN p_options ? 'subscription' THEN now() END
  FROM unnest(v_documents) WITH ORDINALITY AS d (document, place)
  CROSS JOIN LATERAL (
    SELECT @schema@.bounded_text(v_prefix || CASE cardinality(v_key)
      WHEN 1 THEN coalesce(d.document ->> v_key[1], 'null')
      ELSE (SELECT jsonb_agg(d.document -> k.name ORDER BY k.place)::text
            FROM unnest(v_key) WITH ORDINALITY AS k (name, place)) END) AS id
  ) AS e
  ORDER BY d.place
  RETURNING made.seq, made.shard, pg_logical_emit_message(true, @prefix_literal@, made.seq || ',' || made.shard);
END
$cdc$;
REVOKE ALL ON FUNCTION @schema@.capture_rows(anyarray, text, jsonb, integer) FROM PUBLIC;
