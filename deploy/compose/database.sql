-- What is there before the consumer comes: the application with its tables, and roles for the consumer and for operators.

CREATE ROLE app LOGIN PASSWORD 'for-this-machine';
CREATE ROLE cdc LOGIN REPLICATION PASSWORD 'for-this-machine';
CREATE ROLE ops LOGIN PASSWORD 'for-this-machine';
-- The schema is the application's, and nobody else makes anything in it.
ALTER SCHEMA public OWNER TO app;
REVOKE CREATE ON SCHEMA public FROM PUBLIC;

SET ROLE app;

CREATE TABLE whatsapp_messages (
  id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  content text NOT NULL,
  user_id text NOT NULL,
  chat_id text NOT NULL
);

CREATE TABLE whatsapp_message_reactions (
  id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  message_id bigint NOT NULL,
  reaction text NOT NULL,
  user_id text NOT NULL,
  chat_id text NOT NULL
);

CREATE TABLE tasks (
  id text PRIMARY KEY,
  title text NOT NULL,
  user_id text,
  room_id text
);

-- The consumer's handlers add tasks.
GRANT INSERT ON tasks TO cdc;
