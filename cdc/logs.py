"""Log lines on stderr, for people (text) or for a collector (JSON), times in UTC.

What a line is about goes into ``extra`` and comes out as ``key=value`` or as a field of the object:
``log.info("slot created", extra={"slot": name})``. No row content, no DSN; the mask is a net below that rule.
"""

from __future__ import annotations

import json
import logging
import re
from datetime import UTC, datetime
from typing import Any, TextIO

_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}
_PASSWORD = re.compile(
    r"(\w*passw(?:or)?d[\"']?\s*[=:]\s*)(?:'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|\S+)", re.IGNORECASE
)
# Greedy to the last @: a password that holds one itself is the case to guard against.
_URL_USER = re.compile(r"(://[^:/@\s]*):\S*@")


def setup(level: str, line_format: str, stream: TextIO | None = None) -> None:
    """Send all logging of the process to ``stream`` (stderr). ``line_format`` is "text" or "json"."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines() if line_format == "json" else TextLines())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(capture=True)


def mask(text: str) -> str:
    """``text`` with the passwords of DSNs and URLs in it replaced."""
    return _URL_USER.sub(r"\1:***@", _PASSWORD.sub(r"\1***", text))


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    return {name: value for name, value in record.__dict__.items() if name not in _STANDARD}


class TextLines(logging.Formatter):
    """``2026-01-31T12:00:00.000Z INFO cdc.app started slot=cdc``"""

    def format(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {name}={_quoted(str(value))}" for name, value in _fields(record).items())
        line = f"{_time(record)} {record.levelname} {record.name} {_one_line(record.getMessage())}{fields}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return mask(line)


class JsonLines(logging.Formatter):
    """One object a line: time, level, logger, message, the extra fields, and exception where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {name: _masked(value) for name, value in _fields(record).items()}
        line |= {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": mask(record.getMessage()),
        }
        if record.exc_info:
            line["exception"] = mask(self.formatException(record.exc_info))
        return json.dumps(line, ensure_ascii=False)


def _one_line(text: str) -> str:
    # An entity id is the writer's; one with a line break in it must not forge a line.
    return text.replace("\r", "\\r").replace("\n", "\\n")


def _quoted(value: str) -> str:
    return value if value.isprintable() and value and not set(value) & set(" \"'=") else json.dumps(value)


def _masked(value: object) -> object:
    return value if value is None or isinstance(value, bool | int | float) else mask(str(value))
