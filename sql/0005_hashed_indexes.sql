-- Removes indexes of waiting changes whose entries could not be of any length. Safe to run again; 0011 makes those of now.
-- Locks: ACCESS EXCLUSIVE on entity_changes until the transaction ends, where they are there.

DROP INDEX IF EXISTS @schema@.entity_changes_due_by_type, @schema@.entity_changes_holding;
