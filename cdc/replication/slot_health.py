"""A replication slot as the server shows it, and its assessment for an operator. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from cdc.core.lsn import Lsn
from cdc.core.units import format_bytes, format_duration

MUCH_WAL_BYTES = 1 << 30
ABSENT_STANDBYS = (
    "SELECT pg_catalog.string_agg(named.slot, ', ')"
    " FROM (SELECT pg_catalog.btrim(part, ' \"') AS slot FROM pg_catalog.regexp_split_to_table("
    "pg_catalog.current_setting('synchronized_standby_slots', true), ',') AS part) named"
    " WHERE named.slot OPERATOR(pg_catalog.<>) '' AND NOT EXISTS (SELECT FROM pg_catalog.pg_replication_slots p"
    " WHERE p.slot_name OPERATOR(pg_catalog.=) named.slot::pg_catalog.name AND p.active)"
)
"""SQL for the slots that the server waits for before it sends a failover slot anything, and that have no reader."""
_SOON_S = 3600.0
"""Time left for a consumer to read a slot before the server invalidates it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotReport:
    """A slot as the server saw it at ``seen_at``. None where the server's version has no such value, or it is unset.

    ``retained_wal_bytes`` (since restart_lsn) is the disk it costs; ``confirmed_lag_bytes`` how far its reader is
    behind; ``safe_wal_bytes`` what may still be written before it is lost; ``catalog_xmin_age`` in transactions. The
    spill figures count what decoding wrote to disk.
    """

    name: str
    plugin: str | None
    slot_type: str
    database: str | None
    temporary: bool
    ours: bool
    active: bool
    active_pid: int | None
    application_name: str | None
    walsender_state: str | None
    walsender_lag_s: float | None
    wal_status: str | None
    restart_lsn: Lsn | None
    confirmed_lsn: Lsn | None
    current_lsn: Lsn
    retained_wal_bytes: int | None
    confirmed_lag_bytes: int | None
    safe_wal_bytes: int | None
    catalog_xmin_age: int | None
    conflicting: bool | None
    invalidation_reason: str | None
    inactive_since: datetime | None
    failover: bool | None
    held_by: str | None
    synced: bool | None
    two_phase: bool | None
    two_phase_at: Lsn | None
    spilled_transactions: int | None
    spilled_bytes: int | None
    streamed_bytes: int | None
    total_bytes: int | None
    seen_at: datetime

    @property
    def kind(self) -> str:
        return f"plugin {self.plugin}, database {self.database}" if self.plugin else "a physical slot"

    @property
    def reader(self) -> str:
        """The session that reads it, for a sentence."""
        named = f" ({self.application_name})" if self.application_name else ""
        return f"process {self.active_pid}{named} on the server"

    @property
    def waits_for_standbys(self) -> bool:
        """Its messages wait for standbys to have them, and these are away: the normal state after a failover."""
        return bool(self.failover and self.held_by)

    @property
    def ahead(self) -> bool:
        """The server accepts any confirmed position; from one ahead of its WAL it delivers nothing."""
        return (self.confirmed_lag_bytes or 0) < 0


@dataclass(frozen=True, slots=True)
class Outlook:
    """``wal_bytes_per_s``: of the whole server. ``lost_in_s``: at that rate, if no consumer reads the slot.

    ``lost_in_s`` is None where the slot keeps WAL without limit, or nothing is written.
    """

    wal_bytes_per_s: float
    lost_in_s: float | None


@dataclass(frozen=True, slots=True)
class SlotHealth:
    """``fine`` is False when the slot needs an action: ``remedy`` names it."""

    fine: bool
    sentence: str
    remedy: str = ""


def outlook(earlier: SlotReport, later: SlotReport) -> Outlook | None:
    """From two reports of one slot; None when they are the same report."""
    seconds = (later.seen_at - earlier.seen_at).total_seconds()
    if seconds <= 0:
        return None
    rate = max(0, later.current_lsn - earlier.current_lsn) / seconds
    if later.safe_wal_bytes is None or not rate:
        return Outlook(rate, None)
    return Outlook(rate, max(0, later.safe_wal_bytes) / rate)


def assess(slot: SlotReport, expected: Outlook | None = None) -> SlotHealth:
    """The slot's state as an operator should judge it."""
    problems = (_broken(slot), _waiting_for_standbys(slot), _nearly_lost(slot, expected), _keeps_much(slot))
    found = next((health for health in problems if health is not None), None)
    if found is not None:
        return found
    return SlotHealth(True, "fine" if slot.active else "no consumer reads it; it keeps WAL until one does")


def _broken(slot: SlotReport) -> SlotHealth | None:
    if slot.wal_status == "lost":
        because = f" ({slot.invalidation_reason})" if slot.invalidation_reason else ""
        return SlotHealth(False, f"lost{because}: the server no longer keeps the WAL it needs", _recreate_remedy(slot))
    if slot.ahead:
        return SlotHealth(
            False, "silent: confirmed ahead of the server's WAL, so it delivers nothing", _recreate_remedy(slot)
        )
    return None


def _waiting_for_standbys(slot: SlotReport) -> SlotHealth | None:
    if not slot.waits_for_standbys:
        return None
    return SlotHealth(
        False,
        f"waiting: it is one for failover, and the server waits for the standbys in synchronized_standby_slots, but "
        f"no standby reads {slot.held_by}",
        f"bring them back, or take them out of that setting; a consumer that may recreate slots has it go on without"
        f" failover after a minute (cdc slot drop {slot.name} does so at once, and loses no change)",
    )


def _nearly_lost(slot: SlotReport, expected: Outlook | None) -> SlotHealth | None:
    remedy = "start a consumer, or raise max_slot_wal_keep_size"
    if slot.wal_status == "unreserved":
        return SlotHealth(False, "about to be lost: it keeps more WAL than max_slot_wal_keep_size allows", remedy)
    left_s = expected.lost_in_s if expected else None
    if left_s is None or left_s > _SOON_S or slot.active:
        return None
    return SlotHealth(
        False,
        f"lost in about {format_duration(left_s)} if no consumer reads it and WAL is written as it is now",
        remedy,
    )


def _keeps_much(slot: SlotReport) -> SlotHealth | None:
    kept = slot.retained_wal_bytes or 0
    if kept <= MUCH_WAL_BYTES:
        return None
    if not slot.active:
        return SlotHealth(
            False,
            f"keeps {format_bytes(kept)} of WAL, and no consumer reads it",
            f"start a consumer, or {_recreate_remedy(slot)}",
        )
    return SlotHealth(
        False,
        f"keeps {format_bytes(kept)} of WAL, though it is being read",
        "end the oldest write transaction of the server (cdc doctor names it): every slot keeps what was written since"
        " it began",
    )


def _recreate_remedy(slot: SlotReport) -> str:
    return f"cdc slot recreate {slot.name}; no change is lost, and a running consumer recreates it by itself"
