"""A consumer that owns no shard handles nothing, and says who has them."""

from __future__ import annotations

import psycopg
import pytest

import cdc
from cdc.core import rebalance
from cdc.core.model import SHARDS
from cdc.diagnostics import check_outbox as outbox_checks
from cdc.diagnostics import inspect_outbox
from cdc.diagnostics.facts import ShardHolders
from cdc.diagnostics.findings import Severity
from cdc.postgres.shard_locks import lock_class
from tests.eventually import eventually, eventually_async
from tests.fix_consumer import consuming, metric


def hold_all(link: psycopg.Connection) -> int:
    """As the session of a consumer that is no more, kept open by a child it had forked; its process id."""
    link.execute("SET application_name = 'cdc: shards'")
    for shard in range(SHARDS):
        link.execute("SELECT pg_advisory_lock(%s, %s)", [lock_class("public"), shard])
    link.execute("SELECT pg_advisory_lock_shared(%s, %s)", [lock_class("public"), SHARDS])
    return link.info.backend_pid


async def test_it_is_logged_with_who_holds_them_and_again(
    outbox: str, outbox_db: psycopg.Connection, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rebalance, "_HANDED_OVER_S", 0.1)
    monkeypatch.setattr(rebalance, "_AGAIN_S", 0.1)
    with psycopg.connect(outbox, autocommit=True) as orphan:
        pid = hold_all(orphan)
        async with consuming(outbox, cdc.Router(), stream=False) as app:

            async def said() -> bool:
                return (
                    caplog.text.count(f"owns none of 64 shards, so it handles nothing: process {pid} (cdc: shards)") > 1
                )

            await eventually_async(said, what="it is said, and said again")
            orphan.close()

            async def owns() -> bool:
                return metric(app.metrics.registry, "cdc_shards_owned") == SHARDS

            await eventually_async(owns, what="the shards are taken")


def test_doctor_names_a_consumer_that_holds_shards_and_says_nothing(
    outbox: str, outbox_db: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspect_outbox, "_SILENT_S", 0.1)
    with psycopg.connect(outbox, autocommit=True) as orphan:
        pid = hold_all(orphan)

        def silent() -> ShardHolders | None:
            holders = inspect_outbox.shard_holders(outbox_db, "public")
            return holders if holders.silent else None

        seen = eventually(silent, what="it is silent")
    finding = outbox_checks.shard_holders(seen)
    assert finding.severity is Severity.WARN
    assert f"process {pid}: 64, for" in finding.detail
    assert f"pg_terminate_backend({pid})" in finding.remedy
