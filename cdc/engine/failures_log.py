"""Failures of a task that goes on: each kind is logged once, not at each attempt."""

from __future__ import annotations

import logging

from cdc.core.errors import CdcError


class FailuresLog:
    """``what`` does not happen while it fails: the beginning of the sentence."""

    def __init__(self, log: logging.Logger, what: str) -> None:
        self._log = log
        self._what = what
        self._last: type[Exception] | None = None

    def failed(self, error: Exception, explained: Exception) -> None:
        """``explained``: the same for an operator. A driver's own text may quote a row, so its class stands for it."""
        if type(error) is not self._last:
            known = isinstance(explained, CdcError)
            hint = getattr(explained, "hint", "") or "it is tried again"
            self._log.warning("%s: %s; %s", self._what, explained if known else type(error).__name__, hint)
        self._last = type(error)

    def succeeded(self) -> None:
        """The next failure is logged again, whatever it is."""
        self._last = None
