-- The proof of 0019_tracked_so.sql for a table that has columns which go into the metadata: those of p_metadata, and no
-- other. What is said there is true of it, word for word. Safe to run again; takes no lock.
--
-- That of 0019 stays for the functions that were made before, until `cdc db upgrade` or `cdc track` makes them anew.
CREATE OR REPLACE FUNCTION @schema@.is_tracked_so(
  p_table oid, p_namespace text, p_name text, p_function text, p_arguments text, p_types text, p_metadata text[]
) RETURNS boolean
LANGUAGE plpgsql IMMUTABLE
SET search_path = pg_catalog, pg_temp
SET standard_conforming_strings = on
SET quote_all_identifiers = off
AS $cdc$
DECLARE
  v_row text;
  v_triggers text[];
BEGIN
  IF p_table::regclass::text <> format('%I.%I', p_namespace, p_name) OR pg_partition_root(p_table) IS NOT NULL THEN
    RETURN false;
  END IF;
  SELECT array_agg(pg_get_triggerdef(t.oid)) INTO v_triggers
  FROM pg_trigger AS t
  JOIN pg_proc AS p ON p.oid = t.tgfoid
  -- Of this schema: that of the type, which is found by its name.
  JOIN pg_type AS y ON y.typnamespace = p.pronamespace AND y.oid = pg_typeof(NULL::@schema@.entity_changes)
  WHERE t.tgrelid = p_table AND p.proname = p_function AND p.pronargs = 0;
  IF (cardinality(v_triggers) = 1
    AND right(v_triggers[1], length(p_arguments)) = p_arguments
    AND v_triggers[1] ~ '^CREATE TRIGGER ([^" ]+|"([^"]|"")+") AFTER ') IS NOT TRUE
  THEN
    RETURN false;
  END IF;
  v_row := split_part(split_part(table_to_xmlschema(p_table, false, false, '')::text,
    '<xsd:complexType name="RowType.', 2), '</xsd:complexType>', 1);
  RETURN coalesce((
    SELECT bool_and(e.found[2] ~ p_types)
      AND count(*) FILTER (WHERE e.found[1] = ANY ('{user_id,chat_id,room_id}')) = cardinality(p_metadata)
      AND count(*) FILTER (WHERE e.found[1] = ANY (p_metadata)) = cardinality(p_metadata)
    FROM regexp_matches(v_row, '<xsd:element name="([^"]*)" type="([^"]*)"', 'g') AS e (found)
  ), false);
EXCEPTION WHEN OTHERS THEN
  RETURN false;
END
$cdc$;
GRANT EXECUTE ON FUNCTION @schema@.is_tracked_so(oid, text, text, text, text, text, text[]) TO PUBLIC;
