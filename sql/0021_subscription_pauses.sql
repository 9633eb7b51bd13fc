-- A paused subscription is a row of cdc_controls, as whatever else is paused. What is paused stays so. Safe to run again.
-- Takes ACCESS EXCLUSIVE on cdc_subscriptions for a moment, where it has the former columns: consumers of subscriptions read
-- it each second, writers never.

DO $cdc$
BEGIN
  IF EXISTS (
    SELECT FROM pg_catalog.pg_attribute AS a
    WHERE a.attrelid = pg_catalog.format('%I.cdc_subscriptions', @schema_literal@)::regclass AND a.attname = 'paused_at' AND NOT a.attisdropped
  ) THEN
    LOCK TABLE @schema@.cdc_subscriptions IN ACCESS EXCLUSIVE MODE;
    -- The reason had no bound; a character has at most four bytes.
    INSERT INTO @schema@.cdc_controls (subscription, because, set_by, set_at)
    SELECT s.name, coalesce(nullif(pg_catalog.left(s.paused_because, 500), ''), 'no reason was given'),
           'cdc subscription pause', s.paused_at
    FROM @schema@.cdc_subscriptions AS s
    WHERE s.paused_at IS NOT NULL AND NOT EXISTS (
      SELECT FROM @schema@.cdc_controls AS c
      WHERE c.subscription = s.name AND c.entity_type IS NULL AND c.handler IS NULL AND c.entity_id IS NULL
        AND c.until IS NULL);
    ALTER TABLE @schema@.cdc_subscriptions DROP COLUMN paused_at, DROP COLUMN paused_because;
  END IF;
END
$cdc$;
