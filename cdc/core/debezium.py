"""A change as a record of Debezium's: its envelope as JSON without a schema, for consumers that read those. Pure.

What the outbox does not know is left out or null: the position in the WAL, the number of the transaction.
"""

from __future__ import annotations

from datetime import datetime

from cdc.core.broker_messages import CONTENT_TYPE, Message
from cdc.core.cloudevents import DATA_TYPE, json_text, partition_key
from cdc.core.fast_change import document
from cdc.core.model import Change, Operation

_LETTERS = {
    Operation.INSERT: "c",
    Operation.UPDATE: "u",
    Operation.DELETE: "d",
    Operation.READ: "r",
    Operation.TRUNCATE: "t",
}


class DebeziumEncoding:
    """``source``: the name of the connector that the envelope names."""

    operations = tuple(_LETTERS)
    """Of these there are messages. For a change of columns the envelope has no letter."""

    def __init__(self, source: str | None) -> None:
        self._name = source or "cdc"

    def message(self, change: Change, name: str) -> Message:
        at = _milliseconds(change.changed_at)
        source = {
            "connector": "postgresql",
            "name": self._name,
            "ts_ms": at,
            "snapshot": "true" if change.operation is Operation.READ else "false",
            "schema": change.table_schema,
            "table": change.table,
            "sequence": f'[null,"{change.seq}"]',
            "txId": None,
            "lsn": None,
        }
        head = json_text({"op": _LETTERS[change.operation], "ts_ms": at, "source": source})
        before, after = (json_text(document(change, which)) for which in ("old", "new"))
        body = f'{{"before":{before},"after":{after},{head[1:]}'.encode()
        headers = {CONTENT_TYPE: DATA_TYPE, "cdc_id": str(change.id)}
        if change.caused_by:
            headers["cdc_causedby"] = str(change.caused_by)
        return Message(name, str(change.id), partition_key(change), body, headers, change.operation is Operation.DELETE)

    def identified(self, message: Message, id_: str, key: str) -> Message:
        """The message with another id, which its header has, too, and key."""
        return message._replace(id=id_, key=key, headers={**message.headers, "cdc_id": id_})


def _milliseconds(moment: datetime) -> int:
    return int(moment.timestamp() * 1_000)
