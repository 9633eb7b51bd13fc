-- What operators have done. {actions} is the qualified table.

-- name: record
INSERT INTO {actions} (command, person, via, action, target, because, count)
VALUES (%(command)s::uuid, %(person)s::text, %(via)s::text, %(action)s::text, %(target)s::jsonb, %(because)s::text,
        %(count)s::bigint)

-- name: latest
-- The latest commands before one of them: what its transactions have written, as one row. Of so many rows at most, so that
-- of a command with more the count is too low.
SELECT min(a.id) AS id, a.command, min(a.at) AS at, max(a.at) AS ended_at, a.role::text AS role, a.login::text AS login,
       a.person, a.via, a.action, (array_agg(a.target ORDER BY a.id))[1] AS target,
       (array_agg(a.because ORDER BY a.id))[1] AS because, sum(a.count)::bigint AS count
FROM (SELECT * FROM {actions} AS n WHERE n.id < coalesce(%(before)s::bigint, 9223372036854775807)
      ORDER BY n.id DESC LIMIT %(scan)s::integer) AS a
GROUP BY a.command, a.role, a.login, a.person, a.via, a.action
ORDER BY id DESC LIMIT %(limit)s::integer

-- name: claim
SELECT pg_advisory_lock(%(lock)s, hashtext(%(command)s::text))

-- name: has
-- Whether a command is among the latest.
SELECT 1 FROM (SELECT n.command FROM {actions} AS n ORDER BY n.id DESC LIMIT %(scan)s::integer) AS a
WHERE a.command = %(command)s::uuid LIMIT 1

-- name: prune
-- Some of the oldest, where they are older than this. Their numbers rise with time: no index on it is needed.
DELETE FROM {actions} AS a
WHERE a.id = ANY (ARRAY(
  SELECT old.id FROM (SELECT n.id, n.at FROM {actions} AS n ORDER BY n.id LIMIT %(limit)s::integer) AS old
  WHERE old.at < now() - make_interval(secs => %(older_than_s)s::double precision)))
