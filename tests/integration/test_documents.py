"""docs/reference/database-objects.md, beside an outbox as it is installed."""

from __future__ import annotations

import re
from pathlib import Path

import psycopg

PAGE = Path(__file__).parents[2] / "docs/reference/database-objects.md"

_NAMES = """
  SELECT attname::text FROM pg_attribute
    WHERE attrelid = 'entity_changes'::regclass AND attnum > 0 AND NOT attisdropped
  UNION SELECT relname::text FROM pg_class
    WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'v')
  UNION SELECT indexrelid::regclass::text FROM pg_index WHERE indrelid = 'entity_changes'::regclass
  UNION SELECT proname::text FROM pg_proc WHERE pronamespace = 'public'::regnamespace
"""


def test_every_column_index_table_view_and_function_is_on_the_page(outbox_db: psycopg.Connection) -> None:
    named = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", PAGE.read_text("utf-8")))))
    assert {name for (name,) in outbox_db.execute(_NAMES)} - named == set()
