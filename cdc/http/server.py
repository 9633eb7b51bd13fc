"""/metrics, /livez and /readyz, and the status page if there is one, served from their own thread.

A thread, so that a handler that blocks the event loop cannot silence the probes that should report it. The server never
uses the database: a probe that waits for a slow one restarts every replica, which never helps.

The page and its figures are served only for a Host that is an address, a name of this machine, or a name that the
settings allow. DNS rebinding needs a name: a browser treats a page of evil.example, whose name is then pointed here, as
of the same origin as ours, and it could read all of it. The metrics and the probes say less, and are requested by names
that are not known here (a service of Kubernetes or Compose), so they answer to any name.
"""

from __future__ import annotations

import contextlib
import io
import ipaddress
import logging
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from socketserver import TCPServer, ThreadingMixIn
from typing import TYPE_CHECKING, Any, NamedTuple
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app

from cdc.core.errors import UsageError
from cdc.runtime.forks import not_for_children
from cdc.runtime.supervisor import Supervisor

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

log = logging.getLogger(__name__)

_CONNECTIONS_MAX = 50
"""Each is a thread and a descriptor. A new one replaces the oldest: an answer takes milliseconds, so the client that
has held a connection longest is the least likely to want one."""

_REQUEST_MAX = 16_384
"""Bytes of a request that the server reads."""

_REST_S = 0.2
"""Pause after a connection could not be accepted for want of descriptors: the next attempt would fail at once, too."""

_POLL_S = 0.1
"""A stop is noticed within this time, which is part of the drain time."""

_ROUTES = ("/metrics", "/livez", "/readyz")
_NO_SNIFF = ("X-Content-Type-Options", "nosniff")
"""A browser must use the declared content type, and must not guess a script."""


class Check(NamedTuple):
    """One line of an answer: ``ok loop.stream 0.4s`` or ``fail loop.stream 45s``. No DSN and no payload in it."""

    name: str
    ok: bool
    detail: str = ""

    def __str__(self) -> str:
        return " ".join(filter(None, ["ok" if self.ok else "fail", self.name, self.detail]))


Checks = Callable[[], Iterable[Check]]
Routes = Mapping[str, Callable[[], tuple[list[tuple[str, str]], bytes]]]
"""By path, or path and query, the function that returns headers and body. An unknown query is none."""


class HealthServer:
    """Bound when it is made, answering from ``start()`` to ``stop()``.

    ``liveness``, ``readiness`` and further ``routes`` are called for each request, in a thread of the server: they read
    values that other threads replace whole, and never wait. Port 0 takes a free one, which ``port`` returns.
    ``hosts``: further names under which the routes may be requested. ``request_limit_s``: seconds from the connection
    to the last byte of the answer, however slowly either comes. Raises UsageError where host and port cannot be bound.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        registry: CollectorRegistry,
        liveness: Checks,
        readiness: Checks,
        routes: Routes | None = None,
        hosts: Iterable[str] = (),
        supervisor: Supervisor | None = None,
        request_limit_s: float = 5.0,
    ) -> None:
        self._supervisor = supervisor or Supervisor()
        self._stopping = threading.Event()
        server_class = _ThreadingServerV6 if ":" in host else _ThreadingServer
        try:
            self._server = server_class((host, port), _SilentRequestHandler, request_limit_s)
        except (OSError, TypeError, UnicodeError) as error:  # the last two: a name that cannot be looked up
            why = error.strerror if isinstance(error, OSError) else "no host has such a name"
            raise UsageError(
                f"cannot serve metrics and health on {host} port {port}: {why}",
                hint="choose another --http-host or --http-port; port 0 switches them off",
            ) from None
        not_for_children(self._server)
        self._server.set_app(_Application(registry, liveness, readiness, routes or {}, hosts=(host, *hosts)))
        self._thread = threading.Thread(target=self._kept, name="cdc-health", daemon=True)
        self.port: int = self._server.server_port

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Returns when the port is free again. May be called without ``start``, and twice."""
        self._stopping.set()
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()

    def _kept(self) -> None:
        self._supervisor.keep_here("health", lambda: self._server.serve_forever(_POLL_S), self._stopping)


_Response = tuple[str, list[tuple[str, str]], bytes]


class _Application:
    def __init__(
        self, registry: CollectorRegistry, liveness: Checks, readiness: Checks, routes: Routes, *, hosts: Iterable[str]
    ) -> None:
        self._hosts = frozenset(name.lower() for name in hosts)
        self._exposition = make_wsgi_app(registry)
        self._checks = {"/livez": liveness, "/readyz": readiness}
        self._routes = routes
        self._list = "".join(f"{path}\n" for path in (*_ROUTES, *routes) if "?" not in path)

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        status, headers, body = self._respond(environ)
        if _NO_SNIFF not in headers:
            headers = [*headers, _NO_SNIFF]
        start_response(status, [*headers, ("Content-Length", str(len(body)))])
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]

    def _respond(self, environ: WSGIEnvironment) -> _Response:
        path = environ["PATH_INFO"]
        if environ["REQUEST_METHOD"] not in {"GET", "HEAD"}:
            return _text("405 Method Not Allowed", "only GET and HEAD\n")
        if path == "/metrics":
            return self._metrics(environ)
        if path in self._checks:
            return _answer(path, self._checks[path])
        if path in self._routes and not answers_to(environ.get("HTTP_HOST"), self._hosts):
            hint = "ask by an address or as localhost, or allow the name: http.hosts, --http-hosts, CDC_HTTP_HOSTS\n"
            return _text("421 Misdirected Request", f"this consumer has no such name\n{hint}")
        if path in self._routes:
            asked = f"{path}?{environ.get('QUERY_STRING', '')}"
            return "200 OK", *self._routes[asked if asked in self._routes else path]()
        return _text("200 OK", self._list) if path == "/" else _text("404 Not Found", f"there is only\n{self._list}")

    def _metrics(self, environ: WSGIEnvironment) -> _Response:
        started: list[tuple[str, list[tuple[str, str]]]] = []
        # The Prometheus client's application does not know HEAD.
        chunks = self._exposition({**environ, "REQUEST_METHOD": "GET"}, lambda *response: started.append(response))
        status, headers = started[0]
        return status, headers, b"".join(chunks)


def answers_to(host: str | None, names: Collection[str]) -> bool:
    """Whether a request with this Host may see the page. ``names``: in lower case, besides those of this machine.

    A request without a Host comes from no browser.
    """
    if host is None:
        return True
    name = host.strip().lower()
    name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
    name = name.removesuffix(".")
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name in names or name == "localhost" or name.endswith(".localhost")
    return True


def _text(status: str, text: str) -> _Response:
    return status, [("Content-Type", "text/plain; charset=utf-8")], text.encode()


def _answer(path: str, checks: Checks) -> _Response:
    try:
        results = list(checks())
    except Exception as error:
        # A probe that fails must not report success, nor break the other routes.
        log.exception("a health check failed", extra={"path": path})
        results = [Check(path.strip("/"), ok=False, detail=type(error).__name__)]
    lines = results or [Check(path.strip("/"), ok=True)]
    status = "200 OK" if all(check.ok for check in lines) else "503 Service Unavailable"
    return _text(status, "".join(f"{check}\n" for check in lines))


class _ThreadingServer(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    block_on_close = False  # a slow client must not delay the stop
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], handler: type[WSGIRequestHandler], request_limit_s: float) -> None:
        self.request_limit_s = request_limit_s
        self._open: dict[socket.socket, float] = {}
        """When each was opened, the oldest first."""
        self._lock = threading.Lock()
        self._rest = threading.Event()
        super().__init__(address, handler)

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            return super().get_request()
        except OSError:
            self._rest.wait(_REST_S)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            oldest = next(iter(self._open)) if len(self._open) >= _CONNECTIONS_MAX else None
            self._open[request] = time.monotonic()
        if oldest is not None:
            self._let_go(oldest)
        super().process_request(request, client_address)

    def service_actions(self) -> None:
        """Called by the library every _POLL_S, and after each connection."""
        with self._lock:
            overdue = [one for one, since in self._open.items() if time.monotonic() - since > self.request_limit_s]
        for request in overdue:
            self._let_go(request)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def _let_go(self, request: socket.socket) -> None:
        """End the connection under its thread, whatever that thread waits for."""
        with self._lock:
            if self._open.pop(request, None) is not None:
                with contextlib.suppress(OSError):
                    request.shutdown(socket.SHUT_RDWR)

    def server_bind(self) -> None:
        # HTTPServer's method asks the name service for the host's full name, which may take seconds.
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]  # str, int for TCP
        self.setup_environ()

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("a health client went away", exc_info=True)


class _ThreadingServerV6(_ThreadingServer):
    address_family = socket.AF_INET6


class _BoundedReader(io.BufferedReader):
    """Ends after a fixed number of bytes; the library would accept a hundred headers of 64 kB each."""

    left = _REQUEST_MAX

    def readline(self, size: int | None = -1, /) -> bytes:
        line = super().readline(self.left if size is None or size < 0 else min(size, self.left))
        self.left -= len(line)
        return line


class _SilentRequestHandler(WSGIRequestHandler):
    server: _ThreadingServer

    def setup(self) -> None:
        super().setup()
        self.connection.settimeout(self.server.request_limit_s)
        self.rfile = _BoundedReader(self.connection.makefile("rb", buffering=0))

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name in http.server
        """Not logged: a probe every few seconds would fill most of the log."""
