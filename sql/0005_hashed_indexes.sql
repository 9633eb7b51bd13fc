-- Waiting changes by type and by key, of any length. Safe to run again.
--
-- A B-tree entry has at most 2,704 bytes, and an update that would make a longer one fails. So these indexes hold a 64-bit
-- hash of the type and of the key; a query that uses them compares the text as well.
-- Locks: ACCESS EXCLUSIVE on entity_changes until the transaction ends, for a scan of the table: some seconds for ten
-- million rows. Writers of captured tables wait meanwhile. A later run takes SHARE for a moment.

DROP INDEX IF EXISTS @schema@.entity_changes_due_by_type, @schema@.entity_changes_holding;

-- Retries of one entity type by their due time, so that many of one type do not delay those of another. Neither predicate
-- implies that of another index of waiting changes: with statistics from when nothing waited, all would look equally
-- cheap, and a query that used the wrong one would read every waiting change.
CREATE INDEX IF NOT EXISTS entity_changes_waiting
  ON @schema@.entity_changes (pg_catalog.hashtextextended(coalesce(entity_type, table_name), 0), next_attempt_at)
  WHERE next_attempt_at IS NOT NULL AND dead_at IS NULL;
-- Does an earlier change of this key hold it back?
CREATE INDEX IF NOT EXISTS entity_changes_holding_back
  ON @schema@.entity_changes (
    pg_catalog.hashtextextended(entity_id, pg_catalog.hashtextextended(coalesce(entity_type, table_name), 0)), seq
  )
  WHERE next_attempt_at IS NOT NULL;
