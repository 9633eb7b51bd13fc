"""A logical-replication CDC consumer for PostgreSQL.

What a handler's author needs, and nothing that opens a connection: importing this package loads the pure floor only.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from cdc.core.errors import (
    CdcError,
    ConnectError,
    Discard,
    Failed,
    NotFoundError,
    RefusedError,
    Reject,
    Retry,
    SchemaError,
    Snooze,
    Unavailable,
    UsageError,
)
from cdc.core.limits import Limit
from cdc.core.model import Change, Operation, UnreadableDocumentError
from cdc.core.router import Router

__all__ = [
    "CdcError",
    "Change",
    "ConnectError",
    "Discard",
    "Failed",
    "Limit",
    "NotFoundError",
    "Operation",
    "RefusedError",
    "Reject",
    "Retry",
    "Router",
    "SchemaError",
    "Snooze",
    "Unavailable",
    "UnreadableDocumentError",
    "UsageError",
    "run",
]
__version__ = "0.1.0"


async def run(dsn: str | None, router: Router | Mapping[str, Router] | None, **settings: Any) -> None:
    """Run a consumer inside one's own asyncio program, until cancelled; see ``cdc.app.consumers.run``.

    Several, where ``router`` is one for each subscription by name.
    """
    await importlib.import_module("cdc.app.consumers").run(dsn, router, **settings)
