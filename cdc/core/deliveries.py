"""How the delivery of a change ends unless it succeeds, whatever it is delivered to. Pure."""

from __future__ import annotations

from cdc.core.errors import Reject, Retry, SafeError, Unavailable

HANDLER = "deliver"
"""The name of the handler that delivers, in metrics and logs."""


class DeliveryError(SafeError, Retry):
    """Retry later; an attempt is counted. ``hint``: what an operator can do now, more than the summary says."""

    def __init__(self, summary: str, text: str = "", after: float | None = None, *, hint: str = "") -> None:
        Retry.__init__(self, after, text or summary)
        self.summary = summary
        self.hint = hint


class AwayError(SafeError, Unavailable):
    """The receiver was absent, or broke off before its answer. No attempt is counted."""

    def __init__(self, summary: str, text: str = "", after: float | None = None) -> None:
        Unavailable.__init__(self, after, text or summary)
        self.summary = summary


class UnreachedError(AwayError):
    """No connection could be made."""

    certain = True


class LostError(AwayError):
    """No answer came: the connection was lost, or silent for too long. What was sent may be the cause, or be there."""


class RejectedError(SafeError, Reject):
    """The receiver will never accept the change."""

    kind = "rejected"

    def __init__(self, summary: str, text: str = "") -> None:
        Reject.__init__(self, text or summary)
        self.summary = summary
