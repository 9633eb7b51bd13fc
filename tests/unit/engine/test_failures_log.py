"""What an operator reads of a task that goes on although it fails."""

from __future__ import annotations

import logging

import pytest

from cdc.core.errors import CdcError
from cdc.engine.failures_log import FailuresLog

_LOG = logging.getLogger("cdc.test")


@pytest.fixture
def failures(caplog: pytest.LogCaptureFixture) -> FailuresLog:
    caplog.set_level(logging.WARNING, logger=_LOG.name)
    return FailuresLog(_LOG, "nothing is removed")


def test_a_failure_is_logged_with_what_to_do(failures: FailuresLog, caplog: pytest.LogCaptureFixture) -> None:
    failures.failed(KeyError(), CdcError("the role may not", hint="GRANT DELETE"))
    assert caplog.messages == ["nothing is removed: the role may not; GRANT DELETE"]


def test_a_failure_that_nobody_explains_is_named_without_its_text(
    failures: FailuresLog, caplog: pytest.LogCaptureFixture
) -> None:
    error = ValueError("card 4242")
    failures.failed(error, error)
    assert caplog.messages == ["nothing is removed: ValueError; it is tried again"]


def test_each_kind_is_logged_once_until_it_succeeds(failures: FailuresLog, caplog: pytest.LogCaptureFixture) -> None:
    for error in (KeyError(1), KeyError(2), ValueError(), ValueError(), KeyError(3)):
        failures.failed(error, error)
    failures.succeeded()
    failures.failed(KeyError(4), KeyError(4))
    assert [message.split()[3] for message in caplog.messages] == ["KeyError;", "ValueError;", "KeyError;", "KeyError;"]
