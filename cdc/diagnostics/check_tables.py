"""Checks of the captured tables and their triggers. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from cdc.diagnostics.facts import Captured, Subject
from cdc.diagnostics.findings import Checks, Finding, fail, ok, skip, warn
from cdc.postgres import remarks
from cdc.postgres.remarks import Remark
from cdc.postgres.tracked_tables import Tracked

_SHOWN = 5
_WELL = {
    remarks.ORDER: "no other AFTER ROW trigger fires before the one that captures",
    remarks.MISSED: "no child table, unlogged table, subscription or move between partitions that is not captured",
    remarks.TYPES: "no two tables share a type by their names",
    remarks.SCHEMAS: "every table that matches a pattern of --all-schemas is tracked",
    remarks.DDL: "none has its DDL captured by an event trigger that is missing or that others could misuse",
    remarks.VIRTUAL: "no virtual generated column is captured as null",
    remarks.CASTS: "no captured type has a cast to JSON that somebody else owns",
    remarks.HIDDEN: "no captured table has row level security",
    remarks.HANDLED: "no writer may keep changes from the handlers by cdc.handled",
}


def triggers(seen: Captured) -> Finding:
    if found := remarks.about(seen.remarks, remarks.TRIGGERS):
        return _said(fail, found)
    if not seen.triggers:
        return warn("no table is tracked: only publish_change() writes changes", "cdc track TABLE")
    unnamed = [each for each in seen.triggers if not each.entity_type]
    note = f"; {len(unnamed)} without a type, which a new name of its table would change: cdc track" if unnamed else ""
    return ok(f"captured: {_some(seen.tables)}{note}{_cheaper(seen.general)}")


def _cheaper(general: Sequence[Tracked]) -> str:
    """Nothing is wrong with these, so it is said beside what is well."""
    commands = [f"cdc track {each.table}{'' if each.ours else ' --replace'}" for each in general]
    return (
        f"; {len(commands)} by capture_entity_change(), and a function made for the table costs its writers less:"
        f" {_some(commands)}, as a superuser or the outbox's owner"
        if commands
        else ""
    )


def captured_twice(seen: Captured) -> Finding:
    if found := remarks.about(seen.remarks, remarks.TWICE):
        return _said(fail, found)
    return ok(f"none of {_tables(seen)}")


def _remarked(seen: Captured, *, topic: str) -> Finding:
    if found := remarks.about(seen.remarks, topic):
        return _said(warn, found)
    return ok(f"{_tables(seen)} looked at: {_WELL[topic]}")


def _said(severity: Callable[..., Finding], found: list[Remark]) -> Finding:
    more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    remedies = dict.fromkeys(remark.remedy for remark in found[:_SHOWN] if remark.remedy)
    statements = dict.fromkeys(statement for remark in found for statement in remark.sql)
    return severity("; ".join(remark.detail for remark in found[:_SHOWN]) + more, "; ".join(remedies), *statements)


def unrouted(seen: Captured, *, subject: Subject) -> Finding:
    handles = subject.handles
    if handles is None:
        return skip("no handlers are named here (--handlers, CDC_HANDLERS or --config)")
    types = {each.effective_type for each in seen.triggers}
    unwanted = sorted(
        {
            f"{each.effective_type} {operation}"
            for each in seen.triggers
            for operation in each.operations
            if not handles(each.effective_type, operation)
        }
    )
    if unwanted:
        return warn(
            f"captured, and no handler wants them: {_some(unwanted)}",
            "write a handler (@router.on), or capture less: cdc track TABLE --on ...",
        )
    if not types:
        return ok("nothing is captured by a trigger")
    return ok(f"a handler wants whatever is captured of {_some(sorted(types))}")


def _some(names: list[str] | tuple[str, ...]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}"


def _tables(seen: Captured) -> str:
    return "1 table" if len(seen.tables) == 1 else f"{len(seen.tables)} tables"


def of_captured(subject: Subject) -> Checks[Captured]:
    return {
        "triggers": triggers,
        "captured-twice": captured_twice,
        **{topic: partial(_remarked, topic=topic) for topic in remarks.OF_TABLES},
        "unrouted": lambda seen: unrouted(seen, subject=subject),
    }
