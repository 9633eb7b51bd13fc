-- Turns the objects that an earlier version made for the legacy processor into the set legacy_processor: renames them, and
-- records the set, so that `cdc db remove legacy_processor` finds it. Does nothing otherwise. Safe to run again.
-- Locks: ACCESS EXCLUSIVE on entity_changes for a moment, if it has something to do.

DO $cdc$
DECLARE
  v_former text;
  v_name text;
BEGIN
  FOREACH v_former IN ARRAY ARRAY['processor_marks', 'processor_notify'] LOOP
    -- A function without its trigger is not part of this outbox: an uninstall left it, or it is somebody else's.
    CONTINUE WHEN NOT EXISTS (
      SELECT FROM pg_catalog.pg_trigger AS t
      WHERE t.tgname = v_former
        AND t.tgrelid = pg_catalog.format('%I.entity_changes', @schema_literal@)::pg_catalog.regclass
        AND t.tgfoid = pg_catalog.to_regprocedure(pg_catalog.format('%I.%I()', @schema_literal@, v_former))
    );
    v_name := 'legacy_' || v_former;
    -- Both names exist if a program of that version has run after this migration.
    EXECUTE pg_catalog.format('DROP TRIGGER IF EXISTS %I ON %I.entity_changes', v_name, @schema_literal@);
    EXECUTE pg_catalog.format('DROP FUNCTION IF EXISTS %I.%I()', @schema_literal@, v_name);
    EXECUTE pg_catalog.format('ALTER FUNCTION %I.%I() RENAME TO %I', @schema_literal@, v_former, v_name);
    EXECUTE pg_catalog.format('ALTER TRIGGER %I ON %I.entity_changes RENAME TO %I', v_former, @schema_literal@, v_name);
    CREATE TABLE IF NOT EXISTS @schema@.cdc_sets (
      set_name text NOT NULL,
      version integer NOT NULL,
      name text NOT NULL,
      applied_at timestamptz NOT NULL DEFAULT pg_catalog.now(),
      PRIMARY KEY (set_name, version)
    );
    -- Version 0, so that the migrations of the set are missing, and run after this one.
    INSERT INTO @schema@.cdc_sets (set_name, version, name) VALUES ('legacy_processor', 0, 'former')
    ON CONFLICT DO NOTHING;
  END LOOP;
END
$cdc$;
