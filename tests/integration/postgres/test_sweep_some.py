"""Pages of some types: each wanted change once, in order, whatever lies between them, and the end is reached."""

from __future__ import annotations

import psycopg
import pytest

from cdc.core.model import SHARDS
from cdc.core.read_planner import Sweep
from cdc.core.shard_cursor import Position
from cdc.core.type_filter import TypeFilter
from cdc.postgres.connect import connect_async
from cdc.postgres.loaders import read_changes
from cdc.postgres.outbox import INDEXED, Store
from cdc.postgres.subscription import SubscriptionStore
from cdc.postgres.subscriptions import Subscriptions

pytestmark = pytest.mark.server

_PER_SHARD = 7
_FILL = """
INSERT INTO entity_changes (table_name, operation, entity_id, entity_type, shard, processed)
SELECT 'x', 'INSERT', n::text,
  CASE WHEN n % CASE WHEN shard = 0 AND n < 850 THEN 67 ELSE 3 END = 0 THEN 'wanted' ELSE 'other' END, shard,
  n % 10 = 0
FROM (SELECT n, shard FROM generate_series(1, 999) AS n, unnest('{0,1,63}'::smallint[]) AS shard ORDER BY n) AS s
"""
"""In one shard there are fewer wanted ones than a page has room for among all that the first page examines."""
_WANTED = """
SELECT seq FROM entity_changes WHERE entity_type = 'wanted' AND NOT processed AND shard = %s ORDER BY seq
"""

_ENTRIES = """
SELECT sum(pg_stat_get_xact_tuples_returned(oid))::int FROM pg_class
WHERE relname IN ('entity_changes_fresh', 'entity_changes_settled')
"""


@pytest.fixture
def filled(outbox_db: psycopg.Connection) -> psycopg.Connection:
    """A tenth is done by the default subscription, and by another one."""
    outbox_db.execute(_FILL)
    search, _ = Subscriptions("public").create(outbox_db, "search", start="beginning")
    outbox_db.execute(
        "INSERT INTO cdc_subscription_changes (seq, subscription, shard)"
        " SELECT seq, %s, shard FROM entity_changes WHERE processed",
        [search.number],
    )
    return outbox_db


def _store(db: psycopg.Connection, kind: str, scope: TypeFilter) -> Store:
    if kind == "default":
        return Store("public", 16, scope)
    [search] = Subscriptions("public").all(db)
    return SubscriptionStore("public", search, 16, scope)


@pytest.mark.parametrize("scope", [TypeFilter(("wanted",), include=True), TypeFilter(("other",), include=False)])
@pytest.mark.parametrize("kind", ["default", "another"])
async def test_each_wanted_change_is_read_once_in_order_and_each_shard_to_its_end(
    outbox: str, filled: psycopg.Connection, kind: str, scope: TypeFilter
) -> None:
    store = _store(filled, kind, scope)
    settings = SubscriptionStore.session if kind == "another" else INDEXED
    session = await connect_async(outbox, application_name="cdc: test", session=settings)
    read_changes(session)
    left = {shard: Position(0, 0, 3) for shard in range(SHARDS)}
    read: dict[int, list[int]] = {shard: [] for shard in left}
    ends: dict[int, int] = {}
    try:
        for serial in range(200):
            page = await store.sweep(session, Sweep(left, _PER_SHARD, serial, scope=scope))
            assert page.scanned is not None
            for row in page.rows:
                read[row.change.shard].append(row.change.seq)
            ends |= {shard: scanned.seq for shard, scanned in page.scanned.items()}
            left |= {shard: Position(end, end, page.snapshot.xmin) for shard, end in ends.items() if shard in left}
            for shard in {*left}:
                if shard not in page.scanned or not page.scanned[shard].more:
                    del left[shard]
            if not left:
                break
    finally:
        await session.close()
    assert ends == dict(filled.execute("SELECT shard, max(seq) FROM entity_changes GROUP BY 1").fetchall())
    for shard, numbers in read.items():
        assert numbers == [seq for (seq,) in filled.execute(_WANTED, [shard])]


async def test_what_is_done_ahead_is_walked_twice_however_much_of_it_there_is(
    outbox: str, filled: psycopg.Connection
) -> None:
    """By the pages of one pass: a key that waits for long has all that is done meanwhile above the position."""
    filled.execute(
        "INSERT INTO cdc_subscription_changes (seq, subscription, shard) SELECT c.seq, s.subscription, c.shard"
        " FROM entity_changes AS c, cdc_subscriptions AS s ON CONFLICT DO NOTHING"
    )
    scope = TypeFilter(("wanted",), include=True)
    left = {shard: Position(0, 0, 3) for shard in range(SHARDS)}
    async with await connect_async(outbox, application_name="cdc: test", session=SubscriptionStore.session) as session:
        await session.set_autocommit(False)  # the counts are those of a transaction
        for serial in range(20):
            page = await _store(filled, "another", scope).sweep(session, Sweep(left, _PER_SHARD, serial, scope=scope))
            assert not page.rows
            for shard, scanned in (page.scanned or {}).items():
                left[shard] = Position(scanned.seq, scanned.seq, page.snapshot.xmin)
            if not any(scanned.more for scanned in (page.scanned or {}).values()):
                break
        [(entries,)] = await (await session.execute(_ENTRIES)).fetchall()
    rows = 3 * 999
    assert rows < entries < 2.1 * rows  # each page looks at the next one, too
