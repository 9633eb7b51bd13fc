"""What an error is to who has asked: a status, a sentence, and what to do. Never the text of an unexpected error."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from cdc.core.errors import CdcError, ConnectError, NotFoundError, RefusedError, SchemaError, UsageError
from cdc.core.sqlstate import About, about
from cdc.postgres.connect import explain

log = logging.getLogger("cdc.contrib.ui")

_STATUSES: tuple[tuple[type[CdcError], int], ...] = (
    (UsageError, 400), (NotFoundError, 404), (RefusedError, 409), (ConnectError, 503), (SchemaError, 403),
)  # fmt: skip
_DENIED = "42501"
"""The SQLSTATE of a right that the role has not."""


@dataclass(frozen=True, slots=True)
class RequestFailure:
    status: int
    sentence: str
    hint: str


def described(error: Exception) -> RequestFailure:
    if isinstance(error, CdcError):
        if getattr(error.__context__, "sqlstate", None) == _DENIED:  # said in the words of what was asked
            return RequestFailure(403, str(error), error.hint)
        return RequestFailure(_status(error), str(error), error.hint)
    state: str | None = getattr(error, "sqlstate", None)
    explained = explain(error)
    if state == "57014":
        return RequestFailure(503, "it took too long, and was ended", "narrow it: by type, by time")
    if explained is not None:
        return RequestFailure(_of_state(explained, state), str(explained), explained.hint)
    # The class without the text: an unexpected error may quote anything.
    log.error("a request failed: unexpected %s", type(error).__name__, exc_info=log.isEnabledFor(logging.DEBUG))
    return RequestFailure(500, f"unexpected {type(error).__name__}; this is a fault of cdc", "see the log of cdc ui")


def _of_state(explained: CdcError, state: str | None) -> int:
    if state == _DENIED:
        return 403
    return 400 if state is not None and about(state) is About.ROW else _status(explained, 503)


def _status(error: CdcError, otherwise: int = 500) -> int:
    return next((status for kind, status in _STATUSES if isinstance(error, kind)), otherwise)
