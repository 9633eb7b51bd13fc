"""The remedies of the findings, as one SQL script. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from cdc.core.printable import printable
from cdc.diagnostics.findings import Finding, Severity

_HEAD = """\
-- What cdc doctor asks for. Read it, then run it with psql as a superuser, or as the owner of what it names.
-- Lines that begin with -- are for you to do. Then run cdc doctor again.
"""


def script(findings: Iterable[Finding]) -> str:
    """A script for psql; only comments where SQL can fix nothing."""
    given: set[str] = set()
    parts = [_HEAD]
    for found in findings:
        if found.severity in (Severity.FAIL, Severity.WARN, Severity.UNKNOWN):
            # Two checks may ask for the same statement.
            parts += _part(found, [statement for statement in found.sql if statement not in given])
            given |= set(found.sql)
    if any(statement.startswith("ALTER SYSTEM") for statement in given):
        parts.append("SELECT pg_reload_conf();\n")
    return "\n".join(parts)


def _part(found: Finding, statements: Iterable[str]) -> Iterator[str]:
    yield f"-- {found.check}: {_comment(found.detail)}"
    if found.remedy and not found.script:
        yield f"--   {_comment(found.remedy)}"
    yield from map(_runnable, statements)
    if found.script:
        yield found.script
    yield ""


def _comment(text: str) -> str:
    return printable(" ".join(text.split()))


def _runnable(statement: str) -> str:
    """A name with control characters must not reach the reader's terminal, and cannot be written in another way."""
    if statement.isprintable():
        return statement
    return f"-- By hand, for a name in it holds characters that cannot be shown: {printable(statement)}"
