"""cdc whatsapp smoke: one reaction goes all the way, on a live installation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from cdc.app.config import Resolved
from cdc.cli.doctor import print_findings, subject_of
from cdc.cli.options import json_option, open_database, resolved_options
from cdc.cli.output import paint, print_json, put, say

if TYPE_CHECKING:
    from cdc.contrib.whatsapp.smoke import SmokeStep
    from cdc.diagnostics.findings import Finding

_MARKS = {True: ("✓", "green"), False: ("✗", "red"), None: ("-", None)}


@click.command()
@resolved_options(
    "dsn", "stream_dsn", "schema", "handlers", "slot.name", "slot.create", "slot.plugin", "slot.mode", "stream"
)
@click.option("--emoji", help="Of the reaction [one whose rules create tasks and do nothing else].")
@click.option("--timeout", "timeout_s", type=click.FloatRange(min=0.1), default=10.0, show_default=True,
              metavar="SECONDS", help="For all of it, from the commit on.")  # fmt: skip
@json_option
def smoke(resolved: Resolved, emoji: str | None, timeout_s: float, as_json: bool) -> None:
    """Send one test reaction all the way: captured, woken, processed, task created.

    For the tables of "cdc db install --with whatsapp". It writes a reaction of the user cdc-smoke in the chat
    cdc-smoke, and removes it afterwards, with its task and their changes, also after Ctrl-C. The task's notification
    goes to that chat. Run it as the owner of the tables. Exit 1 if a step fails, with what cdc doctor finds.
    """
    from cdc.contrib.whatsapp.smoke import Smoke  # noqa: PLC0415 - --help does not wait for the driver to load

    settings = resolved.settings
    with open_database(settings) as connection:
        probe = Smoke(connection, settings.schema_, slot=settings.slot.name, timeout_s=timeout_s)
        chosen = emoji or probe.emoji()
        try:
            steps = probe.run(chosen)
            if not as_json:
                _print_steps(steps)
        finally:
            removed = probe.clean_up()
        failed = any(step.ok is False for step in steps)
        idle = failed and probe.no_consumer_works()
    findings = _causes(resolved, idle=idle) if failed else []
    if as_json:
        plain = [{"id": found.check, "severity": found.severity, "detail": found.detail, "remedies": found.remedies}
                 for found in findings]  # fmt: skip
        print_json({"ok": not failed, "emoji": chosen, "steps": [asdict(step) for step in steps],
                    "removed_changes": removed, "findings": plain})  # fmt: skip
    elif findings:
        say("what cdc doctor finds:")
        print_findings(findings)
    click.get_current_context().exit(int(failed))


def _print_steps(steps: Sequence[SmokeStep]) -> None:
    for step in steps:
        mark, colour = _MARKS[step.ok]
        put(paint(mark, colour), f" {step.name:<9}  {_time(step.after_s):>8}  {step.detail}")


def _time(after_s: float | None) -> str:
    return "" if after_s is None else f"{after_s * 1000:.0f} ms"


def _causes(resolved: Resolved, *, idle: bool) -> list[Finding]:
    """What fails, and what is not as it should be, the failures first; above all that no consumer runs."""
    from cdc.diagnostics.doctor import examine  # noqa: PLC0415 - see smoke
    from cdc.diagnostics.findings import Finding, Severity  # noqa: PLC0415 - see smoke

    missing = Finding(Severity.FAIL, "no consumer is running", "start one: cdc run --handlers ...", check="consumers")
    findings = [*([missing] if idle else []), *examine(subject_of(resolved))]
    return [found for severity in (Severity.FAIL, Severity.WARN) for found in findings if found.severity == severity]
