"""cdc doctor: every precondition, each with its remedy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cdc.app.config import SETTINGS, Resolved, Settings
from cdc.app.documents import finding_document
from cdc.app.sections import consumers
from cdc.cli.options import json_option, resolved_options
from cdc.cli.output import paint, print_json, put, put_script, say
from cdc.cli.wanted import WANTED_SETTINGS, handled_types
from cdc.core.errors import CdcError

if TYPE_CHECKING:
    from cdc.diagnostics.facts import Subject
    from cdc.diagnostics.findings import Finding

_REMEDY_INDENT = "        "
_COLOURS = {"fail": "red", "warn": "yellow", "ok": "green", "unknown": "yellow"}


@click.command()
@resolved_options(
    "dsn", "stream_dsn", "schema", *WANTED_SETTINGS, "slot.name", "slot.create", "slot.plugin", "slot.mode", "stream",
    "timeout", "retention", "deliver.user", "deliver.password",
)  # fmt: skip
@click.option("--fix", is_flag=True, help="Print the SQL that fixes what SQL can fix, and run nothing.")
@click.option("--strict", is_flag=True, help="Exit 1 on warnings too.")
@json_option
def doctor(resolved: Resolved, fix: bool, strict: bool, as_json: bool) -> None:
    """Check whatever "cdc run" needs, and say how to fix it.

    Run it with the settings, the environment and the role of the consumer. It changes nothing: to prove that the output
    plugin works it makes a temporary slot, which ends with it. Exit 1 if a check fails or is unknown.

    \b
        cdc doctor --fix > fix.sql; psql -f fix.sql       # as a superuser, after reading it
    """
    from cdc.app.delivery import examine as examine_broker  # noqa: PLC0415 - as below
    from cdc.diagnostics.doctor import examine  # noqa: PLC0415 - --help does not wait for the driver to load
    from cdc.diagnostics.findings import Severity  # noqa: PLC0415 - see above
    from cdc.diagnostics.fix_script import script  # noqa: PLC0415 - see above

    findings = examine(subject_of(resolved))
    if (found := examine_broker(resolved.settings)) is not None:
        findings.append(replace(found, check="broker"))
    if fix:
        put_script(script(findings))
    elif as_json:
        print_json({"findings": [finding_document(found) for found in findings]})
    else:
        print_findings(findings)
    _say_sum(findings)
    bad = (Severity.FAIL, Severity.UNKNOWN, *([Severity.WARN] if strict else []))
    click.get_current_context().exit(int(any(found.severity in bad for found in findings)))


def subject_of(resolved: Resolved) -> Subject:
    from cdc.diagnostics.facts import Subject  # noqa: PLC0415 - see doctor

    settings = resolved.settings
    asked, handlers_error = None, None
    try:
        asked = handled_types(resolved)
        for each in consumers(resolved):  # what a section says is as needed as what stands above them
            handled_types(each)
    except CdcError as error:
        handlers_error = (str(error), error.hint)
    return Subject(
        dsn=settings.dsn_text,
        stream_dsn=settings.stream_dsn_text,
        schema=settings.schema_,
        slot=settings.slot.name,
        plugin=settings.slot.plugin,
        temporary=settings.slot.mode == "temporary",
        creates_slot=settings.slot.create,
        streams=settings.stream,
        prunes=settings.retention_s is not None,
        handler_timeout_s=settings.timeout_s,
        handles=asked.handles if asked else None,
        scope=asked.scope if asked else None,
        handlers_error=handlers_error,
        exposed_files=_exposed_files(resolved, settings),
    )


def _exposed_files(resolved: Resolved, settings: Settings) -> tuple[str, ...]:
    """Settings files with a DSN in them that everybody on this machine may read.

    Not those of CDC_DSN_FILE: mounted secrets are made so, in a container without other users.
    """
    sources = [resolved.sources[name] for name, setting in SETTINGS.items() if setting.secret]
    files = {source.partition(" in ")[2] for source in sources} - {""}
    return tuple(sorted(file for file in files if _is_open(Path(file))))


def _is_open(file: Path) -> bool:
    try:
        return bool(file.stat().st_mode & 0o004)
    except OSError:
        return False


def print_findings(findings: Sequence[Finding]) -> None:
    width = max(len(found.check) for found in findings)
    for found in findings:
        put(paint(f"{found.severity:<7}", _COLOURS.get(found.severity)), f" {found.check:<{width}}  {found.detail}")
        for line in found.remedies:
            put(f"{_REMEDY_INDENT}{line}")


def _say_sum(findings: Sequence[Finding]) -> None:
    counts = {
        severity: sum(found.severity == severity for found in findings)
        for severity in ("fail", "warn", "unknown", "skip")
    }
    said = [f"{count} {severity}" for severity, count in counts.items() if count]
    say(f"{len(findings)} checks: {', '.join(said) if said else 'all ok'}")
