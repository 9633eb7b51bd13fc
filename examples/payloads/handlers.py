"""The payloads of other tools, for receivers that know them: WEBHOOK_URL gets each change in the shape SHAPE."""

import json
import os
from urllib.request import Request, urlopen

import cdc

Payload = dict[str, object]
router = cdc.Router()


def _operation(change: cdc.Change) -> str:
    """A row that a backfill has read is a new one to receivers that know no READ."""
    return "INSERT" if change.operation == "READ" else change.operation


def hasura(change: cdc.Change) -> Payload:
    """An event trigger of Hasura."""
    return {
        "id": str(change.id),
        "created_at": change.changed_at.isoformat(),
        "table": {"schema": change.table_schema, "name": change.table},
        "trigger": {"name": change.entity_type},
        "event": {
            "op": _operation(change),
            "data": {"old": change.old, "new": change.new},
            "session_variables": None,
        },
        "delivery_info": {"current_retry": change.attempt - 1},
    }


def supabase(change: cdc.Change) -> Payload:
    """A database webhook of Supabase."""
    return {
        "type": _operation(change),
        "schema": change.table_schema,
        "table": change.table,
        "record": change.new,
        "old_record": change.old,
    }


def sequin(change: cdc.Change) -> Payload:
    """A message of Sequin. Its ``commit_lsn`` orders messages; here ``seq`` does."""
    old, new = change.old, change.new
    # An UPDATE may be published without the old row.
    updated = change.operation == "UPDATE" and old is not None and new is not None
    return {
        "record": old if new is None else new,
        "changes": {name: value for name, value in old.items() if value != new.get(name)} if updated else None,
        "action": change.operation.lower(),
        "metadata": {
            "table_schema": change.table_schema,
            "table_name": change.table,
            "commit_timestamp": change.changed_at.isoformat(),
            "commit_lsn": change.seq,
            "commit_idx": 0,
            "idempotency_key": str(change.id),
        },
    }


def debezium(change: cdc.Change) -> Payload:
    """The value of Debezium's events, as its JSON converter writes it without schemas."""
    at = int(change.changed_at.timestamp() * 1000)
    return {
        "before": change.old,
        "after": change.new,
        "op": {"INSERT": "c", "UPDATE": "u", "DELETE": "d"}.get(change.operation, "r"),
        "ts_ms": at,
        "source": {
            "connector": "cdc",
            "schema": change.table_schema,
            "table": change.table,
            "ts_ms": at,
            "sequence": str(change.seq),
        },
    }


SHAPES = {"hasura": hasura, "supabase": supabase, "sequin": sequin, "debezium": debezium}


@router.on("order", timeout=10)
def forward(change: cdc.Change) -> None:
    # Fractions are Decimal, so that none loses a digit; these tools send them as numbers. An answer other than 2xx
    # raises, so the change is tried again.
    body = json.dumps(SHAPES[os.environ["SHAPE"]](change), default=float).encode()
    headers = {"Content-Type": "application/json"}
    with urlopen(Request(os.environ["WEBHOOK_URL"], body, headers), timeout=10):
        pass
