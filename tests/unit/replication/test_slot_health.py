"""What is thought of a slot, and the figures in which it is said."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc.core.lsn import Lsn
from cdc.core.units import format_bytes, format_duration
from cdc.replication.slot_health import Outlook, SlotHealth, SlotReport, assess, outlook

SEEN = datetime(2026, 10, 5, tzinfo=UTC)


def slot(**fields: Any) -> SlotReport:
    """A healthy one that is being read, with these fields instead."""
    blank = dict.fromkeys(SlotReport.__dataclass_fields__)
    healthy = {
        **blank, "name": "cdc", "plugin": "wal2json", "slot_type": "logical", "database": "shop", "temporary": False,
        "ours": True, "active": True, "active_pid": 7, "application_name": "cdc: stream", "wal_status": "reserved",
        "current_lsn": Lsn(1 << 20), "retained_wal_bytes": 100, "confirmed_lag_bytes": 0, "seen_at": SEEN,
    }  # fmt: skip
    return SlotReport(**{**healthy, **fields})


def test_a_slot_that_is_read_and_keeps_little_is_fine() -> None:
    assert assess(slot()) == SlotHealth(True, "fine")
    assert assess(slot(active=False)).fine


@pytest.mark.parametrize(
    ("fields", "word", "remedy"),
    [
        ({"wal_status": "lost", "retained_wal_bytes": None, "invalidation_reason": "wal_removed"}, "wal_removed",
         "cdc slot recreate cdc"),
        ({"confirmed_lag_bytes": -1}, "silent", "cdc slot recreate cdc"),
        ({"wal_status": "unreserved"}, "about to be lost", "max_slot_wal_keep_size"),
        ({"retained_wal_bytes": 2 << 30}, "keeps 2 GB of WAL, though it is being read", "cdc doctor"),
        ({"retained_wal_bytes": 2 << 30, "active": False}, "no consumer reads it", "start a consumer"),
    ],
)  # fmt: skip
def test_each_trouble_has_its_sentence_and_its_remedy(fields: dict[str, Any], word: str, remedy: str) -> None:
    health = assess(slot(**fields))
    assert not health.fine
    assert word in health.sentence
    assert remedy in health.remedy


def test_an_unread_slot_that_is_lost_within_the_hour_is_not_fine() -> None:
    soon, later = Outlook(1e6, 1200.0), Outlook(1e6, 86_400.0)
    assert assess(slot(active=False), soon).sentence.startswith("lost in about 20 min")
    assert assess(slot(active=False), later).fine
    assert assess(slot(active=True), soon).fine, "its reader moves it"


def test_the_outlook_is_what_is_left_at_the_rate_between_two_looks() -> None:
    earlier = slot(safe_wal_bytes=50_000)
    later = replace(
        earlier, current_lsn=Lsn((1 << 20) + 2000), safe_wal_bytes=48_000, seen_at=SEEN + timedelta(seconds=2)
    )
    assert outlook(earlier, later) == Outlook(1000.0, 48.0)
    assert outlook(earlier, replace(later, safe_wal_bytes=None)) == Outlook(1000.0, None)
    assert outlook(earlier, replace(later, safe_wal_bytes=-5)) == Outlook(1000.0, 0.0)
    assert outlook(earlier, replace(later, current_lsn=earlier.current_lsn)) == Outlook(0.0, None)
    assert outlook(earlier, earlier) is None


@given(st.integers(0, 1 << 50), st.integers(-(1 << 40), 1 << 50), st.integers(0, 10**9))
def test_an_outlook_is_never_negative(written: int, safe: int, microseconds: int) -> None:
    earlier = slot()
    later = slot(
        current_lsn=Lsn(earlier.current_lsn + written),
        safe_wal_bytes=safe,
        seen_at=SEEN + timedelta(microseconds=microseconds),
    )
    expected = outlook(earlier, later)
    if expected is not None:
        assert expected.wal_bytes_per_s >= 0
        assert expected.lost_in_s is None or expected.lost_in_s >= 0


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1024, "1 kB"), (1536, "1.5 kB"), (10 << 20, "10 MB"), (3 << 30, "3 GB"),
     (5 << 40, "5 TB"), (-2048, "-2 kB")],
)  # fmt: skip
def test_sizes_read_as_in_the_settings_of_the_server(count: int, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (119, "119 s"),
        (120, "2 min"),
        (5400, "90 min"),
        (9000, "2.5 h"),
        (172_800, "2 days"),
    ],
)
def test_spans_keep_two_figures(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
