"""Checks of the outbox: its objects, what is captured into it, the roles that work on it, and its backlog. Pure."""

from __future__ import annotations

import shlex
from dataclasses import replace

from cdc.core.model import SHARDS, ChangeState
from cdc.core.units import format_duration
from cdc.diagnostics.facts import (
    Astray,
    Backlog,
    CaptureFunctionFacts,
    Creators,
    DataReaders,
    Installed,
    Numbering,
    Operators,
    Rights,
    RowSecurity,
    Senders,
    ShardHolders,
    Subject,
    TableFacts,
    Unhandled,
)
from cdc.diagnostics.findings import Checks, Finding, fail, ok, skip, unknown, warn

_OLD_BACKLOG_S = 300.0
_OLD_PAUSE_S = 86_400.0
_OVERDUE_S = 60.0
"""An event is published within a second or two of when it is due."""
_DEAD_RATIO = 1.0
_DEAD_ROWS = 10_000
_SHOWN = 5
DEFAULT_SLOT = "cdc"


def schema(seen: Installed) -> Finding:
    if not seen.exists:
        other = f"; there is one in {', '.join(seen.elsewhere)}: is --schema right?" if seen.elsewhere else ""
        found = fail(f"there is no entity_changes in schema {seen.schema}{other}", _install("install", seen.schema))
    elif seen.pending:
        steps = ", ".join(seen.pending)
        found = fail(
            f"schema {seen.schema} is older than this version; it lacks {steps}",
            _upgrade(seen.owner, _install("upgrade", seen.schema)),
        )
    elif seen.differences:
        more = f", and {len(seen.differences) - _SHOWN} more" if len(seen.differences) > _SHOWN else ""
        found = fail(
            f"schema {seen.schema} is not as this version makes it: {', '.join(seen.differences[:_SHOWN])}{more}",
            f"{_upgrade(seen.owner, _install('upgrade', seen.schema))} (cdc db verify lists all)"
            if seen.script or not seen.by_hand
            else "",
            *seen.by_hand,
        )
    else:
        return ok(f"schema {seen.schema} is as this version makes it")
    return replace(found, script=seen.script)


def _upgrade(owner: str, command: str = "cdc db upgrade") -> str:
    """The upgrade does not change owners, so a superuser must run it as the objects' owner, too."""
    return f"{command}, as {owner}" if owner else command


def _install(command: str, schema_name: str) -> str:
    return f"cdc db {command}" + ("" if schema_name == "public" else f" --schema {schema_name}")


def outboxes(seen: Installed, *, slot: str) -> Finding:
    if not seen.elsewhere:
        return ok("the only one in this database")
    others = f"there are others in {', '.join(seen.elsewhere)}"
    if slot == DEFAULT_SLOT:
        return warn(
            f"{others}, and a slot serves one only",
            f"give each its own slot; this one has the default name {DEFAULT_SLOT} (CDC_SLOT_NAME)",
        )
    return ok(f"{others}; this one has the slot {slot}")


def capture_function(seen: CaptureFunctionFacts) -> Finding:
    """``cdc db upgrade`` fixes what it may. It does not change the function's owner; ``schema`` reports that."""
    own_role = (
        f"{_upgrade(seen.outbox_owner)} with the right to create roles, gives it a role of its own: see"
        " docs/operations/roles.md"
    )
    problems = [
        *([] if seen.security_definer else ["it is not SECURITY DEFINER, so writers need rights on the outbox"]),
        *([] if _pinned(seen) else ["its search_path is not pinned"]),
        *(["every role may call it, and so forge changes"] if seen.public_may_call else []),
    ]
    if seen.security_definer and seen.lacks:
        lacking = (
            f"every write to a tracked table fails: {seen.owner}, whose rights it has, lacks {', '.join(seen.lacks)}"
        )
        if not seen.owner_is_meant:
            return fail("; ".join([lacking, *problems]), "give it to whom it belongs, or the table back: see schema")
        return fail("; ".join([lacking, *problems]), "" if seen.grants else "see schema", *seen.grants)
    if problems:
        revoke = (f"REVOKE ALL ON FUNCTION {seen.name} FROM PUBLIC;",) if seen.public_may_call else ()
        return fail("; ".join(problems), _upgrade(seen.outbox_owner), *revoke)
    if seen.owner_is_superuser and seen.others:
        return fail(
            f"it runs with the rights of {seen.owner}, a superuser, and calls casts that owners of captured tables and"
            f" types may make: {', '.join(seen.others[:_SHOWN])}",
            own_role,
        )
    if seen.owner_is_superuser or seen.owns_outbox:
        what = "a superuser" if seen.owner_is_superuser else "which also owns the outbox"
        return warn(f"it runs with the rights of {seen.owner}, {what}", own_role)
    return ok(f"it runs with the rights of {seen.owner}")


def _pinned(seen: CaptureFunctionFacts) -> bool:
    return any(setting.startswith("search_path=") for setting in seen.settings)


def row_security(seen: RowSecurity) -> Finding:
    """Where it applies to the role, the server refuses to read: our sessions do not let it leave rows out."""
    if not seen.active:
        others = f"; on for others: {', '.join(seen.tables)}" if seen.tables else ""
        return ok(f"none of the outbox's tables has any for {seen.role}{others}")
    return fail(
        f"row level security is on for {', '.join(seen.active)}, and goes for {seen.role}: no change can be read",
        f'or, if it is to stay, as a superuser: ALTER ROLE "{seen.role.replace(chr(34), chr(34) * 2)}" BYPASSRLS;',
        *(f"ALTER TABLE {table} DISABLE ROW LEVEL SECURITY;" for table in seen.active),
    )


def readers(seen: DataReaders) -> Finding:
    unexpected = [each for each in seen.readers if not each.intended]
    intended = ", ".join(each.role for each in seen.readers if each.intended)
    if not unexpected:
        besides = f" and {intended}" if intended else ""
        return ok(f"{seen.owner}{besides}; superusers and members of pg_read_all_data besides")
    named = ", ".join(each.role + (" (by default privileges)" if each.by_default else "") for each in unexpected)
    return warn(
        f"also read what is captured, whatever they may read elsewhere: {named}",
        "if that is meant: cdc db grant --readonly ROLE --payload",
        *(statement for each in unexpected for statement in each.by_default),
        *(f"REVOKE ALL ON TABLE {', '.join(each.tables)} FROM {_role(each.role)};" for each in unexpected),
    )


def creators(seen: Creators) -> Finding:
    """Found by their names and the types of their arguments, the functions of a schema stand beside those of others."""
    if not seen.others:
        return ok(f"the owners of schema {seen.schema} and of the outbox alone")
    return warn(
        f"may also create functions beside the outbox's in schema {seen.schema}, which somebody else's statement may"
        f" call instead of ours: {', '.join(seen.others[:_SHOWN])}",
        "",
        f"REVOKE CREATE ON SCHEMA {_role(seen.schema)} FROM {', '.join(map(_role, seen.others))};",
    )


def senders(seen: Senders) -> Finding:
    if not seen.open_to_all:
        return ok(f"superusers and {', '.join((*seen.owners, *seen.others))}")
    functions = ", ".join(seen.open_to_all)
    return warn(
        "every role that may connect may send logical messages of up to 1 GB, and one that is larger than half the"
        " consumer's memory ends it",
        "as a superuser; another application that sends logical messages needs the GRANT as well",
        # In this order: without the right every write to a tracked table would fail.
        *(f"GRANT EXECUTE ON FUNCTION {functions} TO {_role(owner)};" for owner in seen.owners),
        f"REVOKE EXECUTE ON FUNCTION {functions} FROM PUBLIC;",
    )


def _role(name: str) -> str:
    return "PUBLIC" if name == "PUBLIC" else '"' + name.replace('"', '""') + '"'


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def sequence(seen: Numbering) -> Finding:
    if seen.last is None:
        return unknown(
            f"{seen.role} may not see the last number of {seen.sequence}",
            "",
            f"GRANT SELECT ON SEQUENCE {seen.sequence} TO {_role(seen.role)};",
        )
    if seen.last < seen.highest:
        return fail(
            f"the last number drawn is {seen.last}, and there is a change {seen.highest}: new changes come before it,"
            " or share a number",
            "or cdc db upgrade, which locks out writers meanwhile",
            f"SELECT setval({_literal(seen.sequence)}, (SELECT max(seq) FROM {seen.table}));",  # noqa: S608 - names
        )
    return ok(f"the last number drawn is {seen.last}, the highest of the latest changes {seen.highest}")


def shards(seen: Astray) -> Finding:
    if not seen.rows:
        return ok("the changes examined are in the shards of their keys")
    return fail(
        f"{seen.rows} or more changes are not in the shard of their key: somebody wrote a shard or a key by hand, and"
        " the order of the key is not kept, or nobody reads them",
        "no consumer may run meanwhile",
        f"UPDATE {seen.table} SET shard = (hashtext(entity_id) & {SHARDS - 1})::smallint"  # noqa: S608 - a name
        f" WHERE NOT processed AND shard <> hashtext(entity_id) & {SHARDS - 1};",
    )


def grants(seen: Rights) -> Finding:
    if seen.grants:
        return fail(f"the role {seen.role} lacks rights on schema {seen.schema}", "", *seen.grants)
    return ok(f"{seen.role} may read changes and mark them")


def operators(seen: Operators) -> Finding:
    """What they do is recorded, or refused; what they decide about, they have to see."""
    if not seen.lacking:
        return ok(
            f"{', '.join(seen.roles)} may record what they do" if seen.roles else "no role but the owner's decides"
        )
    named = ", ".join(role for role, _ in seen.lacking)
    return warn(
        f"they may decide about changes, and lack what goes with it, so that commands of theirs are refused: {named}",
        "or give all at once: cdc db grant --operator ROLE",
        *(grant for _, grants in seen.lacking for grant in grants),
    )


def shard_holders(seen: ShardHolders) -> Finding:
    if seen.strangers:
        named = ", ".join(
            f"process {pid} ({name or 'no application name'}): {count}" for pid, name, count in seen.strangers
        )
        return fail(
            f"sessions that are no consumers hold shards, whose changes are not handled, or claim a share: {named}",
            "stop that program, or end its sessions: "
            + " ".join(f"SELECT pg_terminate_backend({pid});" for pid, _, _ in seen.strangers),
        )
    if seen.silent:
        named = ", ".join(
            f"process {pid}: {count}, for {format_duration(silent_s)}" for pid, count, silent_s in seen.silent
        )
        return warn(
            f"sessions of consumers hold shards and send nothing, as a consumer does every second: {named}",
            "a consumer that hangs, or forked children of one that was killed: stop them, or end their sessions: "
            + " ".join(f"SELECT pg_terminate_backend({pid});" for pid, _, _ in seen.silent),
        )
    if not seen.consumers:
        return ok("no consumer is running")
    return ok(f"{seen.held} of {SHARDS} shards are held; consumers: {seen.consumers}")


def autovacuum(seen: TableFacts) -> Finding:
    if seen.excluded:
        return fail(
            f"autovacuum is off for {seen.name}: dead rows pile up",
            "",
            f"ALTER TABLE {seen.name} RESET (autovacuum_enabled);",
        )
    if not seen.autovacuum:
        return fail(
            "autovacuum is off on the server: dead rows pile up, and transaction ids run out",
            "then reload: SELECT pg_reload_conf()",
            "ALTER SYSTEM SET autovacuum = on;",
        )
    if not seen.tuned:
        return warn(f"{seen.name} has not the settings of a queue", "cdc db upgrade")
    if seen.dead > max(_DEAD_ROWS, _DEAD_RATIO * seen.live):
        return warn(
            f"{seen.dead:,} dead rows and {seen.live:,} live ones: vacuum cannot keep up, or something holds them",
            "see old-transactions; then: VACUUM " + seen.name,
        )
    return ok(f"on, {seen.dead:,} dead rows")


def backlog(seen: Backlog) -> Finding:
    counted = f"{seen.fresh:,} fresh, {seen.waiting:,} waiting"
    if seen.oldest_ready_age_s > _OLD_BACKLOG_S:
        return warn(
            f"{counted}; the oldest that could run has waited for {format_duration(seen.oldest_ready_age_s)}",
            "is a consumer running? cdc outbox stats, cdc outbox list --state fresh"
            + (
                "; is it of a handler that is paused? cdc controls" if any(p.handler for p in seen.pauses or ()) else ""
            ),
        )
    if seen.snoozed:
        return warn(
            f"{counted}; snoozed by their handler, and captured more than a day ago: {seen.snoozed:,}",
            "only the handler ends that, and each holds back its key; if it is not meant: cdc outbox discard ID, from"
            " cdc outbox list --state waiting",
        )
    return ok(counted)


def unhandled(seen: Unhandled) -> Finding:
    if not seen.types:
        return ok("every type that waits has a handler among those named here")
    more = f", and {len(seen.types) - _SHOWN} more types" if len(seen.types) > _SHOWN else ""
    named = ", ".join(f"{count:,} of {entity_type}" for entity_type, count in seen.types[:_SHOWN])
    return warn(
        f"changes wait, and no handler named here wants them: {named}{more}",
        'write a handler (@router.on), or discard them: router.ignore("type"); nothing, if another consumer wants them',
    )


def dead(seen: Backlog) -> Finding:
    if seen.dead:
        return warn(
            f"there are dead letters: {seen.dead:,}",
            "cdc outbox list --state dead; then cdc outbox retry ID, or cdc outbox discard ID",
        )
    return ok("none")


def due_later(seen: Backlog) -> Finding:
    due = seen.due_later
    if due is None:
        return unknown("the role may not see what is due later", "cdc db grant")
    if due.overdue_s > _OVERDUE_S:
        return warn(
            f"events are due, and not published: the first has been due for {format_duration(due.overdue_s)}",
            "is a consumer of this version running (its log says why it does not publish)? may its role: cdc db grant"
            " --consumer ROLE",
        )
    return ok(str(due))


def barriers(seen: Backlog) -> Finding:
    barrier = seen.barrier
    if barrier is None:
        return ok("none holds anything back")
    said = f"the {barrier.operation} {barrier.seq} of the type {barrier.entity_type} holds back what comes after it"
    if barrier.age_s < _OLD_BACKLOG_S:
        return ok(f"{said}, for {format_duration(barrier.age_s)} now")
    said += f", for {format_duration(barrier.age_s)} now: "
    go_on = f"to let its type go on without it: cdc outbox discard {barrier.seq}"
    if barrier.state is ChangeState.DEAD:
        return warn(f"{said}it is a dead letter that pauses", f"cdc outbox show {barrier.seq}; {go_on}, or retry it")
    if barrier.state is ChangeState.WAITING:
        return warn(f"{said}it waits for its next attempt", f"cdc outbox show {barrier.seq}; {go_on}")
    if barrier.clear:
        return warn(f"{said}all before it is settled", "does a consumer run that handles its type? cdc outbox stats")
    return warn(
        f"{said}it waits for changes of its type from before it",
        f"see which, and what blocks them: cdc outbox list --type {shlex.quote(barrier.entity_type)} --state fresh, or"
        " waiting",
    )


def paused(seen: Backlog) -> Finding:
    """What was paused in an incident is easily forgotten when that is over."""
    if seen.pauses is None:
        return unknown("the role may not see what is paused", "cdc db grant")
    if not seen.pauses:
        return ok("nothing")
    old = [each for each in seen.pauses if each.age_s > _OLD_PAUSE_S]
    named = "; ".join(
        f"{each}, for {format_duration(each.age_s)}, by {each.set_by}: {each.because}"
        for each in (old or seen.pauses)[:_SHOWN]
    )
    if old:
        return warn(f"paused for more than a day: {named}", "cdc controls lists all; to go on: cdc resume")
    return ok(named)


def handlers(subject: Subject) -> Finding:
    if subject.handlers_error is not None:
        return fail(*subject.handlers_error)
    if subject.handles is None:
        return skip("no handlers are named here (--handlers, CDC_HANDLERS or --config)")
    return ok("they load, and no two want the same change")


def config(subject: Subject) -> Finding:
    if subject.exposed_files:
        files = " ".join(subject.exposed_files)
        return warn(f"every user of this machine can read the DSN in {files}", f"chmod 600 {files}")
    return ok("no secret lies open")


def of_installed(slot: str) -> Checks[Installed]:
    return {"schema": schema, "outboxes": lambda seen: outboxes(seen, slot=slot)}


CAPTURE: Checks[CaptureFunctionFacts] = {"capture-function": capture_function}
RIGHTS: Checks[Rights] = {"grants": grants}
OPERATORS: Checks[Operators] = {"operators": operators}
ROW_SECURITY: Checks[RowSecurity] = {"row-security": row_security}
READERS: Checks[DataReaders] = {"readers": readers}
CREATORS: Checks[Creators] = {"creators": creators}
SENDERS: Checks[Senders] = {"message-senders": senders}
NUMBERING: Checks[Numbering] = {"sequence": sequence}
ASTRAY: Checks[Astray] = {"shards": shards}
SHARDS_HELD: Checks[ShardHolders] = {"shard-holders": shard_holders}
TABLE: Checks[TableFacts] = {"autovacuum": autovacuum}
UNHANDLED: Checks[Unhandled] = {"unhandled": unhandled}
BACKLOG: Checks[Backlog] = {"backlog": backlog, "dead": dead, "due-later": due_later, "barriers": barriers,
                            "paused": paused}  # fmt: skip
LOCAL: Checks[Subject] = {"handlers": handlers, "config": config}
