-- The application's tables, as far as the documented code reads and writes them, all in the demo's own schema.

CREATE TABLE whatsapp_message_reactions (
  id text PRIMARY KEY,
  message_id text NOT NULL,
  reaction text NOT NULL,
  user_id text NOT NULL,
  chat_id text NOT NULL,
  created_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE whatsapp_messages (
  id text PRIMARY KEY,
  content text,
  user_id text NOT NULL,
  chat_id text NOT NULL,
  created_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE tasks (
  id text PRIMARY KEY,
  title text NOT NULL,
  user_id text,
  room_id text,
  created_at timestamptz NOT NULL DEFAULT now()
);

-- The documented triggers.

CREATE TRIGGER track_reaction_changes
  AFTER INSERT OR UPDATE OR DELETE ON whatsapp_message_reactions
  FOR EACH ROW EXECUTE FUNCTION capture_entity_change();

CREATE TRIGGER track_message_changes
  AFTER INSERT ON whatsapp_messages
  FOR EACH ROW EXECUTE FUNCTION capture_entity_change();

CREATE TRIGGER track_task_changes
  AFTER INSERT ON tasks
  FOR EACH ROW EXECUTE FUNCTION capture_entity_change();
