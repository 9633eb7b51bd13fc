-- What waits, found by its type and by its key, of any length. Safe to run again.
--
-- A B-tree takes entries of up to 2,704 bytes, and refuses the mark that would make a longer one. So types and keys stand
-- in these indexes by a hash of 64 bits; whoever looks one up compares the text as well.
-- Locks: ACCESS EXCLUSIVE on entity_changes until the transaction ends, for a scan of the table: some seconds for ten
-- million rows. Capturing waits meanwhile. A later run takes SHARE for a moment.

DROP INDEX IF EXISTS @schema@.entity_changes_due_by_type, @schema@.entity_changes_holding;

-- Retries of one entity type as they are due, so that many of one do not stand before those of another. No predicate of
-- these two implies that of another index of what waits: by statistics of a time when nothing waited all look equally
-- cheap, and each probe that took the wrong one would walk all that waits.
CREATE INDEX IF NOT EXISTS entity_changes_waiting
  ON @schema@.entity_changes (pg_catalog.hashtextextended(coalesce(entity_type, table_name), 0), next_attempt_at)
  WHERE next_attempt_at IS NOT NULL AND dead_at IS NULL;
-- Does an earlier change of this key hold it back?
CREATE INDEX IF NOT EXISTS entity_changes_holding_back
  ON @schema@.entity_changes (
    pg_catalog.hashtextextended(entity_id, pg_catalog.hashtextextended(coalesce(entity_type, table_name), 0)), seq
  )
  WHERE next_attempt_at IS NOT NULL;
