-- The tables of the WhatsApp application, and their capture. Safe to run again.
--
-- Tables that exist are kept as they are. On those, each new trigger waits for the writers of its table, and the index of
-- cortex_projects.tasks blocks them while it is built; on tables made here neither takes time.

CREATE TABLE IF NOT EXISTS @schema@.whatsapp_messages (
  id text PRIMARY KEY,
  content text,
  user_id text NOT NULL,
  chat_id text NOT NULL,
  sent_at timestamptz NOT NULL DEFAULT pg_catalog.now(),
  created_at timestamptz NOT NULL DEFAULT pg_catalog.now()
);

CREATE TABLE IF NOT EXISTS @schema@.whatsapp_message_reactions (
  id text PRIMARY KEY,
  message_id text NOT NULL,
  reaction text NOT NULL,
  user_id text NOT NULL,
  chat_id text NOT NULL,
  sent_at timestamptz NOT NULL DEFAULT pg_catalog.now(),
  created_at timestamptz NOT NULL DEFAULT pg_catalog.now()
);

-- Removed reactions, and when: an older event that arrives late must not restore one.
CREATE TABLE IF NOT EXISTS @schema@.whatsapp_removed_reactions (
  id text PRIMARY KEY,
  sent_at timestamptz NOT NULL
);

CREATE TABLE IF NOT EXISTS @schema@."actionRules" (
  id text PRIMARY KEY DEFAULT pg_catalog.gen_random_uuid()::text,
  name text,
  rule_type text NOT NULL,
  config jsonb NOT NULL,
  active boolean NOT NULL DEFAULT true,
  created_at timestamptz NOT NULL DEFAULT pg_catalog.now()
);

DO $cdc$
BEGIN
  -- Not IF NOT EXISTS: that asks for the right to create a schema even where it is there.
  IF pg_catalog.to_regnamespace('cortex_projects') IS NULL THEN
    CREATE SCHEMA cortex_projects;
  END IF;
END
$cdc$;
-- reaction_id and rule_id say why there is a task, and are NULL if another program has made it.
CREATE TABLE IF NOT EXISTS cortex_projects.tasks (
  id text PRIMARY KEY DEFAULT pg_catalog.gen_random_uuid()::text,
  title text NOT NULL,
  user_id text,
  room_id text,
  reaction_id text,
  rule_id text,
  created_at timestamptz NOT NULL DEFAULT pg_catalog.now()
);

-- A table that existed before must have the columns that the code reads and writes.
DO $cdc$
DECLARE
  v_ours CONSTANT text := pg_catalog.quote_ident(@schema_literal@) || '.';
  v_table regclass;
  v_missing text;
  v_remedy text;
BEGIN
  SELECT needed.relation, string_agg(c, ', ' ORDER BY place),
         format('ALTER TABLE %s %s', needed.relation, string_agg(format('ADD COLUMN %s %s', c, t), ', ' ORDER BY place))
  INTO v_table, v_missing, v_remedy
  FROM (VALUES
    ((v_ours || 'whatsapp_messages')::regclass,
      '{id,content,user_id,chat_id,sent_at}', '{text,text,text,text,timestamptz NOT NULL DEFAULT now()}'),
    ((v_ours || 'whatsapp_message_reactions')::regclass,
      '{id,message_id,reaction,user_id,chat_id,sent_at}', '{text,text,text,text,text,timestamptz NOT NULL DEFAULT now()}'),
    ((v_ours || 'whatsapp_removed_reactions')::regclass, '{id,sent_at}', '{text,timestamptz}'),
    ((v_ours || '"actionRules"')::regclass, '{id,rule_type,config,active}', '{text,text,jsonb,boolean}'),
    ('cortex_projects.tasks'::regclass,
      '{id,title,user_id,room_id,reaction_id,rule_id}', '{text,text,text,text,text,text}')
  ) AS needed (relation, names, types)
  CROSS JOIN LATERAL unnest(names::text[], types::text[]) WITH ORDINALITY AS wanted (c, t, place)
  WHERE NOT EXISTS (
    SELECT FROM pg_catalog.pg_attribute
    WHERE attrelid = needed.relation AND attname = c AND attnum > 0 AND NOT attisdropped
  )
  GROUP BY needed.relation ORDER BY needed.relation::text LIMIT 1;
  IF FOUND THEN
    RAISE EXCEPTION 'the table % is there already, without the column %', v_table, v_missing
      USING HINT = v_remedy || '; or move the table out of the way', ERRCODE = 'undefined_column';
  END IF;

  -- What is stored a second time is found by its id.
  FOREACH v_table IN ARRAY ARRAY[
    v_ours || 'whatsapp_messages', v_ours || 'whatsapp_message_reactions', v_ours || 'whatsapp_removed_reactions'
  ]::regclass[] LOOP
    IF NOT EXISTS (
      SELECT FROM pg_catalog.pg_index AS i
      JOIN pg_catalog.pg_attribute AS a ON a.attrelid = i.indrelid AND a.attname = 'id'
      WHERE i.indrelid = v_table AND i.indisunique AND i.indimmediate AND i.indpred IS NULL AND i.indnkeyatts = 1
        AND i.indkey[0] = a.attnum
    ) THEN
      RAISE EXCEPTION 'the table % is there already, without a unique key on its column id', v_table
        USING HINT = format('ALTER TABLE %s ADD UNIQUE (id); or move the table out of the way', v_table),
          ERRCODE = 'invalid_column_reference';
    END IF;
  END LOOP;
END
$cdc$;

-- One task for each reaction and rule, whatever else goes wrong.
CREATE UNIQUE INDEX IF NOT EXISTS tasks_reaction_id_rule_id_idx ON cortex_projects.tasks (reaction_id, rule_id);

-- The documented triggers, as `cdc track` makes them. A table that any trigger captures already is left as it is.
DO $cdc$
DECLARE
  v_ours CONSTANT text := pg_catalog.quote_ident(@schema_literal@) || '.';
  v_capture CONSTANT regprocedure := v_ours || 'capture_entity_change()';
  v_table regclass;
  v_type text;
  v_on text;
BEGIN
  FOR v_table, v_type, v_on IN VALUES
    ((v_ours || 'whatsapp_message_reactions')::regclass, 'reaction', 'INSERT OR UPDATE OR DELETE'),
    ((v_ours || 'whatsapp_messages')::regclass, 'message', 'INSERT'),
    ('cortex_projects.tasks'::regclass, 'task', 'INSERT')
  LOOP
    CONTINUE WHEN EXISTS (SELECT FROM pg_catalog.pg_trigger AS t
      JOIN pg_catalog.pg_proc AS p ON p.oid = t.tgfoid
      WHERE t.tgrelid = v_table AND (p.oid = v_capture
        -- Made for the table, by cdc track.
        OR @is_table_function@
          AND p.pronamespace = (SELECT g.pronamespace FROM pg_catalog.pg_proc AS g WHERE g.oid = v_capture)));
    EXECUTE format(
      'CREATE TRIGGER %I AFTER %s ON %s FOR EACH ROW EXECUTE FUNCTION %s(%L, %L)',
      @trigger_literal@, v_on, v_table, v_capture::regproc, v_type, '{"key": ["id"]}'
    );
  END LOOP;
END
$cdc$;
