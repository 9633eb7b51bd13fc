-- Backfills: what is known of them, and what of their rows is not settled. {changes} and {backfills} are qualified tables.

-- name: insert
INSERT INTO {backfills}
  (table_schema, table_name, condition, key_columns, key_order, since_key, until_key, estimate, rate, backlog, state,
   subscription, subscription_name)
VALUES (%(table_schema)s, %(table_name)s, %(condition)s, %(key_columns)s, %(key_order)s, %(since_key)s, %(until_key)s, %(estimate)s,
  %(rate)s, %(backlog)s, %(state)s, %(subscription)s::smallint, %(subscription_name)s)
RETURNING id

-- name: backfill
-- Not a statement: the columns of b. Who works on it holds a lock of its number.
b.id, b.table_schema, b.table_name, format('%%I.%%I', b.table_schema, b.table_name) AS table, b.condition, b.key_columns, b.key_order, b.since_key, b.after_key, b.until_key, b.estimate,
b.examined, b.written, b.rate, b.backlog, b.state, b.started_by, b.started_at, b.changed_at, b.subscription, b.subscription_name,
EXISTS (
  SELECT FROM pg_locks AS l
  WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 2
    AND l.database = (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database())
    AND l.classid = (%(lock)s::bigint & 4294967295)::oid
    AND l.objid = (hashtext(%(schema)s || '.' || b.id)::bigint & 4294967295)::oid
) AS at_work

-- name: one
SELECT {backfill} FROM {backfills} AS b WHERE b.id = %(id)s

-- name: latest
-- The last two of a table, those that are not finished first: of each subscription there may be one.
SELECT {backfill} FROM {backfills} AS b WHERE b.table_schema = %(table_schema)s AND b.table_name = %(table_name)s
ORDER BY (b.state = 'running' OR b.state = 'paused') DESC, b.id DESC LIMIT 2

-- name: unfinished
SELECT {backfill} FROM {backfills} AS b
WHERE b.table_schema = %(table_schema)s AND b.table_name = %(table_name)s AND (b.state = 'running' OR b.state = 'paused')
  AND b.subscription IS NOT DISTINCT FROM %(subscription)s::smallint

-- name: subscribed
-- Whether there still is the subscription that it is for.
SELECT EXISTS (SELECT FROM {subscriptions} AS s WHERE s.subscription = %(subscription)s::smallint)

-- name: newest
SELECT {backfill} FROM {backfills} AS b ORDER BY b.id DESC LIMIT 100

-- name: lock
SELECT pg_try_advisory_lock(%(lock)s::integer, hashtext(%(schema)s || '.' || %(id)s::integer))

-- name: unlock
SELECT pg_advisory_unlock(%(lock)s::integer, hashtext(%(schema)s || '.' || %(id)s::integer))

-- name: state
SELECT b.state FROM {backfills} AS b WHERE b.id = %(id)s

-- name: turn
-- Whoever pauses or cancels it waits until this page is committed.
SELECT b.state, b.after_key FROM {backfills} AS b WHERE b.id = %(id)s FOR UPDATE

-- name: is_written
-- Not a statement: how n of this transaction is found: all of them are fresh.
NOT n.processed AND n.next_attempt_at IS NULL AND n.dead_at IS NULL

-- name: is_written_for_one
-- Not a statement: the same where it is for one subscription: to the default one it is processed.
(n.processed OR n.next_attempt_at IS NOT NULL OR n.dead_at IS NOT NULL) AND n.subscription = %(subscription)s::smallint

-- name: is_open
-- Not a statement: whether n is fresh or waits for a retry.
NOT n.processed AND n.dead_at IS NULL

-- name: is_open_for_one
-- Not a statement: the same for one subscription. When it was dropped, nothing is.
coalesce((
  SELECT e.next_attempt_at IS NOT NULL AND e.dead_at IS NULL FROM {subscription_changes} AS e
  WHERE e.subscription = n.subscription AND e.shard = n.shard AND e.seq = n.seq
), n.seq > (
  SELECT p.seq FROM {positions} AS p WHERE p.subscription = n.subscription AND p.shard = n.shard
), false)

-- name: advance
-- Returns the ids of the changes that this transaction has written.
WITH advanced AS (
  UPDATE {backfills} SET
    after_key = %(after_key)s, examined = examined + %(examined)s, changed_at = now(),
    written = written + cardinality(%(seqs)s::bigint[])
  WHERE id = %(id)s
)
SELECT f.id FROM unnest(%(seqs)s::bigint[], %(shards)s::smallint[]) AS w(seq, shard)
CROSS JOIN LATERAL (
  SELECT n.id FROM {changes} AS n
  WHERE n.shard = w.shard AND n.seq = w.seq AND {is_written}
  LIMIT 1
) AS f

-- name: set_state
UPDATE {backfills} SET state = %(to)s, changed_at = now() WHERE id = %(id)s AND state = ANY (%(states)s::text[])

-- name: set_pace
UPDATE {backfills} SET rate = %(rate)s, backlog = %(backlog)s WHERE id = %(id)s

-- name: unsettled
-- Those of them that are fresh or wait for a retry. One that retention has removed is neither.
SELECT f.id FROM unnest(%(ids)s::uuid[]) AS w(id)
CROSS JOIN LATERAL (
  SELECT n.id FROM {changes} AS n WHERE n.id = w.id AND {is_open} LIMIT 1
) AS f

-- name: key_order
-- Not a statement: all that the order of the primary key's values depends on.
(SELECT string_agg(concat_ws(' ', quote_ident(a.attname), format_type(a.atttypid, a.atttypmod), k.of_collation, k.opclass),
    ', ' ORDER BY k.place)
  FROM pg_index AS i
  CROSS JOIN LATERAL unnest(i.indkey::int2[], i.indcollation::oid[], i.indclass::oid[])
    WITH ORDINALITY AS k (attnum, of_collation, opclass, place)
  JOIN pg_attribute AS a ON a.attrelid = i.indrelid AND a.attnum = k.attnum
  WHERE i.indrelid = %(table)s::oid AND i.indisprimary)

-- name: relation
-- Whether this role sees all rows of a table, its rights on it, and how its key is ordered.
SELECT row_security_active(c.oid) AS filtered, {key_order} AS key_order, current_user::text AS role,
  has_any_column_privilege(c.oid, 'SELECT') AND has_any_column_privilege(c.oid, 'UPDATE') AS allowed
FROM pg_class AS c WHERE c.oid = %(table)s::oid

-- name: key
-- The columns of the primary key: each with its type, below domains, and with the schema of the operators that its index
-- uses. Only names are taken from here: the type's input function and these operators are all that runs.
SELECT a.attname::text AS name, tn.nspname::text AS type_schema, t.typname::text AS type_name, o.nspname::text AS operators,
  t.typtype IN ('b', 'e') AND t.typelem = 0::oid OR t.typlen > 0 AS simple
FROM pg_index AS i
CROSS JOIN LATERAL unnest(i.indkey::int2[], i.indclass::oid[]) WITH ORDINALITY AS k (attnum, opclass, place)
JOIN pg_attribute AS a ON a.attrelid = i.indrelid AND a.attnum = k.attnum
JOIN pg_opclass AS c ON c.oid = k.opclass
JOIN pg_am AS m ON m.oid = c.opcmethod AND m.amname = 'btree'
CROSS JOIN LATERAL (
  SELECT n.nspname FROM pg_amop AS s
  JOIN pg_operator AS p ON p.oid = s.amopopr JOIN pg_namespace AS n ON n.oid = p.oprnamespace
  WHERE s.amopfamily = c.opcfamily AND s.amoplefttype = c.opcintype AND s.amoprighttype = c.opcintype
    AND s.amopstrategy = 5 AND p.oprname = '>'
) AS o
CROSS JOIN LATERAL (
  WITH RECURSIVE base (oid, below, kind) AS (
    SELECT d.oid, d.typbasetype, d.typtype FROM pg_type AS d WHERE d.oid = a.atttypid
    UNION ALL
    SELECT d.oid, d.typbasetype, d.typtype FROM base JOIN pg_type AS d ON d.oid = base.below WHERE base.kind = 'd'
  )
  SELECT base.oid FROM base WHERE base.kind <> 'd'
) AS base
JOIN pg_type AS t ON t.oid = base.oid JOIN pg_namespace AS tn ON tn.oid = t.typnamespace
WHERE i.indrelid = %(table)s::oid AND i.indisprimary AND i.indisvalid AND k.place <= i.indnkeyatts
ORDER BY k.place

-- name: triggers
-- What changes whenever one of the triggers that capture a table does, or its key. None where its name is another table's by
-- now.
SELECT t.oid, t.xmin::text, t.tgenabled, {key_order} FROM pg_trigger AS t
JOIN pg_proc AS p ON p.oid = t.tgfoid JOIN pg_proc AS c ON c.oid = %(capture)s::oid
WHERE t.tgrelid = %(table)s::oid AND t.tgrelid = to_regclass(%(name)s)
  AND (p.oid = c.oid OR p.pronamespace = c.pronamespace AND {is_table_function})
ORDER BY t.oid

-- name: overloads
-- Functions that may be called in place of capture_rows(), whose argument is any array.
SELECT p.oid::regprocedure::text, pg_get_userbyid(p.proowner)::text FROM pg_proc AS p
WHERE p.pronamespace = %(schema)s::regnamespace AND p.proname = 'capture_rows'
  AND p.oid <> to_regprocedure(%(schema)s || '.capture_rows(anyarray, text, jsonb, integer)')
ORDER BY 1 LIMIT 1
