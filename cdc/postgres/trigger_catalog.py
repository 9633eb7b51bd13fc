"""Pieces of SQL about triggers in the catalogs, for all statements here and in ``sql/``: arguments and functions."""

from __future__ import annotations

from collections.abc import Sequence

IS_TABLE_FUNCTION = """(p.pronargs = 0 AND p.prorettype = 'pg_catalog.trigger'::pg_catalog.regtype
  AND p.proname::pg_catalog.text OPERATOR(pg_catalog.~) '^capture_table_.+_[0-9a-f]{8}$')"""
"""SQL: whether ``p``, of pg_proc, is the capture function of one table (``table_capture``), if it is of the outbox's
schema: by name and signature, as one of an application may begin alike. Whose it is counts where they are compared.
"""

# Each is followed by a zero byte, in the encoding of the database. SQL_ASCII is no encoding, and is not converted.
# No backslash: within a function a literal is read by the standard_conforming_strings of whoever calls it.
GIVEN = """
CROSS JOIN LATERAL (
  WITH RECURSIVE cut (place, argument, rest) AS (
    SELECT 0, NULL::bytea, t.tgargs
    UNION ALL
    SELECT place + 1, pg_catalog.substring(rest, 1, pg_catalog.position(rest, pg_catalog.decode('00', 'hex')) - 1),
      pg_catalog.substring(rest, pg_catalog.position(rest, pg_catalog.decode('00', 'hex')) + 1)
    FROM cut WHERE place < t.tgnargs
  )
  SELECT pg_catalog.array_agg(CASE WHEN pg_catalog.getdatabaseencoding() = 'SQL_ASCII' THEN argument
    ELSE pg_catalog.convert(argument, pg_catalog.getdatabaseencoding(), 'UTF8') END ORDER BY place)
  FROM cut WHERE place > 0
) AS given (arguments)
"""
"""SQL: joins to ``t``, of pg_trigger, its ``arguments`` as an array of UTF-8; NULL for none."""


def texts(arguments: Sequence[bytes] | None, wanted: int) -> list[str]:
    """The first so many of ``arguments``, with "" for those that are not there."""
    # In an SQL_ASCII database they may be any bytes.
    found = [argument.decode(errors="replace") for argument in arguments or ()][:wanted]
    return found + [""] * (wanted - len(found))
