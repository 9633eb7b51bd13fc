"""``[subscription.NAME]`` in cdc.toml: several consumers in one process, each of a subscription. Pure.

A section has what differs for its subscription; everything else is as for all. What a process has once (the database,
the slot, the port, the log) stands above the sections. Handlers are never shared: those above the sections are the
default subscription's, as ``[subscription.default]`` would say it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cdc.app.config import SETTINGS, Given, Resolved, flattened, resolve
from cdc.core.errors import UsageError
from cdc.core.subscription import DEFAULT, check_name

_OF_PROCESS = ("dsn", "stream_dsn", "schema", "subscription", "observe", "stream", "retention", "drain_time")
_SECTIONS_OF_PROCESS = ("slot.", "http.", "log.", "whatsapp.")
_HANDLED_BY = ("handlers", "only", "except")
"""With deliver.*: what says who handles a subscription's changes, and which."""


def consumers(resolved: Resolved) -> list[Resolved]:
    """The settings of each consumer of the process. Raises UsageError.

    One that is asked for by --subscription or CDC_SUBSCRIPTION runs alone, with its section if it has one.
    """
    if not resolved.sections:
        return [resolved]
    for_all = {name: each for name, each in resolved.given.items() if not _handles(name)}
    above = {name: each for name, each in resolved.given.items() if _handles(name)}
    sections = {name: _section(name, section) for name, section in resolved.sections.items()}
    if "subscription" in for_all:
        name = resolved.settings.subscription
        asked = {name: each for name, each in above.items() if not each[1].startswith(f"{name} in ")}
        return [_as_found(resolved, {**for_all, **sections.get(name, {} if name != DEFAULT else above), **asked})]
    if above:
        if DEFAULT in sections:
            raise UsageError(
                f"{min(above)} is set for the default subscription twice", hint=f"in [subscription.{DEFAULT}], or above"
            )
        sections = {DEFAULT: above, **sections}
    found = []
    for name, section in sections.items():
        if not {"handlers", "deliver.to"} & section.keys():
            raise UsageError(f"[subscription.{name}] names no handlers", hint='handlers = "package.module:router"')
        found.append(_as_found(resolved, {**for_all, **section, "subscription": (name, f"[subscription.{name}]")}))
    return found


def _as_found(resolved: Resolved, given: Given) -> Resolved:
    """Where the file was found stays known: its handlers are code."""
    return replace(resolve(given), warnings=resolved.warnings, found=resolved.found)


def _section(name: str, section: Any) -> Given:
    if name != DEFAULT:
        check_name(name)
    where = f"[subscription.{name}]"
    if not isinstance(section, Mapping):
        raise UsageError(f"{where} is no section", hint=f'{where} and then handlers = "package.module:router"')
    given = {key: (value, f"{key} in {where}") for key, value in flattened(section, where)}
    for key in given:
        if key in _OF_PROCESS or key.startswith(_SECTIONS_OF_PROCESS):
            raise UsageError(f"{key} in {where} is one for the whole process", hint=f"set {key} above the sections")
    return given


def _handles(name: str) -> bool:
    return name in _HANDLED_BY or name.startswith("deliver.")


assert all(name in SETTINGS for name in (*_OF_PROCESS, *_HANDLED_BY))
