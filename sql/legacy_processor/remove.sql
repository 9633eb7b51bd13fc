-- Undoes this set: for `cdc db remove legacy_processor`, once no legacy processor runs. Writers then send no NOTIFY.
DROP TRIGGER IF EXISTS legacy_processor_marks ON @schema@.entity_changes;
DROP TRIGGER IF EXISTS legacy_processor_notify ON @schema@.entity_changes;
DROP FUNCTION IF EXISTS @schema@.legacy_processor_marks(), @schema@.legacy_processor_notify();
DROP INDEX IF EXISTS @schema@.idx_entity_changes_unprocessed;
