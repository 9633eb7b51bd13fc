-- The entity types of the documented design's three tables, for triggers that name none, so that its CREATE TRIGGER
-- statements work as they are written. For any other table the type is the table's name. A trigger that `cdc track --type`
-- makes names its type. Safe to run again; locks no table.

-- Called by capture_entity_change(). In SQL and without SET, so that it is inlined there. The same table for code that
-- reads the catalogs only: cdc.postgres.tracked_tables.DOCUMENTED_TYPES.
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
