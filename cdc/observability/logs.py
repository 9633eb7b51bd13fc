"""Log lines on stderr, for people (text) or for a collector (JSON), times in UTC.

The subject of a line goes into ``extra`` and comes out as ``key=value`` or as a field of the object:
``log.info("slot created", extra={"slot": name})``. What the message says already is for JSON only, ``in_message()``.
No row content, no DSN; the mask is a net below that rule.

Log texts are in part foreign, and of any length: each piece is cut, masked and made printable. Only a
traceback has several lines, all indented, so that none of them can look like a line of its own.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from math import isfinite
from typing import Any, TextIO

from cdc.core.masking import mask
from cdc.core.printable import cut, printable, printable_json, printable_lines

_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}
_MESSAGE_MAX, _FIELD_MAX, _TRACEBACK_MAX = 8_000, 2_000, 32_000
"""Bytes. Collectors split or refuse lines longer than some ten kB; the whole document is in the row."""
_MASKED_MAX = 64_000
"""Bytes that are masked before the cut, so that the cut does not part a password from its name."""
_INT_BITS = 1_000
_COMPOSED_MAX = 8_000
"""Bytes of a list or mapping as JSON; a longer one becomes text, and is cut."""
_IN_MESSAGE = "cdc_in_message"


def in_message(fields: Mapping[str, object]) -> dict[str, object]:
    """``extra`` of a record whose message has these in words: a text line has them once, a JSON line as fields too."""
    return {**fields, _IN_MESSAGE: frozenset(fields)}


def setup(level: str, line_format: str, stream: TextIO | None = None) -> None:
    """Send all logging of the process to ``stream`` (stderr). ``line_format`` is "text" or "json"."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines() if line_format == "json" else TextLines())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(capture=True)


def _masked(text: str, bytes_max: int) -> str:
    return cut(mask(cut(text, _MASKED_MAX)), bytes_max)


def _shown(text: str, bytes_max: int) -> str:
    return cut(printable(_masked(text, bytes_max)), bytes_max)


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    return {
        str(name): value for name, value in record.__dict__.items() if name not in _STANDARD and name != _IN_MESSAGE
    }


class TextLines(logging.Formatter):
    """``2026-01-31T12:00:00.000Z INFO cdc.app started slot=cdc``"""

    def format(self, record: logging.LogRecord) -> str:
        said = record.__dict__.get(_IN_MESSAGE)
        left = said if isinstance(said, frozenset) else ()
        fields = "".join(
            f" {name}={_quoted(_masked(_text(value), _FIELD_MAX))}"
            for name, value in _fields(record).items()
            if name not in left
        )
        message = _shown(record.getMessage(), _MESSAGE_MAX)
        line = f"{_time(record)} {record.levelname} {printable(record.name)} {message}{printable(fields)}"
        if record.exc_info:
            line += "\n" + printable_lines(_masked(self.formatException(record.exc_info), _TRACEBACK_MAX), indent="  ")
        return line


class JsonLines(logging.Formatter):
    """One object a line: time, level, logger, message, the extra fields, and any exception."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {name: _value(value) for name, value in _fields(record).items()}
        line |= {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _masked(record.getMessage(), _MESSAGE_MAX),
        }
        if record.exc_info:
            line["exception"] = _masked(self.formatException(record.exc_info), _TRACEBACK_MAX)
        return printable_json(json.dumps(line, ensure_ascii=False))


def _quoted(value: str) -> str:
    plain = value.isprintable() and value and not set(value) & set(" \"'=")
    return value if plain else printable_json(json.dumps(value, ensure_ascii=False))


def _value(value: object) -> object:
    """A value for JSON, which has neither NaN nor infinity; few readers take numbers of any length."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, float):
        return value if isfinite(value) else str(value)
    if isinstance(value, int):
        return value if value.bit_length() <= _INT_BITS else _masked(hex(value), _FIELD_MAX)
    if isinstance(value, list | tuple | dict):
        return _composed(value)
    return _masked(_text(value), _FIELD_MAX)


def _composed(value: object) -> object:
    """The value itself, if it is JSON, short, and holds nothing to mask; else as text."""
    try:
        text = json.dumps(value, allow_nan=False, default=str, ensure_ascii=False)
        if len(text.encode("utf-8", "surrogatepass")) <= _COMPOSED_MAX and mask(text) == text:
            return json.loads(text)
    except Exception:  # noqa: BLE001 - the value's class is foreign and may raise
        text = _text(value)
    return _masked(text, _FIELD_MAX)


def _text(value: object) -> str:
    """The text of a value, or a substitute: a value that cannot be shown must not lose the line."""
    try:
        return str(value)
    except Exception as error:  # noqa: BLE001 - a method of foreign code
        return f"cannot be shown: {type(error).__name__}"
