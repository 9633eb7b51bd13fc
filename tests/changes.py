"""Changes for tests of the pure parts."""

from __future__ import annotations

from datetime import UTC, datetime
from uuid import UUID

from cdc import testing
from cdc.core.admission import Row
from cdc.core.model import Change

EPOCH = datetime(2026, 1, 1, tzinfo=UTC)


def change(
    seq: int, key: str = "k", *, entity_type: str = "t", shard: int = 0, attempt: int = 1, requeued: bool = False
) -> Change:
    return testing.change(
        entity_type, "INSERT", key, new={}, id=UUID(int=seq), seq=seq, shard=shard, changed_at=EPOCH, attempt=attempt,
        requeued=requeued,
    )  # fmt: skip


def row(
    seq: int, key: str = "k", *, entity_type: str = "t", blocked: bool = False, shard: int = 0, requeued: bool = False
) -> Row:
    return Row(change(seq, key, entity_type=entity_type, shard=shard, requeued=requeued), blocked)
