"""A change as a CloudEvent 1.0: one event, a batch for one request, or attributes and data apart. Pure.

Structured mode is the JSON format; binary mode sends attributes and data apart. Two of the documented extensions:
``partitionkey`` is the key within which order is kept, ``sequence`` the number of capture. The latter is padded,
because it is compared as text. It is not an integer of the specification, which has 32 bits.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC
from decimal import Decimal
from functools import lru_cache
from typing import Any, NamedTuple
from urllib.parse import quote
from uuid import uuid5

from cdc.core.fast_change import Json, document
from cdc.core.model import Change

EVENT_TYPE, BATCH_TYPE = "application/cloudevents+json", "application/cloudevents-batch+json"
DATA_TYPE = "application/json"


@dataclass(frozen=True, slots=True)
class OutgoingRequest:
    """The content of one request. ``id`` is the same whenever the same content is sent again."""

    id: str
    content_type: str
    body: bytes


def single(change: Change, source: str | None) -> OutgoingRequest:
    return OutgoingRequest(str(change.id), EVENT_TYPE, event(change, source))


def batch(changes: Sequence[Change], source: str | None) -> OutgoingRequest:
    return OutgoingRequest(
        # Version 5: made from the content, the ids in their order.
        str(uuid5(changes[0].id, ",".join(str(change.id) for change in changes))),
        BATCH_TYPE,
        b"[" + b",".join(event(change, source) for change in changes) + b"]",
    )


def event(change: Change, source: str | None) -> bytes:
    """The change in the JSON format: its ``attributes`` and ``data``. ``source`` of None: the table it happened in.

    The documents are passed on as stored, so that no digit of a number is lost.
    """
    return structured(change, source, str(change.id), time(change), partition_key(change))


def structured(change: Change, source: str | None, id_: str, at: str, key: str) -> bytes:
    """The same for who has these three attributes already."""
    common = _common(change.entity_type, change.operation, change.table_schema, change.table, source)
    entity_id = _quoted(change.entity_id)
    more = f',"subject":{entity_id}' if change.entity_id else ""
    if change.caused_by:
        more += f',"causedby":"{change.caused_by}"'
    if change.replay_of:
        more += f',"replayof":"{change.replay_of}"'
    old, new = json_text(document(change, "old")), json_text(document(change, "new"))
    return (
        f'{{"specversion":"1.0","id":"{id_}",{common.origin},"time":"{at}","datacontenttype":"{DATA_TYPE}",'
        f'"partitionkey":{_quoted(key)},"sequence":"{change.seq:019d}","attempt":{change.attempt},'
        f'"depth":{change.depth}{more},"data":{{{common.entity_type},"entity_id":{entity_id},{common.table},'
        f'"old":{old},"new":{new},"metadata":{json_text(document(change, "metadata"))}}}}}'
    ).encode()


class _Common(NamedTuple):
    """Members of the document that are the same for all changes of a kind."""

    origin: str
    entity_type: str
    table: str


@lru_cache(maxsize=1_024)
def _common(entity_type: str, operation: str, schema: str | None, table: str, source: str | None) -> _Common:
    origin = f'"source":{_quoted(source or _table(schema, table))},"type":{_quoted(_type(entity_type, operation))}'
    of_table = f'"operation":"{operation}","table_schema":{_json(schema)},"table":{_quoted(table)}'
    return _Common(origin, f'"entity_type":{_quoted(entity_type)}', of_table)


def attributes(change: Change, source: str | None) -> dict[str, str | int]:
    """The event's attributes. One without a value is left out: none may be null, nor may a subject be empty."""
    found: dict[str, str | int] = {
        "specversion": "1.0",
        "id": str(change.id),
        "source": source or _table(change.table_schema, change.table),
        "type": _type(change.entity_type, change.operation),
        "time": time(change),
        "datacontenttype": DATA_TYPE,
        "partitionkey": partition_key(change),
        "sequence": f"{change.seq:019d}",
        "attempt": change.attempt,
        "depth": change.depth,
    }
    if change.entity_id:
        found["subject"] = change.entity_id
    if change.caused_by:
        found["causedby"] = str(change.caused_by)
    if change.replay_of:
        found["replayof"] = str(change.replay_of)
    return found


def _type(entity_type: str, operation: str) -> str:
    return f"cdc.{entity_type}.{operation.lower()}"


def time(change: Change) -> str:
    """When it was captured, RFC 3339."""
    return change.changed_at.astimezone(UTC).isoformat().replace("+00:00", "Z")


def partition_key(change: Change) -> str:
    """The key within which order is kept, as text."""
    return f"{change.entity_type}/{change.entity_id}"


def data(change: Change) -> str:
    """The event's data, JSON."""
    common = _common(change.entity_type, change.operation, change.table_schema, change.table, None)
    old, new = json_text(document(change, "old")), json_text(document(change, "new"))
    return (
        f'{{{common.entity_type},"entity_id":{_quoted(change.entity_id)},{common.table},'
        f'"old":{old},"new":{new},"metadata":{json_text(document(change, "metadata"))}}}'
    )


@lru_cache
def _table(schema: str | None, table: str) -> str:
    return (f"/schemas/{quote(schema, safe='')}" if schema else "") + f"/tables/{quote(table, safe='')}"


_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode
_quoted = json.encoder.encode_basestring
"""A text in JSON. The encoder for any value is made at each call, which takes longer than what it does here."""


def json_text(value: Any) -> str:
    """The stored text; for a change made by hand, or already parsed, JSON with the same digits."""
    if type(value) is Json:
        return value.decode()
    if value is None:
        return "null"
    match value:
        case Decimal() if value.is_finite():
            return str(value)
        case dict():
            return "{" + ",".join(f"{_json(str(name))}:{json_text(each)}" for name, each in value.items()) + "}"
        case list() | tuple():
            return "[" + ",".join(map(json_text, value)) + "]"
        case _:
            return _json(value)
