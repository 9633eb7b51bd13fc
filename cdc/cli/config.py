"""cdc config: which settings are in force, and where each comes from."""

from __future__ import annotations

import json
from typing import Any

import click
from pydantic import SecretStr

from cdc.app.config import SETTINGS, Resolved, Settings
from cdc.cli.commands import Commands
from cdc.cli.options import json_option, resolved_options
from cdc.cli.output import print_json, print_table, put_script
from cdc.core.masking import mask, without_query
from cdc.postgres.connect import describe


@click.group(cls=Commands)
def config() -> None:
    """Show the settings in force."""


@config.command()
@resolved_options(*SETTINGS)
@json_option
def show(resolved: Resolved, as_json: bool) -> None:
    """Print each setting, its value and its source. Secrets and the queries of URLs are left out.

    Takes the options of cdc run, and shows what it would run with.
    """
    shown = {name: _shown(name, resolved.value(name)) for name in SETTINGS}
    if as_json:
        settings = {name: {"value": value, "source": resolved.sources[name]} for name, value in shown.items()}
        print_json({"settings": settings})
    else:
        print_table(
            ["setting", "value", "source"],
            ((name, _in_a_cell(value), resolved.sources[name]) for name, value in shown.items()),
        )


@config.command()
def schema() -> None:
    """Print the JSON Schema of cdc.toml, for editors."""
    put_script(json.dumps(Settings.model_json_schema(), indent=2))


def _shown(name: str, value: Any) -> Any:
    if isinstance(value, SecretStr):
        return f"(secret) {describe(value.get_secret_value())}" if name.endswith("dsn") else "(secret)"
    if isinstance(value, str):
        return without_query(value) if "://" in value else mask(value)
    if isinstance(value, tuple):
        return tuple(_shown(name, each) for each in value)
    return value


def _in_a_cell(value: Any) -> Any:
    return ", ".join(value) if isinstance(value, tuple) else value
