-- Which changes an operator decides about, where they are many. {changes} is the qualified table.
--
-- A selection is one statement, whose result stays on the server: what was counted is what is decided about, and no
-- round has to find its rows again. It locks nothing: each round asks for the state of its rows again.

-- name: matches
-- Not a statement: whether c is asked for. An error is asked for by the words that its summary begins with; a row of an
-- older version has no summary. A handler is the types and operations that it handles.
(%(type)s::text IS NULL OR coalesce(c.entity_type, c.table_name) = %(type)s)
AND (%(key)s::text IS NULL OR c.entity_id = %(key)s)
AND (%(since)s::timestamptz IS NULL OR c.changed_at >= %(since)s)
AND (%(until)s::timestamptz IS NULL OR c.changed_at < %(until)s)
AND (%(error)s::text IS NULL
     OR starts_with(coalesce(c.error_summary, c.last_error), %(error)s)
        AND substr(coalesce(c.error_summary, c.last_error), length(%(error)s) + 1, 1) !~ '[[:alnum:]_]')
AND (%(types)s::text[] IS NULL
     OR EXISTS (SELECT FROM unnest(%(types)s::text[], %(operations)s::text[]) AS handled(type, operation)
                WHERE handled.type = coalesce(c.entity_type, c.table_name) AND handled.operation = c.operation)
     OR coalesce(c.entity_type, c.table_name) <> ALL (%(named)s::text[]) AND c.operation = ANY (%(others)s::text[]))

-- name: select_dead
-- Dead letters, those of one key together and in their order.
DECLARE cdc_selection SCROLL CURSOR WITH HOLD FOR
SELECT c.id, hashtextextended(c.entity_id, hashtextextended(coalesce(c.entity_type, c.table_name), 0)) AS key
FROM {changes} AS c
WHERE c.dead_at IS NOT NULL AND NOT c.processed AND {matches}
ORDER BY key, c.seq

-- name: select_waiting
-- The same of the changes that wait for their retry.
DECLARE cdc_selection SCROLL CURSOR WITH HOLD FOR
SELECT c.id, hashtextextended(c.entity_id, hashtextextended(coalesce(c.entity_type, c.table_name), 0)) AS key
FROM {changes} AS c
WHERE c.next_attempt_at < 'infinity' AND c.dead_at IS NULL AND NOT c.processed AND {matches}
ORDER BY key, c.seq
