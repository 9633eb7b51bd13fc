"""What tests that judge a ledger start from."""

from __future__ import annotations

from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from tests.faults import records
from tests.handlers_ledger import EFFECTS, FOLDER, KINDS

ROLES = ("crashing", "clean", "one", "two")
"""A ledger is named after the role its consumer works as."""


@pytest.fixture
def ledgers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which consumers leave their ledgers."""
    monkeypatch.setenv(FOLDER, str(tmp_path))
    return tmp_path


@pytest.fixture
def kept(outbox_db: psycopg.Connection) -> psycopg.Connection:
    """``outbox`` with a tracked table for each kind of handler, and roles to tell consumers apart."""
    outbox_db.execute(EFFECTS)
    for kind in KINDS:
        outbox_db.execute(records.tracked_table(kind))
    for role in ROLES:
        outbox_db.execute(
            sql.SQL("DO $$ BEGIN CREATE ROLE {} SUPERUSER LOGIN; EXCEPTION WHEN duplicate_object THEN END $$").format(
                sql.Identifier(role)
            )
        )
    return outbox_db
