"""Commands of `cdc` as one types them, each against a database."""

from __future__ import annotations

import json
from typing import Any

from click.testing import CliRunner, Result

from cdc.cli import cdc as root_command


def invoke(dsn: str, *arguments: str) -> Result:
    return CliRunner().invoke(root_command, [*arguments, "--dsn", dsn], catch_exceptions=False)


def done(dsn: str, *arguments: str) -> str:
    """What it says; it has to end well."""
    result = invoke(dsn, *arguments)
    assert result.exit_code == 0, result.output
    return result.output


def answer(result: Result) -> dict[str, Any]:
    """What a command with --json says; it has to end well."""
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    assert found.pop("schema") == 1
    return found


def refused(dsn: str, *arguments: str) -> str:
    """What it says; it has to fail."""
    result = invoke(dsn, *arguments)
    assert result.exit_code != 0, result.output
    return result.output


def tracked(dsn: str) -> dict[str, dict[str, Any]]:
    """What `cdc tracked` says of each table."""
    found = json.loads(done(dsn, "tracked", "--json"))["tracked"]
    return {each["table"]: each for each in found}
