from __future__ import annotations

from dataclasses import replace

import pytest

from cdc.core.errors import StreamError
from cdc.core.lsn import Lsn
from cdc.core.stream_reason import Reason
from cdc.replication.refusals import (
    ErrorContext,
    FoundSlot,
    Phase,
    ServerState,
    SlotAction,
    SlotPolicy,
    classify,
    classify_connect,
    next_step,
    server_ended,
    why_broken,
)

NAMES = ErrorContext(slot="cdc_slot", plugin="wal2json", database="app", role='odd"role', publication='odd"one')
END = Lsn.parse("0/2000")
P, C, S, R = Phase.PUBLISH, Phase.CREATE, Phase.START, Phase.STREAM

# Measured on PostgreSQL 15, 16 and 18, except those that the manual only documents.
CASES = [
    ("55006", "ReplicationSlotAcquire", S, Reason.SLOT_BUSY, False),
    ("55006", "ReplicationSlotAcquire", C, Reason.SLOT_BUSY, False),
    ("42704", "ReplicationSlotAcquire", S, Reason.SLOT_MISSING, False),
    ("42704", "get_publication_oid", R, Reason.PUBLICATION_MISSING, False),
    ("42704", None, R, Reason.PROTOCOL, False),
    ("42710", "ReplicationSlotCreate", C, Reason.SLOT_BUSY, False),
    ("42501", "aclcheck_error", P, Reason.PUBLICATION_MISSING, True),
    ("42710", "CreatePublication", P, Reason.SLOT_BUSY, False),
    ("23505", "_bt_check_unique", P, Reason.SLOT_BUSY, False),
    ("25006", "PreventCommandIfReadOnly", P, Reason.IN_RECOVERY, True),
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
    ("22023", "pg_decode_startup", S, Reason.PLUGIN_MISSING, True),
    ("22023", None, R, Reason.PROTOCOL, False),
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
def test_a_refusal_is_recognised_by_its_code_and_the_function_that_raised_it(
    sqlstate: str | None, function: str | None, during: Phase, reason: Reason, permanent: bool
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


def test_the_remedy_for_a_missing_publication_can_be_pasted_into_psql() -> None:
    assert 'CREATE PUBLICATION "odd""one"' in classify("42501", "aclcheck_error", P, NAMES).hint


def test_an_orderly_end_is_the_servers() -> None:
    assert server_ended(NAMES).reason == Reason.SERVER_SHUTDOWN


@pytest.mark.parametrize(
    ("look", "reason"),
    [
        (None, Reason.NETWORK),
        (ServerState("logical", may_replicate=True, walsenders=1, walsenders_max=10), Reason.NETWORK),
        (ServerState("minimal", may_replicate=False, walsenders=0, walsenders_max=0), Reason.WAL_LEVEL),
        (ServerState("logical", may_replicate=False, walsenders=10, walsenders_max=10), Reason.NO_REPLICATION_ROLE),
        (ServerState("logical", may_replicate=True, walsenders=10, walsenders_max=10), Reason.NO_FREE_WALSENDER),
    ],
)
def test_a_refused_connection_is_explained_by_what_an_ordinary_one_sees(
    look: ServerState | None, reason: Reason
) -> None:
    error = classify_connect(look, "cannot connect", "the remedy for that", NAMES)
    assert error.reason == reason
    if reason is Reason.NETWORK:
        assert (str(error), error.hint) == ("cannot connect", "the remedy for that")


OURS = FoundSlot("wal2json", "app", "reserved", Lsn.parse("0/1000"))
AHEAD = replace(OURS, confirmed=Lsn.parse("0/2001"))
LOST = replace(OURS, wal_status="lost")
OF_PGOUTPUT = replace(OURS, plugin="pgoutput")
ONLY_PGOUTPUT = SlotPolicy(plugins=("pgoutput",))
WITHOUT_WAL2JSON = SlotPolicy(plugins=("pgoutput",), refused=("wal2json",))
TEMPORARY = SlotPolicy(temporary=True)


@pytest.mark.parametrize(
    ("found", "wanted", "step"),
    [
        (None, SlotPolicy(), SlotAction.CREATE),
        (OURS, SlotPolicy(), SlotAction.START),
        (replace(OURS, wal_status="extended"), SlotPolicy(), SlotAction.START),
        (replace(OURS, wal_status="unreserved"), SlotPolicy(), SlotAction.START),
        (LOST, SlotPolicy(), SlotAction.RECREATE),
        (AHEAD, SlotPolicy(), SlotAction.RECREATE),
        # Half made by another consumer: START will say that it is busy.
        (replace(OURS, confirmed=None), SlotPolicy(), SlotAction.START),
        (OF_PGOUTPUT, SlotPolicy(), SlotAction.START),
        (OF_PGOUTPUT, ONLY_PGOUTPUT, SlotAction.START),
        (OF_PGOUTPUT, WITHOUT_WAL2JSON, SlotAction.START),
        (OURS, WITHOUT_WAL2JSON, SlotAction.RECREATE),
        (OURS, SlotPolicy(stuck=True), SlotAction.RECREATE),
        (None, SlotPolicy(stuck=True), SlotAction.CREATE),
        (None, TEMPORARY, SlotAction.CREATE),
        (OURS, TEMPORARY, SlotAction.RECREATE),
        # Another consumer's, whatever mode this one is in.
        (replace(OURS, temporary=True), TEMPORARY, SlotAction.START),
        (replace(OURS, temporary=True), SlotPolicy(), SlotAction.START),
    ],
)
def test_only_a_slot_that_was_looked_at_and_found_broken_is_recreated(
    found: FoundSlot | None, wanted: SlotPolicy, step: SlotAction
) -> None:
    assert next_step(found, END, NAMES, wanted) is step
    assert bool(found and why_broken(found, END, NAMES, wanted)) is (step is SlotAction.RECREATE)


@pytest.mark.parametrize("wanted", [SlotPolicy(), SlotPolicy(may_create=False), SlotPolicy(stuck=True), TEMPORARY])
@pytest.mark.parametrize(
    "found",
    [replace(LOST, plugin="test_decoding"), replace(LOST, database="other"), FoundSlot(None, None, "lost", None)],
)
def test_a_strangers_slot_is_never_touched(found: FoundSlot, wanted: SlotPolicy) -> None:
    with pytest.raises(StreamError) as refused:
        next_step(found, END, NAMES, wanted)
    assert (refused.value.reason, refused.value.permanent) == (Reason.SLOT_FOREIGN, True)
    assert "another name" in refused.value.hint


def test_a_slot_of_a_plugin_that_was_not_asked_for_is_kept_and_the_command_named() -> None:
    with pytest.raises(StreamError) as refused:
        next_step(OURS, END, NAMES, ONLY_PGOUTPUT)
    assert (refused.value.reason, refused.value.permanent) == (Reason.SLOT_FOREIGN, True)
    assert "cdc slot recreate cdc_slot --plugin pgoutput" in refused.value.hint


@pytest.mark.parametrize(
    ("found", "wanted", "reason"),
    [
        (LOST, SlotPolicy(), Reason.SLOT_LOST),
        (AHEAD, SlotPolicy(), Reason.SLOT_LOST),
        (OURS, WITHOUT_WAL2JSON, Reason.PLUGIN_REFUSED),
        (OURS, TEMPORARY, Reason.SLOT_FOREIGN),
        (OURS, SlotPolicy(stuck=True), Reason.SLOT_STUCK),
    ],
)
def test_where_nothing_may_be_recreated_the_command_that_does_it_is_named(
    found: FoundSlot, wanted: SlotPolicy, reason: Reason
) -> None:
    with pytest.raises(StreamError) as refused:
        next_step(found, END, NAMES, replace(wanted, may_recreate=False))
    assert (refused.value.reason, refused.value.permanent) == (reason, True)
    assert "cdc slot recreate cdc_slot" in refused.value.hint


def test_where_nothing_may_be_created_the_command_that_does_it_is_named() -> None:
    with pytest.raises(StreamError) as refused:
        next_step(None, END, NAMES, SlotPolicy(may_create=False))
    assert (refused.value.reason, refused.value.permanent) == (Reason.SLOT_MISSING, True)
    assert "cdc slot create cdc_slot" in refused.value.hint
