"""What a check finds: its severity, what was read, and the remedy. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TypeVar

T = TypeVar("T")


class Severity(StrEnum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"
    UNKNOWN = "unknown"
    """The facts could not be read: neither good nor bad."""
    SKIP = "skip"
    """There is nothing to check, or another check reports it."""


@dataclass(frozen=True, slots=True)
class Finding:
    """``sql``: statements that fix it, each on one line, for a superuser or the owner of the object.

    ``remedy``: what SQL cannot do, or not alone: a command, a restart, a decision. Both are empty where nothing needs
    to be done. ``script``: SQL that does the same as the remedy's command, where it is too long to be shown.
    """

    severity: Severity
    detail: str
    remedy: str = ""
    sql: tuple[str, ...] = ()
    script: str = ""
    check: str = ""

    @property
    def remedies(self) -> list[str]:
        """All remedies, a line each."""
        return [*self.sql, *([self.remedy] if self.remedy else [])]


def ok(detail: str) -> Finding:
    return Finding(Severity.OK, detail)


def warn(detail: str, remedy: str = "", *sql: str) -> Finding:
    return Finding(Severity.WARN, detail, remedy, sql)


def fail(detail: str, remedy: str = "", *sql: str) -> Finding:
    return Finding(Severity.FAIL, detail, remedy, sql)


def unknown(why: str, remedy: str = "", *sql: str) -> Finding:
    return Finding(Severity.UNKNOWN, why, remedy, sql)


def skip(why: str) -> Finding:
    return Finding(Severity.SKIP, why)


@dataclass(frozen=True, slots=True)
class Unknown:
    """Takes a fact's place when it could not be read."""

    why: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Absent:
    """Takes a fact's place when there is nothing to read."""

    why: str


Checks = Mapping[str, Callable[[T], Finding]]
"""By their ids. All checks of one mapping judge the same facts."""


def run_checks(facts: T | Unknown | Absent, checks: Checks[T]) -> Iterable[Finding]:
    """One finding of each check, in order; without facts each finding says why."""
    for check, look in checks.items():
        yield replace(_run_check(facts, look), check=check)


def _run_check(facts: T | Unknown | Absent, look: Callable[[T], Finding]) -> Finding:
    if isinstance(facts, Unknown):
        return unknown(facts.why, facts.remedy)
    return skip(facts.why) if isinstance(facts, Absent) else look(facts)
