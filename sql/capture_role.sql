-- Not a migration: gives the capture functions to a role of their own. Runs after the migrations, each time.
--
-- They run with their owner's rights, and call casts to json that the owners of tables and types have made. So their owner
-- owns nothing else, and has no more rights than they need. The owner of the outbox is a member of it, so that it may
-- replace them. An installing role that may not create roles gets a warning, and its functions keep their owner.
DO $cdc$
DECLARE
  v_schema CONSTANT name := @schema_literal@;
  v_outbox CONSTANT regclass := pg_catalog.format('%I.entity_changes', v_schema)::regclass;
  v_functions CONSTANT text[] := ARRAY[
    'bounded_text(text)', 'default_entity_type(text)', 'captured_row(record, oid, text[])', 'capture_entity_change()',
    'publish_change(text, text, text, jsonb, jsonb, jsonb, timestamp with time zone)',
    'capture_rows(anyarray, text, jsonb, integer)', 'capture_truncate()',
    'capture_barrier(text, text, text, text, jsonb, jsonb, jsonb)', 'captured_columns(oid)', 'capture_ddl()'];
  v_written CONSTANT text[] := '{id, table_schema, table_name, operation, entity_id, entity_type, old_data, new_data,
    metadata, caused_by, depth, processed, processed_at, last_error, shard, subscription}';
  v_returned CONSTANT text[] := '{seq, shard}';
  v_due CONSTANT regclass := pg_catalog.format('%I.cdc_due_changes', v_schema)::regclass;
  v_due_written CONSTANT text[] := '{due, entity_type, entity_id, operation, old_data, new_data, metadata, caused_by,
    depth}';
  v_barriers CONSTANT regclass := pg_catalog.format('%I.cdc_barriers', v_schema)::regclass;
  v_columns CONSTANT regclass := pg_catalog.format('%I.cdc_columns', v_schema)::regclass;
  v_noted CONSTANT text[] := '{trigger, table_schema, table_name, entity_type, columns}';
  v_table regclass;
  v_inserted text[];
  v_selected text[];
  v_updated text[];
  v_role text := 'cdc_capture_' || pg_catalog.current_database() || '_' || v_schema;
  v_owner name;
  v_present name;
  v_create boolean;
  v_emit regprocedure;
  v_function text;
BEGIN
  -- An identifier has 63 bytes.
  IF pg_catalog.octet_length(v_role) > 63 THEN
    v_role := 'cdc_capture_' || pg_catalog.left(pg_catalog.encode(pg_catalog.sha256(
      pg_catalog.convert_to(v_role, pg_catalog.getdatabaseencoding())), 'hex'), 32);
  END IF;
  SELECT pg_catalog.pg_get_userbyid(relowner) INTO v_owner
  FROM pg_catalog.pg_class WHERE oid = v_outbox;
  SELECT pg_catalog.pg_get_userbyid(proowner) INTO v_present FROM pg_catalog.pg_proc
  WHERE oid = pg_catalog.format('%I.capture_entity_change()', v_schema)::regprocedure;
  -- The database or the schema may have been renamed since.
  IF v_present LIKE 'cdc\_capture\_%' AND v_present <> v_owner THEN
    v_role := v_present;
  END IF;

  BEGIN
    IF pg_catalog.to_regrole(pg_catalog.quote_ident(v_role)) IS NULL THEN
      EXECUTE pg_catalog.format('CREATE ROLE %I NOLOGIN', v_role);
    ELSIF EXISTS (
      SELECT FROM pg_catalog.pg_roles AS r WHERE r.rolname = v_role AND (
        r.rolsuper OR r.rolcanlogin OR r.rolcreaterole OR r.rolcreatedb OR r.rolreplication OR r.rolbypassrls
        OR EXISTS (SELECT FROM pg_catalog.pg_auth_members AS m WHERE m.member = r.oid)
        -- Two databases and schemas may spell one name; and whatever it has elsewhere, these functions would have.
        OR v_role <> v_present AND EXISTS (
          SELECT FROM pg_catalog.pg_shdepend AS d WHERE d.refclassid = 'pg_catalog.pg_authid'::regclass
            AND d.refobjid = r.oid AND d.deptype = 'o'
            -- What `cdc track` has made for tables stays with it while the others are given away.
            AND NOT (d.classid = 'pg_catalog.pg_proc'::regclass
              AND d.dbid = (SELECT b.oid FROM pg_catalog.pg_database AS b WHERE b.datname = pg_catalog.current_database())
              AND EXISTS (SELECT FROM pg_catalog.pg_proc AS p
                WHERE p.oid = d.objid AND p.pronamespace = pg_catalog.quote_ident(v_schema)::regnamespace
                  AND @is_table_function@)))))
    THEN
      RAISE EXCEPTION 'the role % may do more than capture', v_role USING ERRCODE = '42501';
    END IF;
    IF NOT (SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname = v_owner)
      AND NOT pg_catalog.pg_has_role(v_owner, v_role, 'USAGE')
    THEN
      EXECUTE pg_catalog.format('GRANT %I TO %I', v_role, v_owner);
    END IF;

    -- Exactly these rights, and none on a whole table: who has one may lock it.
    FOR v_table, v_inserted, v_selected, v_updated IN VALUES (v_outbox, v_written, v_returned, '{}'::text[]),
      (v_due, v_due_written, '{}', '{}'), (v_barriers, '{entity_type, seq, id}', '{}', '{}'),
      (v_columns, v_noted || '{relation}', v_noted || '{relation}', v_noted)
    LOOP
      IF EXISTS (
        SELECT FROM pg_catalog.pg_class AS c CROSS JOIN LATERAL pg_catalog.aclexplode(c.relacl) AS a
        WHERE c.oid = v_table AND a.grantee = pg_catalog.quote_ident(v_role)::regrole
      ) OR (
        SELECT pg_catalog.count(*) <> pg_catalog.cardinality(v_inserted || v_selected || v_updated) OR NOT pg_catalog.bool_and(
          a.privilege_type = 'INSERT' AND c.attname = ANY (v_inserted)
          OR a.privilege_type = 'SELECT' AND c.attname = ANY (v_selected)
          OR a.privilege_type = 'UPDATE' AND c.attname = ANY (v_updated))
        FROM pg_catalog.pg_attribute AS c CROSS JOIN LATERAL pg_catalog.aclexplode(c.attacl) AS a
        WHERE c.attrelid = v_table AND a.grantee = pg_catalog.quote_ident(v_role)::regrole
      ) THEN
        EXECUTE pg_catalog.format('REVOKE ALL ON TABLE %s FROM %I', v_table, v_role);
        EXECUTE pg_catalog.format('GRANT INSERT (%s) ON TABLE %s TO %I',
          pg_catalog.array_to_string(v_inserted, ', '), v_table, v_role);
        IF v_selected <> '{}' THEN
          EXECUTE pg_catalog.format('GRANT SELECT (%s) ON TABLE %s TO %I',
            pg_catalog.array_to_string(v_selected, ', '), v_table, v_role);
        END IF;
        IF v_updated <> '{}' THEN
          EXECUTE pg_catalog.format('GRANT UPDATE (%s) ON TABLE %s TO %I',
            pg_catalog.array_to_string(v_updated, ', '), v_table, v_role);
        END IF;
      END IF;
    END LOOP;
    -- Row level security, if it is switched on, applies to all but the table's owner. Writers must go on working.
    FOREACH v_table IN ARRAY ARRAY[v_outbox, v_due, v_barriers, v_columns] LOOP
      IF NOT EXISTS (
        SELECT FROM pg_catalog.pg_policy AS p
        WHERE p.polrelid = v_table AND p.polname = 'cdc_capture' AND p.polcmd = '*' AND p.polpermissive
          AND p.polroles = ARRAY[pg_catalog.quote_ident(v_role)::regrole::oid]
          AND pg_catalog.pg_get_expr(p.polqual, v_table) = 'true'
          AND pg_catalog.pg_get_expr(p.polwithcheck, v_table) = 'true'
      ) THEN
        EXECUTE pg_catalog.format('DROP POLICY IF EXISTS cdc_capture ON %s', v_table);
        EXECUTE pg_catalog.format('CREATE POLICY cdc_capture ON %s TO %I USING (true) WITH CHECK (true)', v_table, v_role);
      END IF;
    END LOOP;
    -- Granted to the role itself where possible, because PUBLIC's right may be revoked.
    IF NOT pg_catalog.has_schema_privilege(v_role, v_schema, 'USAGE')
      OR pg_catalog.has_schema_privilege(v_schema, 'USAGE WITH GRANT OPTION') AND NOT EXISTS (
        SELECT FROM pg_catalog.pg_namespace AS n CROSS JOIN LATERAL pg_catalog.aclexplode(n.nspacl) AS a
        WHERE n.nspname = v_schema AND a.grantee = pg_catalog.quote_ident(v_role)::regrole AND a.privilege_type = 'USAGE')
    THEN
      EXECUTE pg_catalog.format('GRANT USAGE ON SCHEMA %I TO %I', v_schema, v_role);
    END IF;
    SELECT oid INTO v_emit FROM pg_catalog.pg_proc
    WHERE pronamespace = 'pg_catalog'::regnamespace AND proname = 'pg_logical_emit_message'
      AND proargtypes[2] = 'pg_catalog.text'::regtype;
    IF NOT pg_catalog.has_function_privilege(v_role, v_emit, 'EXECUTE') THEN
      EXECUTE pg_catalog.format('GRANT EXECUTE ON FUNCTION %s TO %I', v_emit, v_role);
    END IF;
    -- GRANT without the right to grant is a warning, and not an error.
    IF NOT pg_catalog.has_function_privilege(v_role, v_emit, 'EXECUTE')
      OR NOT pg_catalog.has_schema_privilege(v_role, v_schema, 'USAGE')
    THEN
      RAISE EXCEPTION 'USAGE on schema % or EXECUTE on % cannot be granted', v_schema, v_emit USING ERRCODE = '42501';
    END IF;

    -- The new owner of a function needs CREATE on its schema at that moment, unless a superuser changes the owner.
    v_create := NOT pg_catalog.has_schema_privilege(v_role, v_schema, 'CREATE')
      AND NOT (SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname = current_user)
      AND EXISTS (
        SELECT FROM pg_catalog.unnest(v_functions) AS f (signature) JOIN pg_catalog.pg_proc AS p
          ON p.oid = pg_catalog.format('%I.%s', v_schema, f.signature)::regprocedure
        WHERE pg_catalog.pg_get_userbyid(p.proowner) <> v_role);
    IF v_create THEN
      EXECUTE pg_catalog.format('GRANT CREATE ON SCHEMA %I TO %I', v_schema, v_role);
    END IF;
    FOREACH v_function IN ARRAY v_functions LOOP
      EXECUTE pg_catalog.format('ALTER FUNCTION %I.%s OWNER TO %I', v_schema, v_function, v_role);
    END LOOP;
    IF v_create THEN
      EXECUTE pg_catalog.format('REVOKE CREATE ON SCHEMA %I FROM %I', v_schema, v_role);
    END IF;
  EXCEPTION WHEN insufficient_privilege THEN
    RAISE WARNING 'the functions that capture run with the rights of %, not of a role of their own: %',
        pg_catalog.quote_ident(v_present), SQLERRM
      USING HINT = pg_catalog.format(
        'have an administrator run: CREATE ROLE %1$I NOLOGIN; GRANT %1$I TO %2$I; then run cdc db upgrade as %2$I',
        v_role, v_owner);
  END;
END
$cdc$;
