-- The outbox and its trigger as the documented design has them: what capturing with NOTIFY costs is measured with these.
-- The table that is captured has every column which the function names.
CREATE TABLE entity_changes (
  id UUID PRIMARY KEY DEFAULT gen_random_uuid(),
  table_name TEXT NOT NULL,
  operation TEXT NOT NULL CHECK (operation IN ('INSERT', 'UPDATE', 'DELETE')),
  entity_id TEXT NOT NULL,
  entity_type TEXT,
  old_data JSONB,
  new_data JSONB,
  metadata JSONB,
  changed_at TIMESTAMP DEFAULT NOW(),
  processed BOOLEAN DEFAULT FALSE,
  processed_at TIMESTAMP,
  error_count INTEGER DEFAULT 0,
  last_error TEXT
);

CREATE INDEX idx_entity_changes_unprocessed
  ON entity_changes(processed, changed_at)
  WHERE processed = FALSE;

CREATE INDEX idx_entity_changes_type
  ON entity_changes(entity_type, processed);

CREATE OR REPLACE FUNCTION capture_entity_change()
RETURNS TRIGGER AS $$
BEGIN
  INSERT INTO entity_changes (
    table_name,
    operation,
    entity_id,
    entity_type,
    old_data,
    new_data,
    metadata
  ) VALUES (
    TG_TABLE_NAME,
    TG_OP,
    CASE
      WHEN TG_OP = 'DELETE' THEN OLD.id::TEXT
      ELSE NEW.id::TEXT
    END,
    CASE
      WHEN TG_TABLE_NAME = 'whatsapp_message_reactions' THEN 'reaction'
      WHEN TG_TABLE_NAME = 'whatsapp_messages' THEN 'message'
      WHEN TG_TABLE_NAME = 'tasks' THEN 'task'
      ELSE TG_TABLE_NAME
    END,
    CASE WHEN TG_OP != 'INSERT' THEN to_jsonb(OLD) ELSE NULL END,
    CASE WHEN TG_OP != 'DELETE' THEN to_jsonb(NEW) ELSE NULL END,
    CASE
      WHEN TG_OP != 'DELETE' THEN
        jsonb_build_object(
          'user_id', NEW.user_id,
          'chat_id', COALESCE(NEW.chat_id, NEW.room_id),
          'timestamp', NOW()
        )
      ELSE NULL
    END
  );

  PERFORM pg_notify(
    'entity_change',
    json_build_object(
      'table', TG_TABLE_NAME,
      'operation', TG_OP,
      'entity_type', CASE
        WHEN TG_TABLE_NAME = 'whatsapp_message_reactions' THEN 'reaction'
        ELSE TG_TABLE_NAME
      END
    )::text
  );

  RETURN NEW;
END;
$$ LANGUAGE plpgsql;

CREATE TRIGGER track_bench_rows
  AFTER INSERT ON bench_rows
  FOR EACH ROW EXECUTE FUNCTION capture_entity_change();
