import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from prometheus_client import CollectorRegistry

from cdc.cli import cdc
from cdc.http.server import Check, HealthServer


@pytest.fixture
def checks() -> list[Check]:
    """What /livez answers."""
    return [Check("loop.consumer", ok=True, detail="0.4s"), Check("loop.stream", ok=True, detail="0.1s")]


@pytest.fixture
def server(checks: list[Check]) -> Iterator[HealthServer]:
    running = HealthServer(
        "127.0.0.1", 0, registry=CollectorRegistry(), liveness=lambda: checks,
        readiness=lambda: [Check("database", ok=False)],
    )  # fmt: skip
    running.start()
    yield running
    running.stop()


@pytest.fixture(autouse=True)
def no_settings_from_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("CDC_HTTP_HOST", "CDC_HTTP_PORT", "CDC_DSN"):
        monkeypatch.delenv(name, raising=False)


def healthcheck(*arguments: str, **environ: str) -> Result:
    return CliRunner().invoke(cdc, ["healthcheck", *arguments], env=environ)


def test_a_consumer_that_lives_is_one_line_and_0_ready_or_not(server: HealthServer) -> None:
    asked = healthcheck("--http-port", str(server.port))
    assert (asked.exit_code, asked.stdout) == (0, "alive: ok loop.consumer 0.4s; ok loop.stream 0.1s\n")


def test_one_that_does_not_is_1_and_only_what_fails_is_said(server: HealthServer, checks: list[Check]) -> None:
    checks[0] = Check("loop.consumer", ok=False, detail="45.0s")
    asked = healthcheck("--http-port", str(server.port))
    assert (asked.exit_code, asked.stdout) == (1, "status 503: fail loop.consumer 45.0s\n")


def test_the_address_is_that_of_the_consumer_and_one_that_means_all_is_asked_on_this_host(server: HealthServer) -> None:
    asked = healthcheck(CDC_HTTP_HOST="0.0.0.0", CDC_HTTP_PORT=str(server.port))
    assert (asked.exit_code, asked.stdout[:6]) == (0, "alive:")


def test_without_an_answer_it_is_1(server: HealthServer) -> None:
    server.stop()
    asked = healthcheck("--http-port", str(server.port))
    assert (asked.exit_code, asked.stdout) == (1, f"no answer from 127.0.0.1 port {server.port}: Connection refused\n")


def test_one_that_takes_the_call_and_says_nothing_is_1() -> None:
    with socket.create_server(("127.0.0.1", 0)) as frozen:
        port = frozen.getsockname()[1]
        asked = healthcheck("--http-port", str(port), "--wait", "0.1")
    assert (asked.exit_code, asked.stdout) == (1, f"no answer from 127.0.0.1 port {port}: TimeoutError\n")


def test_something_else_that_listens_there_is_1() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:

        def greet() -> None:
            caller, _ = other.accept()
            with caller:
                caller.sendall(b"220 mail\r\n")

        thread = threading.Thread(target=greet)
        thread.start()
        asked = healthcheck("--http-port", str(other.getsockname()[1]))
        thread.join()
    assert asked.exit_code == 1
    assert asked.stdout.startswith("no answer from 127.0.0.1")


def test_where_nothing_is_served_nothing_is_asked() -> None:
    asked = healthcheck("--http-port", "0")
    assert (asked.exit_code, asked.stdout) == (0, "not asked: http.port is 0\n")
