"""Who acts and why, for the log of actions."""

from __future__ import annotations

import getpass
from typing import TYPE_CHECKING

import click

from cdc.core.errors import UsageError

if TYPE_CHECKING:
    from cdc.postgres.actions import Actor

BECAUSE_BYTES = 2_000

because_option = click.option("--because", metavar="TEXT", help="Why, for those who read cdc actions.")
"""The command gets ``because: str | None``, for ``actor``."""


def actor(because: str | None = None) -> Actor:
    """The user of this machine. Raises UsageError for a reason that is too long."""
    from cdc.postgres.actions import Actor  # noqa: PLC0415 - --help does not wait for the driver to load

    return Actor(user(), "cli", None if because is None else checked(because))


def checked(because: str) -> str:
    """A reason that says something. Raises UsageError."""
    said = because.strip()
    if not said or len(said.encode(errors="replace")) > BECAUSE_BYTES:
        raise UsageError("--because says nothing, or too much", hint=f"1 to {BECAUSE_BYTES} bytes")
    return said


def user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):
        return "unknown"
