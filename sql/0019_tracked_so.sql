-- The proof by which a capture function that is made for one table (cdc/postgres/table_capture.py) converts a row without
-- a subtransaction. Safe to run again; takes no lock.
--
-- Whether the table is as that function was made for: its name and schema; no partition; columns that are all of the
-- server's own types that p_types matches, and none that goes into the metadata; one trigger that calls the function, AFTER,
-- with these arguments. So converting its rows calls no code of anybody else's.
--
-- It is not immutable. Declared so, the server calls it when it plans an expression in which all its arguments are
-- constants, and not for each row. The plan of such an expression depends on the table, since one of the constants is its
-- oid (as nextval('...'::regclass) does on its sequence): whatever changes the table or its triggers makes the server plan
-- anew, before the next row is captured. What is planned in one transaction is used by later ones, so nothing here may be
-- seen by the transaction's snapshot, which can be older than the lock on the table: the columns are read as
-- table_to_xmlschema() and the trigger as pg_get_triggerdef() have them, from the catalogs as they are. Which triggers to
-- look at is found by the snapshot: one that was made since is another capture, by hand, and judged by the next plan.
--
-- Anybody may call it: it says nothing that the catalogs do not. Without libxml it is false.
CREATE OR REPLACE FUNCTION @schema@.is_tracked_so(
  p_table oid, p_namespace text, p_name text, p_function text, p_arguments text, p_types text
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
    SELECT bool_and(e.found[1] <> ALL ('{user_id,chat_id,room_id}') AND e.found[2] ~ p_types)
    FROM regexp_matches(v_row, '<xsd:element name="([^"]*)" type="([^"]*)"', 'g') AS e (found)
  ), false);
EXCEPTION WHEN OTHERS THEN
  RETURN false;
END
$cdc$;
GRANT EXECUTE ON FUNCTION @schema@.is_tracked_so(oid, text, text, text, text, text) TO PUBLIC;
