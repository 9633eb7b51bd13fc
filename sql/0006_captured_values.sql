-- Capture: how the values of a row and its key are written into the outbox. Safe to run again; locks no table.

-- A type or an id has to fit an index entry together with other columns, so a text of more than 1,000 bytes is replaced
-- by its first 100 characters and a hash. The same text always gives the same replacement, so order per key is kept.
-- STABLE and in SQL, so that it is inlined; sha256(), because a FIPS build has it.
CREATE OR REPLACE FUNCTION @schema@.bounded_text(text) RETURNS text
LANGUAGE sql STABLE PARALLEL SAFE
AS $cdc$
  SELECT CASE
    WHEN pg_catalog.octet_length($1) > 1000 THEN pg_catalog.left($1, 100) || '...sha256:'
      || pg_catalog.encode(pg_catalog.sha256(pg_catalog.convert_to($1, pg_catalog.getdatabaseencoding())), 'hex')
    ELSE $1
  END
$cdc$;
REVOKE ALL ON FUNCTION @schema@.bounded_text(text) FROM PUBLIC;

-- A row as JSON, value by value: for a row that cannot be converted as a whole, and for virtual generated columns, which
-- have no value when triggers fire and are computed here. PostgreSQL allows only built-in functions in their expressions.
-- A value that cannot be converted, or that would make the row larger than half of what jsonb can hold, becomes
-- {"cdc:omitted": why}. The caller makes the transaction read only.
CREATE OR REPLACE FUNCTION @schema@.captured_row(p_row record, p_table oid, p_excluded text[]) RETURNS jsonb
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $cdc$
DECLARE
  -- Of 268,435,455 bytes; markers, and 1,600 columns of them, have room above.
  v_room bigint := 128 * 1024 * 1024;
  v_column name;
  v_expression text;
  v_value jsonb;
  v_names text[] := '{}';
  v_values jsonb[] := '{}';
BEGIN
  FOR v_column, v_expression IN
    SELECT a.attname, CASE WHEN a.attgenerated = 'v' THEN
      format('CAST(%s AS %s)', pg_get_expr(d.adbin, d.adrelid), format_type(a.atttypid, a.atttypmod)) END
    FROM pg_attribute AS a LEFT JOIN pg_attrdef AS d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
    WHERE a.attrelid = p_table AND a.attnum > 0 AND NOT a.attisdropped AND a.attname <> ALL (coalesce(p_excluded, '{}'))
    ORDER BY a.attnum
  LOOP
    BEGIN
      IF v_expression IS NULL THEN
        EXECUTE format('SELECT to_jsonb(($1).%I)', v_column) INTO v_value USING p_row;
      ELSE
        EXECUTE format('SELECT to_jsonb(%s) FROM (SELECT $2 AS tableoid, ($1).*) AS captured', v_expression)
          INTO v_value USING p_row, p_table;
      END IF;
      IF pg_column_size(v_value) > v_room THEN
        v_value := jsonb_build_object('cdc:omitted', 'too large');
      END IF;
    EXCEPTION WHEN OTHERS OR assert_failure THEN
      -- A code, and no text: that may quote the value.
      v_value := jsonb_build_object('cdc:omitted', 'cannot be JSON: ' || SQLSTATE);
      -- A row beyond 1 GB cannot be passed on as one; of a key by this name at least the value is told.
      IF v_column = 'id' THEN
        BEGIN
          v_value := to_jsonb(p_row.id);
        EXCEPTION WHEN OTHERS OR assert_failure THEN
          NULL;
        END;
      END IF;
    END;
    v_room := v_room - coalesce(pg_column_size(v_value), 0);
    v_names := v_names || v_column::text;
    v_values := v_values || coalesce(v_value, 'null');
  END LOOP;
  RETURN (SELECT coalesce(jsonb_object_agg(n, v), '{}') FROM unnest(v_names, v_values) AS columns (n, v));
END
$cdc$;
REVOKE ALL ON FUNCTION @schema@.captured_row(record, oid, text[]) FROM PUBLIC;
