"""docs/reference/cli.md, from the commands."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

import click

from cdc.app.config import SETTINGS
from cdc.cli import cdc as root
from tests.reference.markdown import WRITTEN, code, prose, table

_HEAD = f"""\
# Commands

{WRITTEN}
Data goes to stdout, everything else to stderr; what prints data takes `--json`. Whatever destroys something asks
first; without a terminal it needs `--yes`. One exception: `cdc outbox prune` does not ask, because `--older-than` is
explicit enough. `cdc COMMAND --help` prints what stands here.

| exit code | |
|---|---|
| 0 | fine. `cdc run` ends with it after SIGTERM, SIGHUP or Ctrl-C |
| 1 | findings, or a failure |
| 2 | usage: options, settings, a reference to handlers |
| 3 | the database cannot be reached. `cdc run` ends with it only at its first connection; later it connects again |
| 4 | not found: a slot, a table, a change |
| 5 | refused for safety |
| 128 + N | ended by the signal N: 130 after Ctrl-C |
"""
_SHARED = {setting.option for setting in SETTINGS.values()}


def page() -> str:
    return _HEAD + "".join(_entry(context) for context in _all(root, "cdc", None))


def _all(command: click.Command, name: str, parent: click.Context | None) -> Iterator[click.Context]:
    """The command, and all below it, each in the context that it runs in: commands remember what a context says."""
    context = click.Context(command, parent=parent, info_name=name, **command.context_settings)
    yield context
    if isinstance(command, click.Group):
        for below in command.list_commands(context):
            found = command.get_command(context, below)
            if found is not None and not found.hidden:
                yield from _all(found, below, context)


def _entry(context: click.Context) -> str:
    command, path = context.command, context.command_path
    usage = " ".join([path, *command.collect_usage_pieces(context)])
    parts = [f"\n## {path}\n", f"```text\n{usage}\n```\n", *_help(command)]
    own, settings = list[tuple[str, str]](), list[tuple[str, str]]()
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is None or "--help" in record[0]:
            continue
        is_setting = path != "cdc run" and bool(_SHARED.intersection(parameter.opts))
        (settings if is_setting else own).append((record[0], " ".join(record[1].split())))
    if isinstance(command, click.Group):
        found = [(name, command.get_command(context, name)) for name in command.list_commands(context)]
        rows = [[_link(f"{path} {name}"), each.get_short_help_str(1_000)] for name, each in found if each]
        parts.append(table(["command", ""], rows))
    if own:
        parts.append(table(["option", ""], [[code(names), text] for names, text in own]))
    if settings:
        names = ", ".join(code(names) for names, _ in settings)
        parts.append(f"[Settings](settings.md): {names}.\n")
    return "\n".join(parts)


def _link(path: str) -> str:
    return f"[`{path}`](#{path.replace(' ', '-')})"


def _help(command: click.Command) -> Iterator[str]:
    """Paragraphs; what is indented is an example."""
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(command.help or "")):
        text = paragraph.removeprefix("\b").strip("\n")
        if not text.strip():
            continue
        if text.startswith("  "):
            yield f"```text\n{inspect.cleandoc(text)}\n```\n"
        else:
            yield prose(text).replace("*", "\\*").replace("<", "\\<") + "\n"
