"""A change as the content of a message: a CloudEvent in structured or binary mode. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import NamedTuple
from urllib.parse import quote

from cdc.core import cloudevents
from cdc.core.broker_url import BINARY
from cdc.core.model import Change, Operation

CONTENT_TYPE = "content-type"
_PRINTED = "".join(map(chr, range(0x21, 0x7F))).replace('"', "").replace("%", "")
"""Characters that a header of HTTP, and of what follows its binding, has as they are."""
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
        self._at: datetime | None = None
        self._at_text = ""
        self._id, self._time, self._key, self._caused_by = (self._prefix + each for each in _IN_HEADERS)

    def message(self, change: Change, name: str) -> Message:
        id_, at, key = str(change.id), self._time_of(change), cloudevents.partition_key(change)
        if self._binary:
            found = cloudevents.attributes(change, self._source)
            headers = {CONTENT_TYPE: str(found.pop("datacontenttype"))}
            headers |= {self._prefix + attribute: str(value) for attribute, value in found.items()}
            body = cloudevents.data(change).encode()
        else:
            headers = {CONTENT_TYPE: cloudevents.EVENT_TYPE, self._id: id_, self._time: at, self._key: key}
            if change.caused_by:
                headers[self._caused_by] = str(change.caused_by)
            body = cloudevents.structured(change, self._source, id_, at, key)
        if self._percent and not _as_it_is("".join(headers.values())):
            headers = _quoted(headers)
        return Message(name, id_, key, body, headers, change.operation is Operation.DELETE)

    def identified(self, message: Message, id_: str, key: str) -> Message:
        """The message with another id and key, which its headers have, too."""
        headers = {self._id: id_, self._key: key}
        written = _quoted(headers) if self._percent else headers
        return message._replace(id=id_, key=key, headers={**message.headers, **written})

    def _time_of(self, change: Change) -> str:
        """Made once for the changes of a transaction, which have it in common and come together."""
        if change.changed_at != self._at:
            self._at, self._at_text = change.changed_at, cloudevents.time(change)
        return self._at_text


def _quoted(headers: Mapping[str, str]) -> dict[str, str]:
    return {header: quote(text, safe=_PRINTED) for header, text in headers.items()}


def _as_it_is(text: str) -> bool:
    return text.isascii() and text.isprintable() and not (" " in text or '"' in text or "%" in text)
