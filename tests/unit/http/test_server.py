import contextlib
import errno
import http.client
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from prometheus_client import CollectorRegistry, Gauge

from cdc.core.errors import UsageError
from cdc.http.server import Check, HealthServer
from tests.eventually import eventually


class State:
    """What the probes of a test answer."""

    def __init__(self) -> None:
        self.live = [Check("loop.stream", ok=True, detail="0.4s")]
        self.ready = [Check("started", ok=True)]

    def liveness(self) -> list[Check]:
        return self.live

    def readiness(self) -> list[Check]:
        return self.ready


@pytest.fixture
def state() -> State:
    return State()


@pytest.fixture
def server(state: State) -> Iterator[HealthServer]:
    registry = CollectorRegistry()
    Gauge("cdc_example", "A gauge.", registry=registry).set(3)
    running = HealthServer("127.0.0.1", 0, registry=registry, liveness=state.liveness, readiness=state.readiness)
    running.start()
    yield running
    running.stop()


Limited = Callable[[float], HealthServer]


@pytest.fixture
def limited(state: State) -> Iterator[Limited]:
    """Starts a server whose requests may take that many seconds."""
    with contextlib.ExitStack() as servers:

        def start(request_limit_s: float) -> HealthServer:
            running = HealthServer(
                "127.0.0.1", 0, registry=CollectorRegistry(), liveness=state.liveness, readiness=state.readiness,
                request_limit_s=request_limit_s,
            )  # fmt: skip
            running.start()
            servers.callback(running.stop)
            return running

        yield start


def _ask(server: HealthServer, path: str, method: str = "GET") -> tuple[int, str, http.client.HTTPMessage]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    try:
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode(), answer.headers
    finally:
        connection.close()


def test_each_check_is_a_line_and_all_must_be_well(server: HealthServer, state: State) -> None:
    assert _ask(server, "/livez")[:2] == (200, "ok loop.stream 0.4s\n")
    assert _ask(server, "/readyz")[:2] == (200, "ok started\n")
    state.live = [Check("loop.stream", ok=True, detail="0.4s"), Check("loop.sweep", ok=False, detail="45.0s")]
    assert _ask(server, "/livez")[:2] == (503, "ok loop.stream 0.4s\nfail loop.sweep 45.0s\n")
    assert _ask(server, "/readyz")[0] == 200


def test_without_a_check_a_probe_is_well(server: HealthServer, state: State) -> None:
    state.live = []
    assert _ask(server, "/livez")[:2] == (200, "ok livez\n")


def test_a_check_that_fails_itself_is_not_well_and_is_logged(
    server: HealthServer, state: State, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(state, "live", None)
    status, body, _ = _ask(server, "/livez")
    assert (status, body) == (503, "fail livez TypeError\n")
    assert "a health check failed" in caplog.text
    assert _ask(server, "/readyz")[0] == 200


def test_metrics_are_an_exposition(server: HealthServer) -> None:
    status, body, headers = _ask(server, "/metrics")
    assert status == 200
    assert "cdc_example 3.0" in body
    assert headers["Content-Type"].startswith("text/plain; version=")


def test_the_root_lists_the_routes_and_no_other_exists(server: HealthServer) -> None:
    assert _ask(server, "/")[:2] == (200, "/metrics\n/livez\n/readyz\n")
    for path in ("/nosuch", "/metrics/", "/livez/x"):
        assert _ask(server, path)[0] == 404


def _raw(server: HealthServer, request: str, *headers: str) -> bytes:
    """All that comes back: http.client would hide a body that has no business there."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as client:
        client.sendall("\r\n".join([f"{request} HTTP/1.0", *headers, "\r\n"]).encode())
        return b"".join(iter(lambda: client.recv(65536), b""))


def test_further_routes_answer_as_they_like_and_are_listed(state: State) -> None:
    server = HealthServer(
        "127.0.0.1", 0, registry=CollectorRegistry(), liveness=state.liveness, readiness=state.readiness,
        routes={"/": lambda: ([("Content-Type", "text/html")], b"<p>")},
    )  # fmt: skip
    server.start()
    try:
        status, body, headers = _ask(server, "/")
        assert (status, body, headers["Content-Type"]) == (200, "<p>", "text/html")
        assert _ask(server, "/nosuch")[:2] == (404, "there is only\n/metrics\n/livez\n/readyz\n/\n")
        assert _ask(server, "/", "POST")[0] == 405
        assert _ask(server, "/livez")[0] == 200
    finally:
        server.stop()


OURS = ["127.0.0.1:9464", "10.1.2.3", "[::1]:9464", "[fe80::1%25eth0]", "localhost:9464", "LOCALHOST", "app.localhost",
        "Cdc.Internal:80", "bound", "localhost."]  # fmt: skip
OTHERS = ["evil.example:9464", "evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "2130706433",
          "0x7f.1", "127.0.0.1, evil.example", "", "[evil.example]", "notlocalhost",
          "evil.example:80@localhost"]  # fmt: skip


@pytest.mark.parametrize("host", [*OURS, *OTHERS])
def test_the_page_is_for_whoever_asks_by_an_address_or_a_name_of_ours(state: State, host: str) -> None:
    server = HealthServer(
        "127.0.0.1", 0, registry=CollectorRegistry(), liveness=state.liveness, readiness=state.readiness,
        routes={"/": lambda: ([], b"figures"), "/status.json": lambda: ([], b"figures")},
        hosts=["cdc.internal", "bound"],
    )  # fmt: skip
    server.start()
    try:
        for path in ("/", "/status.json"):
            answer = _raw(server, f"GET {path}", f"Host: {host}")
            assert (b"figures" in answer) == (host in OURS)
            assert answer.startswith(b"HTTP/1.0 200" if host in OURS else b"HTTP/1.0 421")
        for path in ("/livez", "/readyz", "/metrics"):
            assert _raw(server, f"GET {path}", f"Host: {host}").startswith(b"HTTP/1.0 200"), (
                "of a kubelet, a Prometheus"
            )
    finally:
        server.stop()


@pytest.mark.parametrize("path", ["/", "/metrics", "/livez", "/readyz", "/nosuch"])
def test_no_answer_is_to_be_taken_for_something_else(server: HealthServer, path: str) -> None:
    for method in ("GET", "HEAD", "POST"):
        assert _ask(server, path, method)[2].get_all("X-Content-Type-Options") == ["nosniff"]


@pytest.mark.parametrize("path", ["/", "/metrics", "/livez", "/readyz", "/nosuch"])
def test_head_answers_as_get_without_the_body(server: HealthServer, path: str) -> None:
    head, _, body = _raw(server, f"HEAD {path}").partition(b"\r\n\r\n")
    headers, _, whole = _raw(server, f"GET {path}").partition(b"\r\n\r\n")
    assert body == b""
    assert head.splitlines()[0] == headers.splitlines()[0]
    assert f"Content-Length: {len(whole)}".encode() in head.splitlines()


def test_nothing_can_be_posted(server: HealthServer) -> None:
    assert _ask(server, "/livez", "POST")[0] == 405


def test_a_client_that_says_nothing_holds_up_neither_others_nor_the_stop(limited: Limited) -> None:
    server = limited(300.0)
    with socket.create_connection(("127.0.0.1", server.port)) as silent:
        silent.send(b"GET /livez")
        assert _ask(server, "/livez")[0] == 200
        server.stop()
        with pytest.raises(ConnectionRefusedError):
            _ask(server, "/livez")


def test_a_client_that_says_nothing_is_let_go(limited: Limited) -> None:
    server = limited(0.05)
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as silent:
        assert silent.recv(1) == b""


def test_a_client_that_speaks_slowly_for_ever_is_let_go(limited: Limited) -> None:
    server = limited(0.5)
    with socket.create_connection(("127.0.0.1", server.port), timeout=0.1) as slow:

        def ended() -> bool:
            try:
                slow.send(b"a")
                return slow.recv(1) == b""
            except TimeoutError:
                return False
            except ConnectionError:
                return True

        eventually(ended, within_s=20, what="the connection ends")


def _crowd(server: HealthServer, count: int, said: bytes) -> list[socket.socket]:
    crowd = []
    for _ in range(count):
        crowd.append(socket.create_connection(("127.0.0.1", server.port), timeout=20))
        crowd[-1].send(said)
    return crowd


@pytest.mark.parametrize("said", [b"", b"GET /livez HTTP/1.1\r\nX: ", b"GET /livez"])
def test_probes_are_answered_while_others_hold_all_the_connections_they_can(server: HealthServer, said: bytes) -> None:
    crowd = _crowd(server, 200, said)
    try:
        for _ in range(20):
            assert _ask(server, "/livez")[0] == 200
        threads = sum("process_request" in thread.name for thread in threading.enumerate())
        assert threads <= 60  # 50, and those that are about to end
    finally:
        for one in crowd:
            one.close()


def test_without_descriptors_the_port_rests_and_is_there_again_afterwards(
    server: HealthServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = 0
    accept, enough = socket.socket.accept, threading.Event()

    def refused(listener: socket.socket) -> object:
        nonlocal attempts
        if enough.is_set():
            return accept(listener)
        attempts += 1
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(socket.socket, "accept", refused)
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as waiting:
        waiting.send(b"GET /livez HTTP/1.0\r\n\r\n")
        eventually(lambda: attempts >= 3, what="some attempts")
        began, before = time.monotonic(), attempts
        eventually(lambda: time.monotonic() - began > 1, what="a second")
        assert attempts - before < 20
        enough.set()
        assert waiting.recv(12) == b"HTTP/1.0 200"


def test_no_more_of_a_request_is_read_than_one_has(server: HealthServer) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as talker:
        head = b"GET /livez HTTP/1.0\r\n" + b"X: " + b"a" * 1_000_000
        with contextlib.suppress(ConnectionError):
            talker.sendall(head)
            assert talker.recv(12) == b"HTTP/1.0 200"


def test_a_request_is_not_logged_and_prints_nothing(server: HealthServer, capfd: pytest.CaptureFixture[str]) -> None:
    _ask(server, "/livez")
    with socket.create_connection(("127.0.0.1", server.port)) as rude:
        rude.send(b"\x00\xff nonsense\r\n\r\n")
    _ask(server, "/livez")
    assert capfd.readouterr() == ("", "")


def test_a_port_in_use_is_a_sentence_with_the_remedy(server: HealthServer, state: State) -> None:
    with pytest.raises(UsageError, match=f"127.0.0.1 port {server.port}: Address already in use") as refused:
        HealthServer(
            "127.0.0.1", server.port, registry=CollectorRegistry(), liveness=state.liveness, readiness=state.readiness
        )
    assert "--http-port" in refused.value.hint


def test_a_host_that_is_not_ours_is_a_sentence(state: State) -> None:
    with pytest.raises(UsageError, match=r"nosuch\.invalid"):
        HealthServer(
            "nosuch.invalid", 0, registry=CollectorRegistry(), liveness=state.liveness, readiness=state.readiness
        )


@pytest.mark.parametrize("host", ["\u202e", "a\0b", "x" * 5_000])
def test_a_host_that_cannot_be_a_name_is_a_sentence(host: str, state: State) -> None:
    with pytest.raises(UsageError, match="cannot serve metrics and health on"):
        HealthServer(host, 0, registry=CollectorRegistry(), liveness=list, readiness=state.readiness)


def test_it_serves_an_ipv6_address(state: State) -> None:
    try:
        server = HealthServer(
            "::1", 0, registry=CollectorRegistry(), liveness=state.liveness, readiness=state.readiness
        )
    except UsageError as refused:
        pytest.skip(f"no IPv6 here: {refused}")
    server.start()
    try:
        with socket.create_connection(("::1", server.port)) as client:
            client.send(b"GET /livez HTTP/1.0\r\n\r\n")
            assert client.recv(100).startswith(b"HTTP/1.0 200")
    finally:
        server.stop()


def test_stop_frees_the_port_ends_the_thread_and_may_be_repeated(server: HealthServer, state: State) -> None:
    server.stop()
    server.stop()
    assert "cdc-health" not in {thread.name for thread in threading.enumerate()}
    again = HealthServer(
        "127.0.0.1", server.port, registry=CollectorRegistry(), liveness=state.liveness, readiness=state.readiness
    )
    again.stop()  # never started
