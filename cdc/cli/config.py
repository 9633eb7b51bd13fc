"""cdc config: which settings are in force, and where each comes from."""

from __future__ import annotations

import json
from typing import Any

import click
from pydantic import SecretStr

from cdc.app.config import SETTINGS, Resolved, Settings
from cdc.app.sections import consumers
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
    shown = {name: (_shown(name, resolved.value(name)), source) for name, source in resolved.sources.items()}
    sections = {each.settings.subscription: _differing(resolved, each) for each in consumers(resolved)}
    if as_json:
        print_json({"settings": _with_sources(shown), "subscriptions": {
            name: _with_sources(section) for name, section in sections.items()}})  # fmt: skip
        return
    rows = [(name, value, source) for name, (value, source) in shown.items()]
    for subscription, section in sections.items():
        rows += [(f"{subscription}: {name}", value, source) for name, (value, source) in section.items()]
    print_table(["setting", "value", "source"], ((name, _in_a_cell(value), source) for name, value, source in rows))


_Sourced = dict[str, tuple[Any, str]]
"""Setting to (value as it is shown, source)."""


def _differing(above: Resolved, one: Resolved) -> _Sourced:
    """What a section of a subscription says."""
    return {
        name: (_shown(name, one.value(name)), source)
        for name, (_, source) in one.given.items()
        if above.given.get(name) != one.given[name] and name != "subscription"
    }


def _with_sources(shown: _Sourced) -> dict[str, dict[str, Any]]:
    return {name: {"value": value, "source": source} for name, (value, source) in shown.items()}


@config.command()
def schema() -> None:
    """Print the JSON Schema of cdc.toml, for editors."""
    schema = Settings.model_json_schema()
    name = schema["properties"]["subscription"]
    section = {"type": "object", "additionalProperties": {"type": "object"}}
    schema["properties"]["subscription"] = {"anyOf": [name, section], "description": name["description"]}
    put_script(json.dumps(schema, indent=2))


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
