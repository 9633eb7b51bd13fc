"""Printing: data to stdout, talk to stderr. All that a command prints goes through here, and comes out printable.

Names of tables, types, keys, roles, slots and programs are other people's text, and a terminal obeys what is in it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import click

from cdc.core.errors import RefusedError
from cdc.core.fast_change import Json
from cdc.core.lsn import Lsn
from cdc.core.printable import printable, printable_json, printable_lines

JSON_SCHEMA = 1
"""Raised when a field is renamed or removed; new fields do not raise it."""

_GAP = "  "


class Painted(str):
    """Printable text with the codes of a colour around it."""

    __slots__ = ()


def put(*parts: str) -> None:
    """One line of data: these parts, one after the other."""
    click.echo("".join(part if isinstance(part, Painted) else printable(part) for part in parts))


def put_script(text: str) -> None:
    """Lines for a program, such as psql: as they are, but on a terminal printable."""
    click.echo(printable_lines(text) if sys.stdout.isatty() else text, nl=not text.endswith("\n"))


def print_table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Aligned columns; a column of numbers is aligned to the right. None is ``-``."""
    rows = [tuple(row) for row in rows]
    texts = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(line[column]) for line in (list(headers), *texts)) for column in range(len(headers))]
    numeric = [bool(rows) and all(_is_number(row[column]) for row in rows) for column in range(len(headers))]
    put(paint(_line(headers, widths, numeric), bold=True))
    for line in texts:
        put(_line(line, widths, numeric))


def _line(cells: Sequence[str], widths: Sequence[int], numeric: Sequence[bool]) -> str:
    columns = zip(cells, widths, numeric, strict=True)
    return _GAP.join(cell.rjust(width) if right else cell.ljust(width) for cell, width, right in columns).rstrip()


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool | Lsn)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return printable(_time(value) if isinstance(value, datetime) else str(value))


def print_json(data: Mapping[str, Any]) -> None:
    """One object with ``"schema": 1``. Times become ISO 8601 in UTC, LSNs and UUIDs text, Json is in it as it is."""
    if "schema" in data:
        raise ValueError('"schema" is the version of the output; call the database schema "schema_name"')
    documents: dict[str, str] = {}
    text = json.dumps({"schema": JSON_SCHEMA, **_plain(data, documents)}, indent=2, ensure_ascii=False)
    for place, document in documents.items():
        text = text.replace(json.dumps(place), document)
    click.echo(printable_json(text))


def _plain(value: Any, documents: dict[str, str]) -> Any:
    """``documents``: gets what is to be put in the places of texts that occur nowhere else."""
    match value:
        case Json():
            place = str(uuid4())
            documents[place] = value.decode()
            return place
        case None | bool() | int() | float() if not isinstance(value, Lsn):
            return value
        case datetime():
            return _time(value)
        case Mapping():
            return {str(name): _plain(item, documents) for name, item in value.items()}
        case list() | tuple() | set() | frozenset():
            return [_plain(item, documents) for item in value]
        case _:
            return str(value)


def _time(value: datetime) -> str:
    return value.astimezone(UTC).isoformat().replace("+00:00", "Z")


def say(text: str) -> None:
    """Tell the operator something that is not data, on one line."""
    click.echo(printable(text), err=True)


def show_progress(line: str) -> None:
    """Tell the operator how far it is: on a terminal in the place of the line before, "" to remove it."""
    if sys.stderr.isatty():
        click.echo(f"\r\x1b[K{printable(line)}", err=True, nl=False)
    elif line:
        say(line)


def say_lines(text: str) -> None:
    """The same of what has lines by right."""
    click.echo(printable_lines(text), err=True)


def paint(text: str, colour: str | None = None, *, bold: bool | None = None) -> Painted:
    """``text`` in a colour, where stdout is a terminal and NO_COLOR is not set (https://no-color.org)."""
    plain = not sys.stdout.isatty() or bool(os.environ.get("NO_COLOR"))
    return Painted(printable(text) if plain else click.style(printable(text), fg=colour, bold=bold))


def confirm(what: str, yes: bool) -> None:
    """Ask before ``what`` is done ("drop slot cdc"); --yes answers. Raises RefusedError unless the answer is yes.

    Never asks off a terminal: a script that hangs at a question is worse than one that fails.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise RefusedError(f"{what}: not without a confirmation", hint="add --yes")
    if not click.confirm(f"{printable(what)}?", err=True):
        raise RefusedError(f"{what}: not confirmed, nothing was changed")
