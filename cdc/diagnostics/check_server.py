"""Checks of the server and of connections to it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date

from cdc.core.units import format_duration
from cdc.diagnostics.facts import OpenTransactions, ServerFacts, SessionFacts, Transaction
from cdc.diagnostics.findings import Checks, Finding, fail, ok, warn

_OLDEST_VERSION = 14
_END_OF_LIFE: Mapping[int, date] = {
    14: date(2026, 11, 12),
    15: date(2027, 11, 11),
    16: date(2028, 11, 9),
    17: date(2029, 11, 8),
    18: date(2030, 11, 14),
}
"""https://www.postgresql.org/support/versioning/"""
_CLOCKS_APART_S = 2.0
_NOTIFY_QUEUE_FULL = 0.5
_SHOWN = 3
"""Transactions that the finding names."""


def connect(session: SessionFacts) -> Finding:
    return ok(f"{session.place}, as {session.role}")


def tls(session: SessionFacts) -> Finding:
    return judge_tls(session.is_local, session.encrypted, session.sslmode)


def judge_tls(is_local: bool, encrypted: bool, sslmode: str) -> Finding:
    if is_local:
        return ok("encrypted" if encrypted else "not encrypted, and does not leave this machine")
    verify = (
        "sslmode=verify-full in the DSN, and sslrootcert=FILE of the authority that signed the server's certificate"
    )
    if not encrypted:
        return warn("not encrypted: anybody on the way to the server can read changes and passwords", verify)
    if sslmode != "verify-full":
        return warn(f"encrypted, but with sslmode={sslmode} the server's identity is not verified", verify)
    return ok("encrypted, and the server's certificate is verified")


def pooler(session: SessionFacts) -> Finding:
    direct = (
        "connect to the server itself, or through a pooler in session mode: locks and LISTEN belong to a session; "
        "transactional handlers may go through any, by CDC_HANDLERS_DSN"
    )
    if len(set(session.pids)) > 1:
        return fail("a pooler gives each transaction another session", direct)
    if session.pids and session.handshake_pid != session.pids[0]:
        return warn("a pooler is in between; in transaction mode it would lose the shard locks", direct)
    return ok("none in between")


def keepalives(session: SessionFacts) -> Finding:
    if session.settings:
        different = ", ".join(f"{name} is {value}" for name, value in session.settings.items())
        return warn(
            f"the session does not get the TCP settings it asks for: {different}",
            "a pooler or proxy in between drops them: connect directly, or a vanished consumer keeps its shards long",
        )
    return ok("a vanished consumer's shards are free within seconds")


def session_timeouts(session: SessionFacts, *, handler_timeout_s: float | None) -> Finding:
    unset = 'ALTER ROLE "{}" SET {} = 0;'
    role = session.role.replace('"', '""')
    if session.idle_session_timeout_s:
        return warn(
            f"idle_session_timeout is {format_duration(session.idle_session_timeout_s)}: listeners are cut off",
            "",
            unset.format(role, "idle_session_timeout"),
        )
    limit_s = session.idle_in_transaction_timeout_s
    if limit_s and (handler_timeout_s is None or limit_s < handler_timeout_s):
        return warn(
            f"idle_in_transaction_session_timeout is {format_duration(limit_s)}, less than a handler may take",
            "or a shorter CDC_TIMEOUT",
            unset.format(role, "idle_in_transaction_session_timeout"),
        )
    return ok("none that cuts us off")


def version(server: ServerFacts) -> Finding:
    major = server.version_num // 10_000
    if major < _OLDEST_VERSION:
        return fail(f"PostgreSQL {server.version} is too old", f"upgrade the server to {_OLDEST_VERSION} or later")
    ends = _END_OF_LIFE.get(major)
    if ends is not None and server.server_time.date() > ends:
        return warn(f"PostgreSQL {major} has had no fixes since {ends:%Y-%m-%d}", "upgrade the server")
    return ok(f"PostgreSQL {server.version}")


def recovery(server: ServerFacts) -> Finding:
    if server.in_recovery:
        return fail(
            "the server is a standby and takes no writes",
            "connect to the primary: list all hosts in the DSN and add target_session_attrs=read-write",
        )
    if server.reads_by_default:
        return warn(
            "a primary, but transactions are read only by default: the application's own writes fail",
            "a host does that where the disk is full: make room, then ALTER DATABASE ... RESET"
            " default_transaction_read_only",
        )
    return ok("a primary, and takes writes")


def wal_level(server: ServerFacts) -> Finding:
    if server.wal_level != "logical":
        return fail(
            f"wal_level is {server.wal_level}: no slot can be read, changes are found by sweeping",
            "then restart the server (RDS, Aurora: rds.logical_replication; Cloud SQL: cloudsql.logical_decoding)",
            "ALTER SYSTEM SET wal_level = logical;",
        )
    return ok("logical")


def slots_free(server: ServerFacts, *, slot_exists: bool) -> Finding:
    used = f"{server.slots} of {server.slots_max} replication slots are used"
    if slot_exists or server.slots < server.slots_max:
        return ok(used)
    idle = f"drop an unused one: {', '.join(server.idle_slots[:_SHOWN])}; or " if server.idle_slots else ""
    return fail(
        f"{used}, and ours is not there",
        f"{idle}restart the server",
        _one_more("max_replication_slots", server.slots_max),
    )


def walsenders_free(server: ServerFacts, *, streaming: bool) -> Finding:
    used = f"{server.walsenders} of {server.walsenders_max} walsenders are used"
    if streaming or server.walsenders < server.walsenders_max:
        return ok(used)
    return fail(
        used,
        "then restart the server; or end an unused replication connection",
        _one_more("max_wal_senders", server.walsenders_max),
    )


def _one_more(setting: str, now: int) -> str:
    return f"ALTER SYSTEM SET {setting} = {now + 5};"


def clock(server: ServerFacts) -> Finding:
    apart = abs(server.clock_ahead_s)
    if apart > _CLOCKS_APART_S:
        return warn(
            f"this machine's clock and the server's are {apart:.1f} s apart, and cdc_wakeup_latency_seconds is wrong",
            "run NTP on both",
        )
    return ok("this machine's and the server's agree")


def notify_queue(server: ServerFacts) -> Finding:
    used = f"{server.notify_queue_ratio:.0%} of the queue of notifications is used"
    if server.notify_queue_ratio > _NOTIFY_QUEUE_FULL:
        return warn(
            f"{used}: when it is full, NOTIFY fails",
            "end the session that listens and stays in a transaction; the server's log names its process",
        )
    return ok(used)


def old_transactions(seen: OpenTransactions) -> Finding:
    if seen.old:
        named = "; ".join(_transaction(each) for each in seen.old[:_SHOWN])
        more = f"; and {len(seen.old) - _SHOWN} more" if len(seen.old) > _SHOWN else ""
        return warn(
            f"older than {format_duration(seen.limit_s)}, so the server keeps WAL or dead rows for it: {named}{more}",
            f"let it end, or end it: {' '.join(each.ends_it for each in seen.old[:_SHOWN])}",
        )
    if not seen.sees_all:
        newest = f"; the oldest that writes is {seen.oldest_writer}" if seen.oldest_writer else ""
        return warn(f"the role sees only its own transactions' ages{newest}", "GRANT pg_read_all_stats TO it")
    return ok(f"none is older than {format_duration(seen.limit_s)}")


def _transaction(each: Transaction) -> str:
    if each.gid is not None:
        return f"the prepared transaction {each.gid}, {format_duration(each.age_s)} old, database {each.database}"
    kept = "holds WAL and dead rows" if each.writes else "holds dead rows"
    known = [f"{format_duration(each.age_s)} old", f"database {each.database}", each.application_name, each.state, kept]
    return f"process {each.pid}, {', '.join(part for part in known if part)}"


def sync_standby(seen: OpenTransactions) -> Finding:
    if not seen.synchronous_standbys:
        return ok("commits wait for no standby")
    if seen.waiting_commits:
        pids = ", ".join(map(str, seen.waiting_commits[:_SHOWN]))
        return warn(
            f"commits wait for a standby of synchronous_standby_names (process {pids}): their rows become visible late",
            "bring the standby back, or take it out of synchronous_standby_names",
        )
    return ok(f"no commit waits for {seen.synchronous_standbys}")


def of_session(handler_timeout_s: float | None) -> Checks[SessionFacts]:
    return {
        "connect": connect,
        "tls": tls,
        "pooler": pooler,
        "keepalives": keepalives,
        "session-timeouts": lambda session: session_timeouts(session, handler_timeout_s=handler_timeout_s),
    }


SERVER: Checks[ServerFacts] = {
    "version": version,
    "recovery": recovery,
    "clock": clock,
    "notify-queue": notify_queue,
}
TRANSACTIONS: Checks[OpenTransactions] = {"old-transactions": old_transactions, "sync-standby": sync_standby}
