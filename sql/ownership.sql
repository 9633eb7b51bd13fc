-- Not a migration: refuses, before anything is changed, to adopt objects that another role owns. Runs before the
-- migrations.
--
-- A migration's statement on a table also runs the triggers, rules, constraints and defaults of that table, with the
-- rights of the installing role, which may be a superuser. And CREATE OR REPLACE keeps an object's owner, who may replace
-- it later. So every object with a name of ours must belong to the installing role, to a role it is a member of, or to a
-- superuser, and so must every function, operator and type that a trigger, rule, policy, constraint, default, index or
-- column there uses. A superuser may act as any role, but does not count as a member of every role here.
DO $cdc$
DECLARE
  v_schema CONSTANT oid := pg_catalog.to_regnamespace(pg_catalog.quote_ident(@schema_literal@))::oid;
  v_found text;
BEGIN
  WITH RECURSIVE self (role) AS (
    SELECT r.oid FROM pg_catalog.pg_roles AS r WHERE r.rolname = current_user
    UNION
    SELECT m.roleid FROM self JOIN pg_catalog.pg_auth_members AS m ON m.member = self.role
  ), trusted (role) AS (
    SELECT role FROM self UNION SELECT r.oid FROM pg_catalog.pg_roles AS r WHERE r.rolsuper
    -- That of the functions that capture, unless somebody else may act as it.
    UNION SELECT r.oid FROM pg_catalog.pg_roles AS r
    WHERE r.rolname LIKE 'cdc\_capture\_%' AND NOT r.rolcanlogin AND NOT EXISTS (
      SELECT FROM pg_catalog.pg_auth_members AS m JOIN pg_catalog.pg_roles AS acting ON acting.oid = m.member
      WHERE m.roleid = r.oid AND NOT acting.rolsuper AND m.member NOT IN (SELECT role FROM self))
  ), relation (oid, name, owner) AS (
    SELECT c.oid, c.oid::regclass::text, c.relowner
    FROM pg_catalog.pg_class AS c
    WHERE (c.relnamespace = v_schema AND c.relname = ANY (ARRAY[
        'entity_changes', 'entity_changes_seq_seq', 'cdc_shards', 'cdc_migrations', 'cdc_sets',
        'cdc_backfills', 'cdc_backfills_id_seq', 'cdc_due_changes', 'cdc_due_changes_number_seq', 'cdc_barriers',
        'cdc_columns', 'cdc_subscriptions', 'cdc_subscriptions_subscription_seq', 'cdc_positions',
        'cdc_subscription_changes', 'cdc_controls', 'cdc_controls_id_seq', 'change_attempts', 'change_attempts_id_seq',
        'cdc_actions', 'cdc_actions_id_seq', 'cdc_limit_leases',
        'action_processing_dashboard', 'recent_action_history']))
  ), routine (oid, name, owner) AS (
    SELECT p.oid, p.oid::regprocedure::text, p.proowner
    FROM pg_catalog.pg_proc AS p
    WHERE p.pronamespace = v_schema AND p.proname = ANY (ARRAY[
        'capture_entity_change', 'publish_change', 'reprocess_failed_actions', 'bounded_text', 'captured_row',
        'capture_rows', 'capture_truncate', 'capture_barrier', 'captured_columns', 'capture_ddl', 'barred', 'publish_due',
        'default_entity_type', 'is_tracked_so', 'fill_shard', 'keep_for_subscriptions', 'legacy_processor_marks',
        'legacy_processor_notify', 'processor_marks', 'processor_notify'])
  ), part (class, oid, name) AS (
    SELECT 'pg_catalog.pg_class'::regclass, r.oid, r.name FROM relation AS r
    UNION ALL
    SELECT 'pg_catalog.pg_trigger'::regclass, t.oid, pg_catalog.format('trigger %I on %s', t.tgname, r.name)
    FROM relation AS r JOIN pg_catalog.pg_trigger AS t ON t.tgrelid = r.oid
    UNION ALL
    SELECT 'pg_catalog.pg_rewrite'::regclass, w.oid, pg_catalog.format('rule %I on %s', w.rulename, r.name)
    FROM relation AS r JOIN pg_catalog.pg_rewrite AS w ON w.ev_class = r.oid
    UNION ALL
    SELECT 'pg_catalog.pg_policy'::regclass, p.oid, pg_catalog.format('policy %I on %s', p.polname, r.name)
    FROM relation AS r JOIN pg_catalog.pg_policy AS p ON p.polrelid = r.oid
    UNION ALL
    SELECT 'pg_catalog.pg_constraint'::regclass, k.oid, pg_catalog.format('constraint %I on %s', k.conname, r.name)
    FROM relation AS r JOIN pg_catalog.pg_constraint AS k ON k.conrelid = r.oid
    UNION ALL
    SELECT 'pg_catalog.pg_attrdef'::regclass, d.oid, pg_catalog.format('default of column %s on %s', d.adnum, r.name)
    FROM relation AS r JOIN pg_catalog.pg_attrdef AS d ON d.adrelid = r.oid
    UNION ALL
    SELECT 'pg_catalog.pg_class'::regclass, i.indexrelid, pg_catalog.format('index %s', i.indexrelid::regclass)
    FROM relation AS r JOIN pg_catalog.pg_index AS i ON i.indrelid = r.oid
  ), used (class, oid, name, owner) AS (
    SELECT 'pg_catalog.pg_proc'::regclass, p.oid, 'function ' || p.oid::regprocedure::text, p.proowner
    FROM pg_catalog.pg_proc AS p
    UNION ALL
    SELECT 'pg_catalog.pg_operator'::regclass, o.oid, 'operator ' || o.oid::regoperator::text, o.oprowner
    FROM pg_catalog.pg_operator AS o
    UNION ALL
    SELECT 'pg_catalog.pg_opclass'::regclass, o.oid, 'operator class ' || o.opcname::text, o.opcowner
    FROM pg_catalog.pg_opclass AS o
    UNION ALL
    SELECT 'pg_catalog.pg_type'::regclass, t.oid, 'type ' || pg_catalog.format_type(t.oid, NULL), t.typowner
    FROM pg_catalog.pg_type AS t
  ), foreign_thing (name, owner) AS (
    SELECT name, owner FROM relation
    UNION
    SELECT name, owner FROM routine
    UNION
    SELECT pg_catalog.format('%s, used by the %s,', used.name, part.name), used.owner
    FROM part
    JOIN pg_catalog.pg_depend AS d ON d.classid = part.class AND d.objid = part.oid
    JOIN used ON used.class = d.refclassid AND used.oid = d.refobjid
  )
  SELECT pg_catalog.string_agg(pg_catalog.format('%s belongs to %I', name, pg_catalog.pg_get_userbyid(owner)), '; '
                               ORDER BY name)
  INTO v_found
  FROM foreign_thing WHERE owner NOT IN (SELECT role FROM trusted);
  IF v_found IS NOT NULL THEN
    RAISE EXCEPTION '% does not adopt what others have made: %', current_user, v_found
      USING HINT = 'if you trust that role and the outbox is to be its own, act as it (PGOPTIONS="-c role=..."); else drop'
        ' or rename what it has made, or give it away (ALTER ... OWNER TO), or install into another schema',
      ERRCODE = 'invalid_object_definition';
  END IF;
END
$cdc$;
