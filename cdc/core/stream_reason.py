"""Why a process does not stream, or its stream has ended."""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """The label ``reason`` of ``cdc_stream_disconnects_total``."""

    DISABLED = "disabled"
    SLOT_BUSY = "slot_busy"
    SLOT_MISSING = "slot_missing"
    SLOT_LOST = "slot_lost"
    SLOT_STUCK = "slot_stuck"
    STANDBYS_AWAY = "standbys_away"
    SLOT_FOREIGN = "slot_foreign"
    PUBLICATION_MISSING = "publication_missing"
    PLUGIN_REFUSED = "plugin_refused"
    PLUGIN_MISSING = "plugin_missing"
    WAL_LEVEL = "wal_level"
    NO_REPLICATION_ROLE = "no_replication_role"
    NO_FREE_SLOT = "no_free_slot"
    NO_FREE_WALSENDER = "no_free_walsender"
    IN_RECOVERY = "in_recovery"
    NETWORK = "network"
    STALLED = "stalled"
    SERVER_SHUTDOWN = "server_shutdown"
    PROTOCOL = "protocol"
    CRASH_GUARD = "crash_guard"

    @property
    def lasting(self) -> Reason:
        """The state that follows. A reason that only ends a stream is retried at once, over the network."""
        return Reason.NETWORK if self in _ENDINGS else self


_ENDINGS = frozenset(
    {Reason.STANDBYS_AWAY, Reason.STALLED, Reason.SERVER_SHUTDOWN, Reason.PROTOCOL, Reason.CRASH_GUARD}
)
