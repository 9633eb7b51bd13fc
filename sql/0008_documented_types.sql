-- The entity types that the documented design has for its three tables, for triggers that name none: its own CREATE TRIGGER
-- statements work as they are written. Any other table's changes have its name. An application of today names the type in
-- its trigger, as `cdc track --type` does. Safe to run again; locks no table.

-- For capture_entity_change(). In SQL and without settings of its own, so that it is inlined there: a captured row calls
-- no second function. cdc.postgres.tracked_tables.DOCUMENTED_TYPES says the same to who reads the catalogs alone.
CREATE OR REPLACE FUNCTION @schema@.default_entity_type(p_table_name text) RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE
AS $cdc$
  SELECT CASE p_table_name
    WHEN 'whatsapp_message_reactions' THEN 'reaction'
    WHEN 'whatsapp_messages' THEN 'message'
    WHEN 'tasks' THEN 'task'
    ELSE p_table_name
  END
$cdc$;
REVOKE ALL ON FUNCTION @schema@.default_entity_type(text) FROM PUBLIC;
