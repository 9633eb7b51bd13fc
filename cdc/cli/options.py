"""Options that several commands share. Each setting of ``cdc.app.config`` can be an option of its own name."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import click

from cdc.app.config import SETTINGS, Resolved, Setting, Settings, load
from cdc.cli.output import say

if TYPE_CHECKING:
    from cdc.postgres.connect import Connection

Command = Callable[..., Any]


def resolved_options(*names: str) -> Callable[[Command], Command]:
    """An option for each named setting, and --config; the command gets ``resolved: Resolved``."""

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def merged(*args: Any, config_file: Path | None, **options: Any) -> Any:
            resolved = load({flat: options.pop(flat) for flat in flats}, file=config_file)
            for warning in resolved.warnings:
                say(f"Warning: {warning}")
            return command(*args, resolved=resolved, **options)

        flats = [SETTINGS[name].flat for name in names]
        with_options: Command = click.option(
            "--config", "config_file", type=click.Path(path_type=Path), help="Settings file (default: ./cdc.toml)."
        )(merged)
        for name in reversed(names):
            with_options = _option(name)(with_options)
        return with_options

    return decorate


def settings_options(*names: str) -> Callable[[Command], Command]:
    """As ``resolved_options``; the command gets ``settings: Settings``."""

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def unwrapped(*args: Any, resolved: Resolved, **options: Any) -> Any:
            return command(*args, settings=resolved.settings, **options)

        return resolved_options(*names)(unwrapped)

    return decorate


def _option(name: str) -> Callable[[Command], Command]:
    setting = SETTINGS[name]
    shown = "" if setting.default is None or setting.switch else f" [{_plain(setting.default)}]"
    declaration = f"{setting.option}/--no-{setting.option[2:]}" if setting.switch else setting.option
    # A missing switch must differ from one that is off: only for a missing one CDC_X applies.
    return click.option(
        declaration,
        setting.flat,
        default=None,
        metavar=_placeholder(setting),
        multiple=setting.repeats,
        callback=_or_none if setting.repeats else None,
        help=setting.description + (" May be repeated." if setting.repeats else "") + shown,
    )


def _or_none(_context: click.Context, _option: click.Parameter, given: tuple[str, ...]) -> tuple[str, ...] | None:
    return given or None


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


_REPEATED = {"http.hosts": "NAME", "ui.hosts": "NAME", "ui.proxy_networks": "NETWORK"}


def _placeholder(setting: Setting) -> str | None:
    if setting.switch:
        return None
    if get_origin(setting.kind) is Literal:
        return "|".join(get_args(setting.kind))
    words: dict[object, str] = {int: "N", int | None: "N", float: "SECONDS"}
    if setting.repeats:
        return _REPEATED.get(setting.name, "TYPE")
    if setting.name == "deliver.to":
        return "URL"
    return words.get(setting.kind, setting.name.split(".")[-1].split("_")[-1].upper())


database_options = settings_options("dsn", "schema")
"""--dsn, --schema and --config; the command gets ``settings: Settings``."""

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
"""The command gets ``as_json: bool``."""

yes_option = click.option("--yes", is_flag=True, help="Do not ask for a confirmation.")
"""The command gets ``yes: bool``, for ``output.confirm``."""


@contextmanager
def open_database(settings: Settings, *, user_path: bool = False) -> Iterator[Connection]:
    """An autocommit connection for one command, closed at its end. Raises ConnectError with the remedy.

    ``user_path``: with the role's own search_path, for a command that is given or shows names of tables.
    """
    from cdc.postgres.connect import connect  # noqa: PLC0415 - --help does not wait for the driver to load

    # Not the driver's context manager: it commits, which fails where Ctrl-C came in the middle of a statement.
    with closing(connect(settings.dsn_text, application_name="cdc command line", user_path=user_path)) as connection:
        yield connection
