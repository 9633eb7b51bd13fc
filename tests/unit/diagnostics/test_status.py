import pytest

from cdc.diagnostics.status import error_class
from cdc.postgres.outbox import CRASHED


@pytest.mark.parametrize(
    ("last_error", "shown"),
    [
        ("ValueError: no such user Ada", "ValueError"),
        ("PaymentError: ", "PaymentError"),
        ("RequestTimeout: GET of secret", "RequestTimeout"),
        ("does not fit Order: card_number: field required", "does not fit Order"),
        ("took longer than 60 s", "took longer than 60 s"),
        (CRASHED, "the consumer's process ended"),
        ("rejected: no such user Ada", "rejected"),
        ("rejected: answered 410 Gone: no such user Ada", "rejected: answered 410"),
        ("answered 503 Service Unavailable: Ada", "answered 503"),
        ("the connection broke before an answer came (ClientOSError)", "the connection broke"),
    ],
)
def test_of_an_error_the_class_is_shown(last_error: str, shown: str) -> None:
    assert error_class(last_error) == shown


@pytest.mark.parametrize(
    "last_error",
    [
        None,
        "",
        "Ada",
        "rejected by Ada",
        "answered 5033",
        "Ada: ValueError: no such user",
        "call Ada again: ConnectionError",
        "4711-2222 is not a ValueError: x",
        "took longer than 60 s, said Ada",
        "does not fit Ada",
        "discarded by operator: ValueError: Ada",
        f"{'A' * 100}Error: x",
        "ValueError Ada: x",
        "ValueError\nAda: x",
    ],
)
def test_what_could_be_the_row_is_not(last_error: str | None) -> None:
    assert error_class(last_error) is None
