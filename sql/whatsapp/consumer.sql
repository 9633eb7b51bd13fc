-- What the handlers of the WhatsApp application need besides: for `cdc db grant --consumer ROLE --with whatsapp`.
GRANT SELECT ON TABLE @schema@."actionRules", @schema@.cdc_sets TO @role@;
GRANT USAGE ON SCHEMA cortex_projects TO @role@;
-- ON CONFLICT reads the columns of the unique key.
GRANT SELECT (reaction_id, rule_id), INSERT (title, user_id, room_id, reaction_id, rule_id)
  ON TABLE cortex_projects.tasks TO @role@;
GRANT EXECUTE ON FUNCTION @schema@.publish_change(text, text, text, jsonb, jsonb, jsonb, timestamp with time zone) TO @role@;
