"""docs/reference/settings.md, from ``cdc.app.config``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import groupby

from cdc.app.config import SETTINGS, Setting
from tests.reference.markdown import WRITTEN, code, table

_HEAD = f"""\
# Settings

{WRITTEN}
A setting has one name and three places: an option of the command line, a variable, and a line of `cdc.toml`. The first
place that names it counts, in this order: command line, variables, `cdc.toml` in the current folder (or the file that
`--config` or `CDC_CONFIG` names), default. A name that is no setting is refused, with the nearest one that is.

Times are seconds. A switch is `yes` or `no`; as an option it is `--stream` or `--no-stream`. A list is an option that
is given again, names with commas between them in a variable, and a list in the file. `cdc config show` prints each
setting with its value and where it came from. A secret may be in a file instead: `CDC_DSN_FILE` names the file of
`CDC_DSN`, and is read again when it changes.

A section `[subscription.NAME]` of the file has settings for one of [several subscriptions in one
process](../guides/subscriptions.md#several-in-one-process). They count before all others for that subscription.
"""
_SECTIONS = {
    "": "General",
    "deliver": "Delivery over HTTP or to a broker",
    "slot": "The slot",
    "http": "Metrics, health and page",
    "backoff": "Backoff",
    "ui": "The web interface",
    "log": "Log",
    "whatsapp": "The WhatsApp application",
}
_GUIDES = {
    "ui.host": "../guides/web-interface.md#who-may-what",
    "handlers_dsn": "../operations/server.md",
    "handlers": "../guides/handlers.md",
    "only": "../guides/many-consumers.md#some-entity-types-only",
    "except": "../guides/many-consumers.md#some-entity-types-only",
    "unhandled": "../guides/handlers.md#which-handler-gets-a-change",
    "observe": "../guides/shadow-mode.md",
    "concurrency": "../operations/server.md#sizing",
    "transactions": "../guides/transactions.md",
    "window_bytes": "../operations/bounds.md",
    "max_attempts": "../guides/handlers.md#how-an-attempt-ends",
    "max_chain_depth": "../guides/handlers.md#chain-reactions",
    "drain_time": "../guides/handlers.md#at-a-stop",
    "retention": "../operations/retention.md",
    "deliver.to": "../guides/http-delivery.md",
    "deliver.format": "../guides/brokers.md#what-is-sent",
    "deliver.user": "../guides/brokers.md#login-and-tls",
    "slot.name": "../operations/slot.md",
    "http.page": "../operations/monitoring.md#the-page-and-cdc-status",
    "log.format": "../operations/runbook.md#log-lines",
}
"""Where more is said than what the setting is."""
_EXAMPLES = {
    "ui.hosts": ["ops.example.com"],
    "ui.proxy_header": "X-Forwarded-User",
    "ui.proxy_networks": ["10.1.2.0/24"],
    "dsn": "host=db.example.com dbname=shop user=cdc",
    "stream_dsn": "host=db.example.com dbname=shop user=cdc_stream",
    "handlers_dsn": "host=pooler.example.com dbname=shop user=cdc",
    "handlers": "handlers:router",
    "only": ["order"],
    "except": ["audit"],
    "deliver.to": "http://127.0.0.1:3000/changes",
    "deliver.types": ["order"],
    "deliver.batch": 500,
    "deliver.source": "/shop",
    "deliver.user": "cdc",
    "http.hosts": ["cdc.example.com"],
}
"""Of what has no default."""
_FILE = """\
## A whole cdc.toml

Every setting with its default; a line with `#` has none. Left out are the WhatsApp application and the secrets of
deliveries, which belong into files. `cdc config schema` prints a JSON Schema, from which editors complete and check
the file.

```toml
{lines}
```
"""


def page() -> str:
    parts = [_HEAD]
    for section, settings in _by_section():
        where = f"In `cdc.toml` in the section `[{section}]`.\n\n" if section else ""
        rows = [_row(setting) for setting in settings]
        parts.append(f"\n## {_SECTIONS[section]}\n\n{where}" + table(["variable", "option", "default", ""], rows))
    return "".join(parts) + "\n" + _FILE.format(lines="\n".join(_toml()))


def _by_section() -> Iterator[tuple[str, list[Setting]]]:
    def section(setting: Setting) -> str:
        return setting.name.rpartition(".")[0]

    for name, settings in groupby(
        sorted(SETTINGS.values(), key=lambda one: list(_SECTIONS).index(section(one))), section
    ):
        yield name, list(settings)


def _row(setting: Setting) -> list[str]:
    text = setting.description
    if setting.secret:
        text += f" May be in a file: `{setting.variable}_FILE`."
    if guide := _GUIDES.get(setting.name):
        text += f" [More]({guide})"
    option = setting.option.replace("--", "--[no-]", 1) if setting.switch else setting.option
    return [code(setting.variable), code(option), _default(setting), text]


def _default(setting: Setting) -> str:
    if setting.default is None:
        return ""
    if setting.switch:
        return "`yes`" if setting.default else "`no`"
    return code(f"{setting.default:g}" if isinstance(setting.default, float) else setting.default)


def _toml() -> Iterator[str]:
    for section, settings in _by_section():
        if section == "whatsapp":
            continue
        if section:
            yield from ("", f"[{section}]")
        for setting in settings:
            if setting.secret and setting.name not in _EXAMPLES:
                continue
            value = _EXAMPLES.get(setting.name, setting.default)
            shown = f"{value:g}" if isinstance(value, float) else json.dumps(value)
            given = setting.default is not None or setting.name in {"dsn", "handlers"}
            yield f"{'' if given else '# '}{setting.name.rpartition('.')[2]} = {shown}"
