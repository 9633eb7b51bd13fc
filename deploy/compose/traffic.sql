-- The application: some rows each second, until it is stopped. It knows nothing of a consumer.

WITH messages AS (
  INSERT INTO whatsapp_messages (content, user_id, chat_id)
  SELECT CASE WHEN random() < 0.03 THEN 'help, is anybody there?' ELSE 'Did you see this?' END,
         'user-' || floor(random() * 50), 'chat-' || floor(random() * 10)
  FROM generate_series(1, 1 + floor(random() * 20)::int)
  RETURNING id, user_id, chat_id
)
INSERT INTO whatsapp_message_reactions (message_id, reaction, user_id, chat_id)
SELECT id, CASE WHEN random() < 0.2 THEN '✅' ELSE '👍' END, user_id, chat_id FROM messages WHERE random() < 0.5
\watch 1
