"""Checks of the wake-ups: the replication connection, the plugin, the slot. Pure."""

from __future__ import annotations

import re

from cdc.core.stream_reason import Reason
from cdc.core.units import format_bytes, format_duration
from cdc.diagnostics.check_server import judge_tls, slots_free, wal_level, walsenders_free
from cdc.diagnostics.facts import Decoding, Proof, ReplicationLink, ServerFacts, SlotFacts, Subject
from cdc.diagnostics.findings import Checks, Finding, fail, ok, skip, unknown, warn
from cdc.replication.slot_health import SlotReport, assess

_OURS = "cdc"
"""The beginning of our sessions' application names."""
_SOME_WAL_BYTES = 64 << 20
"""One burst fills a lower limit; see max_slot_wal_keep_size in docs/operations/server.md."""
_ENOUGH_WAL = "10GB"
_SHORT_STOP_S = 3600.0
# A list in one pair of quotes is a single name, and allows nothing.
_ELEMENT = re.compile(r'"[^"]*"|[^\s,"]+')

# Reasons that another check reports, with its remedy.
_SAID_ELSEWHERE = {
    Reason.WAL_LEVEL.value: "wal-level",
    Reason.NO_REPLICATION_ROLE.value: "replication-role",
    Reason.NO_FREE_SLOT.value: "slots-free",
    Reason.IN_RECOVERY.value: "recovery",
}


def stream_connect(link: ReplicationLink) -> Finding:
    if link.refused is not None and link.may_replicate is False:
        return skip("the role may not: see replication-role")
    if link.refused is not None:
        return fail(*link.refused)
    return ok(f"the server takes a replication connection of {link.role}")


def stream_tls(link: ReplicationLink) -> Finding:
    if link.refused is not None:
        return skip("there is no replication connection")
    return judge_tls(link.is_local, link.encrypted, link.sslmode)


def replication_role(link: ReplicationLink) -> Finding:
    if link.may_replicate is None:
        return unknown("there is no connection to ask over")
    if link.may_replicate:
        return ok(f"{link.role} may use replication")
    return fail(
        f"the role {link.role} may not use replication: changes are found by sweeping",
        "on RDS and Aurora: GRANT rds_replication",
        f'ALTER ROLE "{_quoted(link.role)}" REPLICATION;',
    )


def sender_timeout(link: ReplicationLink) -> Finding:
    got_s = link.wal_sender_timeout_s
    if link.refused is not None or got_s is None:
        return skip("there is no replication connection")
    if got_s == link.wanted_timeout_s:
        return ok(f"{format_duration(got_s)}, as the stream asks for")
    if got_s == 0:
        return warn("0, not what the stream asks for: a vanished consumer keeps the slot for ever", _PASSES_OPTIONS)
    if got_s <= 2 * link.status_interval_s:
        return fail(
            f"{format_duration(got_s)}, not what the stream asks for: too short, it is cut off again and again",
            _PASSES_OPTIONS,
        )
    return warn(
        f"{format_duration(got_s)}, not the {format_duration(link.wanted_timeout_s)} that the stream asks for",
        _PASSES_OPTIONS,
    )


_PASSES_OPTIONS = "a pooler or proxy drops the session's options: connect the stream directly (CDC_STREAM_DSN)"


def plugin(seen: Decoding) -> Finding:
    last = seen.proofs[-1]
    if last.reason is None:
        others = "; ".join(proof.sentence for proof in seen.proofs[:-1])
        proof = "has decoded a message" if last.sent else f"reads a slot; {seen.role} may not send it a message"
        return ok(f"{last.plugin} {proof}" + (f" ({others})" if others else ""))
    if last.reason in _SAID_ELSEWHERE:
        return skip(f"{last.sentence}: see {_SAID_ELSEWHERE[last.reason]}")
    if last.reason == Reason.SLOT_MISSING:
        return warn(f"not proven: {last.sentence}", last.hint)
    allow = (_allowing(seen),) if any(map(_is_refused, seen.proofs)) else ()
    remedy = "" if _is_refused(last) else last.hint
    return fail("; ".join(proof.sentence for proof in seen.proofs), remedy, *allow)


def _is_refused(proof: Proof) -> bool:
    return proof.reason == Reason.PLUGIN_REFUSED


def _allowing(seen: Decoding) -> str:
    """One statement for all plugins that were tried: a second statement would undo the first."""
    # Unquoted: as one quoted string it is one name and allows nothing. Without pgoutput in the list it is refused.
    names = dict.fromkeys(["pgoutput", "test_decoding", *(proof.plugin for proof in seen.proofs)])
    return f'ALTER ROLE "{_quoted(seen.role)}" SET output_plugin_libraries = {", ".join(names)};'


def plugin_allowed(seen: Decoding) -> Finding:
    name = seen.proofs[-1].plugin
    if seen.allowed is None:
        return ok("this server allows every plugin that is installed")
    if not seen.allowed and seen.proofs[-1].reason is None:
        return ok("the proof of plugin says so; only pg_read_all_settings may see output_plugin_libraries")
    if not seen.allowed:
        return unknown("only pg_read_all_settings may see output_plugin_libraries")
    if name in _ELEMENT.findall(seen.allowed):
        return ok(f"output_plugin_libraries has {name}")
    return fail(
        f"output_plugin_libraries is {seen.allowed}, without {name}",
        "",
        _allowing(seen),
    )


def publication(seen: Decoding, *, slot_plugin: str | None) -> Finding:
    if (slot_plugin or seen.proofs[-1].plugin) != "pgoutput":
        return skip("only pgoutput needs one")
    name = f'"{_quoted(seen.publication)}"'
    if seen.published is None and seen.may_publish and slot_plugin is None:
        return ok(f"there is no publication {seen.publication} yet: a consumer makes it, with its slot")
    if seen.published is None:
        return fail(
            f"there is no publication {seen.publication}, which pgoutput needs",
            "a slot that is older than it has to be recreated: cdc slot recreate",
            f"CREATE PUBLICATION {name};",
        )
    if seen.published:
        return warn(
            f"the publication {seen.publication} publishes {', '.join(seen.published)}, which no consumer reads",
            f"if no other program reads it: DROP PUBLICATION {name}; CREATE PUBLICATION {name};",
        )
    return ok(f"{seen.publication} is there, and publishes nothing")


def slot(seen: SlotFacts, *, subject: Subject) -> Finding:
    found = seen.slot
    if found is None:
        return _no_slot(subject)
    if not found.ours:
        return fail(
            f"the name {found.name} belongs to another slot: {found.kind}",
            "choose another name for ours (CDC_SLOT_NAME), or, if that one is not needed: "
            f"cdc slot recreate {found.name} --force",
        )
    if subject.plugin not in ("auto", found.plugin):
        return fail(
            f"the slot {found.name} is one of {found.plugin}, and CDC_SLOT_PLUGIN is {subject.plugin}",
            f"cdc slot recreate {found.name} --plugin {subject.plugin}; no change is lost",
        )
    if subject.temporary and not found.temporary:
        return warn(
            f"the slot {found.name} is durable, and CDC_SLOT_MODE is temporary: a consumer replaces it",
            f"cdc slot drop {found.name}; no change is lost",
        )
    if found.active and not (found.application_name or "").startswith(_OURS):
        return fail(
            f"the slot {found.name} is being read by {found.reader}, which is no consumer of ours",
            "choose another name for ours (CDC_SLOT_NAME), or end that program",
        )
    return _state(found)


def _no_slot(subject: Subject) -> Finding:
    if subject.temporary:
        return ok(f"{subject.slot} is temporary, and there only while a consumer streams")
    if subject.creates_slot:
        return ok(f"there is no slot {subject.slot} yet: a consumer makes it")
    return fail(f"there is no slot {subject.slot}, and CDC_SLOT_CREATE is off", f"cdc slot create {subject.slot}")


def _state(found: SlotReport) -> Finding:
    severity = assess(found)
    if not severity.fine:
        gone = found.wal_status == "lost" or found.ahead
        # The name consists of letters, digits and underscores.
        drop = (f"SELECT pg_drop_replication_slot('{found.name}');",) if gone and not found.active else ()
        return fail(f"{found.name}: {severity.sentence}", severity.remedy, *drop)
    kept = f"keeps {format_bytes(found.retained_wal_bytes or 0)} of WAL"
    return ok(
        f"{found.name}, {found.plugin}, {kept}, {f'read by {found.reader}' if found.active else 'read by no consumer'}"
    )


def slot_limits(seen: SlotFacts, *, temporary: bool) -> Finding:
    if temporary:
        return ok("a temporary slot keeps nothing when its consumer is gone")
    if seen.keep_bytes is None:
        return fail(
            "max_slot_wal_keep_size is -1: while no consumer runs, the slot keeps WAL until the disk is full",
            "more or less, as the disk can spare: a slot that is lost loses no change. Or CDC_SLOT_MODE=temporary",
            f"ALTER SYSTEM SET max_slot_wal_keep_size = '{_ENOUGH_WAL}';",
        )
    if seen.keep_bytes < _SOME_WAL_BYTES:
        return warn(
            f"max_slot_wal_keep_size is {format_bytes(seen.keep_bytes)}: a burst of writes loses a healthy slot",
            "more than half a minute of WAL at its peak; the consumer recreates a lost slot",
            f"ALTER SYSTEM SET max_slot_wal_keep_size = '{_ENOUGH_WAL}';",
        )
    if seen.idle_timeout_s is not None and 0 < seen.idle_timeout_s < _SHORT_STOP_S:
        return warn(
            f"idle_replication_slot_timeout is {format_duration(seen.idle_timeout_s)}: a short stop loses the slot",
            "longer than they are ever down; the consumer recreates a lost slot",
        )
    return ok(f"max_slot_wal_keep_size is {format_bytes(seen.keep_bytes)}")


def _quoted(name: str) -> str:
    return name.replace('"', '""')


def of_server(slot: SlotReport | None) -> Checks[ServerFacts]:
    """The free resources that a stream needs on the server."""
    return {
        "wal-level": wal_level,
        "slots-free": lambda server: slots_free(server, slot_exists=slot is not None),
        "walsenders-free": lambda server: walsenders_free(server, streaming=slot is not None and slot.active),
    }


def of_decoding(slot: SlotReport | None) -> Checks[Decoding]:
    ours = slot.plugin if slot is not None and slot.ours else None
    return {
        "plugin": plugin,
        "plugin-allowed": plugin_allowed,
        "publication": lambda seen: publication(seen, slot_plugin=ours),
    }


def of_slot(subject: Subject) -> Checks[SlotFacts]:
    return {
        "slot": lambda seen: slot(seen, subject=subject),
        "slot-limits": lambda seen: slot_limits(seen, temporary=subject.temporary),
    }


LINK: Checks[ReplicationLink] = {
    "stream-connect": stream_connect,
    "stream-tls": stream_tls,
    "replication-role": replication_role,
    "sender-timeout": sender_timeout,
}
