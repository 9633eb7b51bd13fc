"""A change as a CloudEvent 1.0, and the content of a request: one event, or a batch. Pure.

The JSON format in structured mode, with two of the documented extensions: ``partitionkey`` is the key within which
order is kept, ``sequence`` the number of capture. The latter is padded, because it is compared as text. It is not an
integer of the specification, which has 32 bits.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC
from decimal import Decimal
from functools import lru_cache
from typing import Any
from urllib.parse import quote
from uuid import uuid5

from cdc.core.fast_change import Json, document
from cdc.core.model import Change


@dataclass(frozen=True, slots=True)
class OutgoingRequest:
    """The content of one request. ``id`` is the same whenever the same content is sent again."""

    id: str
    content_type: str
    body: bytes


def single(change: Change, source: str | None) -> OutgoingRequest:
    return OutgoingRequest(str(change.id), "application/cloudevents+json", event(change, source))


def batch(changes: Sequence[Change], source: str | None) -> OutgoingRequest:
    return OutgoingRequest(
        # Version 5: made from the content, the ids in their order.
        str(uuid5(changes[0].id, ",".join(str(change.id) for change in changes))),
        "application/cloudevents-batch+json",
        b"[" + b",".join(event(change, source) for change in changes) + b"]",
    )


def event(change: Change, source: str | None) -> bytes:
    """The change in the JSON format. ``source`` of None: the table it happened in.

    The documents are passed on as stored, so that no digit of a number is lost.
    """
    attributes = {
        "specversion": "1.0",
        "id": str(change.id),
        "source": source or _table(change.table_schema, change.table),
        "type": f"cdc.{change.entity_type}.{change.operation.lower()}",
        "subject": change.entity_id,
        "time": change.changed_at.astimezone(UTC).isoformat().replace("+00:00", "Z"),
        "datacontenttype": "application/json",
        "partitionkey": f"{change.entity_type}/{change.entity_id}",
        "sequence": f"{change.seq:019d}",
        "attempt": change.attempt,
        "depth": change.depth,
        "causedby": str(change.caused_by) if change.caused_by else None,
        "replayof": str(change.replay_of) if change.replay_of else None,
    }
    data = {
        "entity_type": change.entity_type,
        "entity_id": change.entity_id,
        "operation": change.operation,
        "table_schema": change.table_schema,
        "table": change.table,
    }
    documents = "".join(f',"{name}":{_text(document(change, name))}' for name in ("old", "new", "metadata"))
    # An attribute without a value is left out: none may be null, nor may a subject be empty.
    head = _json({name: value for name, value in attributes.items() if value not in (None, "")})
    return f'{head[:-1]},"data":{_json(data)[:-1]}{documents}}}}}'.encode()


@lru_cache
def _table(schema: str | None, table: str) -> str:
    return (f"/schemas/{quote(schema, safe='')}" if schema else "") + f"/tables/{quote(table, safe='')}"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _text(value: Any) -> str:
    """The stored text; for a change made by hand, or already parsed, JSON with the same digits."""
    match value:
        case Json():
            return value.decode()
        case Decimal() if value.is_finite():
            return str(value)
        case dict():
            return "{" + ",".join(f"{_json(str(name))}:{_text(each)}" for name, each in value.items()) + "}"
        case list() | tuple():
            return "[" + ",".join(map(_text, value)) + "]"
        case _:
            return _json(value)
