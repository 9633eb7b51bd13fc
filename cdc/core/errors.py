"""Every error this package raises on purpose.

    CdcError                     something an operator or an author can act on
      UsageError                 wrong options, settings or handler references      exit 2
      ConnectError               the database is unreachable or refuses the login   exit 3
      NotFoundError              the slot, table, change ... does not exist         exit 4
      RefusedError               unsafe without the operator's explicit consent     exit 5
      SchemaError                entity_changes is missing or does not fit          exit 1
      StreamError                the replication stream cannot start, or ended      (sweeping goes on)
      SessionLostError           the session that holds the shard locks is gone     (reconnect)
      ProtocolError              bytes from the server that no decoder understands  (reconnect)

    Retry, Discard, Reject       raised by a handler: later; nothing to do; never, a dead letter
    Unavailable                  what it needs is unavailable: later, and no attempt is counted
    Snooze                       it is too early for the change: later, and no attempt is counted
    Failed                       the same for some changes of a batch

Each CdcError is one sentence, what happened to what, and a hint: what to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from decimal import Decimal
from math import isfinite, nan
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cdc.core.model import Change


class CdcError(Exception):
    """``str(error)`` says what happened to what; ``hint`` what to do; ``exit_code`` is that of the command line."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(CdcError):
    """An option, a setting or a handler reference is wrong. Exit code 2."""

    exit_code = 2


class ConnectError(CdcError):
    """The database is unreachable, or refuses the login. Exit code 3."""

    exit_code = 3


class NotFoundError(CdcError):
    """The slot, table or change does not exist. Exit code 4."""

    exit_code = 4


class RefusedError(CdcError):
    """Unsafe without the operator's explicit consent. Exit code 5."""

    exit_code = 5


class SchemaError(CdcError):
    """The outbox is missing, or does not fit this version."""


class SubscriptionDroppedError(SchemaError):
    """The subscription that a consumer is for is there no more; another one of its name is not the same."""


class StreamError(CdcError):
    """``reason`` is one of the closed set of the metric ``cdc_stream_disconnects_total``."""

    def __init__(self, message: str, *, reason: str, hint: str = "", permanent: bool = False) -> None:
        super().__init__(message, hint=hint)
        self.reason = reason
        self.permanent = permanent
        """True when waiting does not fix it: the consumer then tries again every minute instead of at once."""


class SessionLostError(CdcError):
    pass


class ProtocolError(CdcError):
    pass


def _seconds(after: object) -> float:
    """A finite number of seconds; NaN for what is none, which no comparison holds for."""
    seconds = after.total_seconds() if isinstance(after, timedelta) else after
    if isinstance(seconds, bool) or not isinstance(seconds, int | float | Decimal):
        return nan
    try:
        found = float(seconds)
    except (ValueError, OverflowError):  # a Decimal that signals, an integer beyond all floats
        return nan
    return found if isfinite(found) else nan


class Retry(Exception):  # noqa: N818 - the name a handler's author writes: `raise Retry(after=30)`
    """Raised by a handler: not now. The change waits ``after``, seconds or a timedelta, or as long as the backoff says.

    It counts as an attempt, so that a handler which only ever asks for another try ends as a dead letter.
    """

    def __init__(self, after: float | timedelta | None = None, reason: str = "") -> None:
        seconds = None if after is None else _seconds(after)
        if seconds is not None and not seconds >= 0:
            raise ValueError(f"Retry(after={after!r}): seconds or a timedelta, 0 or more")
        super().__init__(reason or "the handler asked for another try")
        self.after = seconds


class Discard(Exception):  # noqa: N818 - see Retry
    """Raised by a handler: this change needs nothing done. It is marked processed, with the reason."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)


class Reject(Exception):  # noqa: N818 - see Retry
    """Raised by a handler: no attempt will ever succeed. The change is a dead letter at once, with the reason."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)


class Unavailable(Exception):  # noqa: N818 - see Retry
    """Raised by a handler: something that it needs is unavailable. No attempt is counted, and the change waits.

    ``retry_after``: how long until the next try makes sense, seconds or a timedelta, if known. Else the change waits
    for up to a second, and twice as long each time, up to half a minute. If changes of several keys raise it in a
    row, with no success in between, the handler pauses: none of its changes is called, and then one at a time, until
    one has succeeded.
    """

    certain = False
    """Whether no single key can be the cause: then one key is enough. For a class derived from this one."""

    def __init__(self, retry_after: float | timedelta | None = None, reason: str = "") -> None:
        seconds = None if retry_after is None else _seconds(retry_after)
        if seconds is not None and not seconds >= 0:
            raise ValueError(f"Unavailable(retry_after={retry_after!r}): seconds or a timedelta, 0 or more")
        super().__init__(reason or "what the handler needs is away")
        self.retry_after = seconds


class Snooze(Exception):  # noqa: N818 - see Retry
    """Raised by a handler: it is too early for this change. It waits ``after``, and no attempt is counted.

    ``after``: seconds, or a timedelta; above 0. A tenth of a second is the shortest wait. The change holds back the
    later ones of its key, as one that is tried again does. Nothing ends it but the handler, or an operator.
    """

    def __init__(self, after: float | timedelta, reason: str = "") -> None:
        seconds = _seconds(after)
        if not seconds > 0:
            raise ValueError(f"Snooze(after={after!r}): seconds or a timedelta, above 0")
        super().__init__(reason)
        self.after = seconds


class SafeError(Exception):
    """A failed attempt, in cdc's words. ``summary``: for a log, quotes nothing of the row. ``kind``: for metrics."""

    kind = "exception"

    def __init__(self, summary: str, text: str = "") -> None:
        super().__init__(text or summary)
        self.summary = summary


class OverrunError(SafeError):
    """The handler's time limit passed."""

    kind = "timeout"


_NAMED = "the handler named it as failed"


class Failed(Exception):  # noqa: N818 - see Retry
    """Raised by a batch handler: these changes failed, each with its error, and the rest is done.

    An error is an exception, Retry, Snooze, Discard, Reject and Unavailable too, or a text.
    """

    def __init__(self, errors: Mapping[Change, BaseException | str]) -> None:
        super().__init__(f"{len(errors)} changes of the batch failed")
        self.errors = {
            change.seq: error if isinstance(error, BaseException) else SafeError(_NAMED, str(error))
            for change, error in errors.items()
        }
