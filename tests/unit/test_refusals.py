from __future__ import annotations

import pytest

from cdc.errors import StreamError
from cdc.lsn import Lsn
from cdc.refusals import (
    During,
    FoundSlot,
    Names,
    Reason,
    ServerLook,
    Step,
    classify,
    classify_connect,
    next_step,
    server_ended,
)

NAMES = Names(slot="bell", plugin="wal2json", database="app", role='odd"role')
END = Lsn.parse("0/2000")
C, S, R = During.CREATE, During.START, During.STREAM

# Measured on PostgreSQL 15, 16 and 18, except those that the manual only documents.
CASES = [
    ("55006", "ReplicationSlotAcquire", S, Reason.SLOT_BUSY, False),
    ("55006", "ReplicationSlotAcquire", C, Reason.SLOT_BUSY, False),
    ("42704", "ReplicationSlotAcquire", S, Reason.SLOT_MISSING, False),
    ("42710", "ReplicationSlotCreate", C, Reason.SLOT_MISSING, False),
    ("55P03", "ProcSleep", C, Reason.SLOT_MISSING, False),
    ("55000", "CheckLogicalDecodingRequirements", C, Reason.WAL_LEVEL, True),
    ("55000", "CheckSlotRequirements", C, Reason.NO_FREE_SLOT, True),
    ("55000", "CreateDecodingContext", S, Reason.PROTOCOL, True),
    ("0A000", "CheckLogicalDecodingRequirements", C, Reason.IN_RECOVERY, True),
    ("0A000", "pg_decode_startup", S, Reason.PROTOCOL, True),
    ("42501", "CheckSlotPermissions", C, Reason.NO_REPLICATION_ROLE, True),
    ("42501", "StartupDecodingContext", C, Reason.PLUGIN_REFUSED, True),
    ("42501", "StartupDecodingContext", S, Reason.PLUGIN_REFUSED, True),
    ("58P01", "internal_load_library", C, Reason.PLUGIN_MISSING, True),
    ("58P01", "wal_segment_open", R, Reason.SLOT_LOST, False),
    ("53400", "ReplicationSlotCreate", C, Reason.NO_FREE_SLOT, True),
    ("53300", None, C, Reason.NO_FREE_WALSENDER, True),
    ("54000", "enlargeStringInfo", R, Reason.PROTOCOL, False),
    ("57P01", "ProcessInterrupts", R, Reason.SERVER_SHUTDOWN, False),
    ("57014", "ProcessInterrupts", R, Reason.SERVER_SHUTDOWN, False),
    ("57P03", None, S, Reason.SERVER_SHUTDOWN, False),
    ("22023", "pg_decode_startup", S, Reason.PROTOCOL, True),
    ("42602", None, S, Reason.PROTOCOL, True),
    ("42601", None, S, Reason.PROTOCOL, True),
    ("08P01", None, S, Reason.PROTOCOL, True),
    ("08006", None, R, Reason.NETWORK, False),
    ("XX000", None, S, Reason.PROTOCOL, True),
    ("XX000", None, R, Reason.PROTOCOL, False),
    ("55000", None, R, Reason.PROTOCOL, False),
    ("99999", None, R, Reason.PROTOCOL, False),
    (None, None, R, Reason.NETWORK, False),
]


@pytest.mark.parametrize(("sqlstate", "function", "during", "reason", "permanent"), CASES)
def test_a_refusal_is_told_by_its_code_and_the_function_that_raised_it(
    sqlstate: str | None, function: str | None, during: During, reason: Reason, permanent: bool
) -> None:
    error = classify(sqlstate, function, during, NAMES)
    assert (error.reason, error.permanent) == (reason, permanent)
    assert str(error)
    assert error.hint
    assert "{" not in f"{error}{error.hint}"


def test_the_remedy_for_a_role_can_be_pasted_into_psql() -> None:
    assert 'ALTER ROLE "odd""role" REPLICATION' in classify("42501", "CheckSlotPermissions", C, NAMES).hint


def test_the_remedy_for_a_refused_plugin_names_an_unquoted_list_with_pgoutput() -> None:
    hint = classify("42501", "StartupDecodingContext", S, NAMES).hint
    assert "output_plugin_libraries = pgoutput, test_decoding, wal2json;" in hint


def test_an_orderly_end_is_the_servers() -> None:
    assert server_ended(NAMES).reason == Reason.SERVER_SHUTDOWN


@pytest.mark.parametrize(
    ("look", "reason"),
    [
        (None, Reason.NETWORK),
        (ServerLook("logical", may_replicate=True, walsenders=1, walsenders_max=10), Reason.NETWORK),
        (ServerLook("minimal", may_replicate=False, walsenders=0, walsenders_max=0), Reason.WAL_LEVEL),
        (ServerLook("logical", may_replicate=False, walsenders=10, walsenders_max=10), Reason.NO_REPLICATION_ROLE),
        (ServerLook("logical", may_replicate=True, walsenders=10, walsenders_max=10), Reason.NO_FREE_WALSENDER),
    ],
)
def test_a_refused_connection_is_told_by_what_an_ordinary_one_sees(look: ServerLook | None, reason: Reason) -> None:
    error = classify_connect(look, "cannot connect", "the remedy for that", NAMES)
    assert error.reason == reason
    if reason is Reason.NETWORK:
        assert (str(error), error.hint) == ("cannot connect", "the remedy for that")


OURS = FoundSlot("wal2json", "app", "reserved", Lsn.parse("0/1000"))


@pytest.mark.parametrize(
    ("found", "step"),
    [
        (None, Step.CREATE),
        (OURS, Step.START),
        (FoundSlot("wal2json", "app", "extended", END), Step.START),
        (FoundSlot("wal2json", "app", "unreserved", END), Step.START),
        (FoundSlot("wal2json", "app", "lost", Lsn.parse("0/1000")), Step.RECREATE),
        (FoundSlot("wal2json", "app", "reserved", Lsn.parse("0/2001")), Step.RECREATE),
        # Half made by another consumer: START will say that it is busy.
        (FoundSlot("wal2json", "app", "reserved", None), Step.START),
    ],
)
def test_only_a_slot_that_was_looked_at_and_found_broken_is_made_anew(found: FoundSlot | None, step: Step) -> None:
    assert next_step(found, END, NAMES, may_create=True) is step


@pytest.mark.parametrize("may_create", [True, False])
@pytest.mark.parametrize(
    "found",
    [
        FoundSlot("test_decoding", "app", "lost", None),
        FoundSlot("wal2json", "other", "lost", None),
        FoundSlot(None, None, "lost", None),
    ],
)
def test_a_strangers_slot_is_never_touched(found: FoundSlot, may_create: bool) -> None:
    with pytest.raises(StreamError) as refused:
        next_step(found, END, NAMES, may_create=may_create)
    assert refused.value.permanent
    assert "another name" in refused.value.hint


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (None, Reason.SLOT_MISSING),
        (FoundSlot("wal2json", "app", "lost", None), Reason.SLOT_LOST),
        (FoundSlot("wal2json", "app", "reserved", Lsn.parse("0/2001")), Reason.SLOT_LOST),
    ],
)
def test_where_nothing_may_be_created_the_command_that_does_it_is_named(
    found: FoundSlot | None, reason: Reason
) -> None:
    with pytest.raises(StreamError) as refused:
        next_step(found, END, NAMES, may_create=False)
    assert (refused.value.reason, refused.value.permanent) == (reason, True)
    assert "cdc slot create bell" in refused.value.hint
