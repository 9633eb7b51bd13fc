-- Removes the constraint that listed the states: the server parsed it for each captured row, a tenth of what
-- capturing costs its writer. Safe to run again.
--
-- A row is in exactly one state: fresh, waiting, processed or dead (cdc.core.model.ChangeState). Capturing makes a row
-- fresh or processed, and each statement of a consumer leads from one state to another. What somebody writes by hand may
-- be in none, and nobody would handle it: `cdc doctor` (states) finds such rows.
-- Locks: ACCESS EXCLUSIVE on entity_changes for a moment, where the constraint is there.

DO $cdc$
DECLARE
  v_outbox CONSTANT regclass := pg_catalog.format('%I.entity_changes', @schema_literal@)::regclass;
BEGIN
  IF EXISTS (
    SELECT FROM pg_catalog.pg_constraint WHERE conrelid = v_outbox AND conname = 'entity_changes_state_check'
  ) THEN
    ALTER TABLE @schema@.entity_changes DROP CONSTRAINT entity_changes_state_check;
  END IF;
END
$cdc$;
