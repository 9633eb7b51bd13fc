"""A change as the content of a message: a CloudEvent in structured or binary mode. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import quote

from cdc.core import cloudevents
from cdc.core.broker_url import BINARY
from cdc.core.model import Change, Operation

CONTENT_TYPE = "content-type"
_PRINTED = "".join(map(chr, range(0x21, 0x7F))).replace('"', "").replace("%", "")
"""Characters that a header of HTTP, and of what follows its binding, has as they are."""
_AS_IT_IS = re.compile(f"[{re.escape(_PRINTED)}]*").fullmatch
_IN_HEADERS = ("id", "time", "partitionkey", "causedby")
"""Attributes of an event in structured mode that its headers repeat, for who routes without parsing."""


class Message(NamedTuple):
    """``name`` is the topic, subject, stream or routing key; ``id`` the change's; within ``key`` order is kept."""

    name: str
    id: str
    key: str
    body: bytes
    headers: Mapping[str, str]
    ends: bool = False
    """The row is gone: a tombstone may follow."""


class Encoding:
    """How a protocol's binding writes events: ``separator`` stands between ``ce`` and the name of an attribute.

    ``percent``: values of headers are percent-encoded, as those of HTTP. The headers of structured mode begin with
    ``cdc`` instead: what reads events takes a message with a header of ``ce`` for one in binary mode.
    """

    operations = tuple(Operation)
    """Of these there are messages."""

    def __init__(self, mode: str, source: str | None, *, separator: str, percent: bool = False) -> None:
        self._binary = mode == BINARY
        self._source = source
        self._prefix = ("ce" if self._binary else "cdc") + separator
        self._percent = percent

    def message(self, change: Change, name: str) -> Message:
        found = cloudevents.attributes(change, self._source)
        key, id_ = str(found["partitionkey"]), str(found["id"])
        if self._binary:
            media_type = str(found.pop("datacontenttype"))
            body = cloudevents.data(change).encode()
        else:
            media_type, body = cloudevents.EVENT_TYPE, cloudevents.structured(change, found)
            found = {each: found[each] for each in _IN_HEADERS if each in found}
        headers = {CONTENT_TYPE: media_type}
        for attribute, value in found.items():
            text = str(value)
            if self._percent and not _AS_IT_IS(text):
                text = quote(text, safe=_PRINTED)
            headers[self._prefix + attribute] = text
        return Message(name, id_, key, body, headers, change.operation is Operation.DELETE)
