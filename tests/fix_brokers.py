"""Brokers that changes are delivered to: real servers on loopback, thrown away with their test.

A test is skipped where its server is not installed; CDC_REQUIRE_BROKERS=1 makes that a failure.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import nats
import pytest
from redis.asyncio import Redis

from cdc.contrib.demo.temp_server import free_port
from tests.eventually import eventually


class TlsFiles(NamedTuple):
    """An authority, and a certificate for 127.0.0.1 that it has signed, for servers and clients."""

    ca: Path
    cert: Path
    key: Path


def tls_files(folder: Path) -> TlsFiles:
    files = TlsFiles(folder / "ca.pem", folder / "cert.pem", folder / "key.pem")
    request = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"]
    authority = ["-keyout", str(folder / "ca.key"), "-out", str(files.ca), "-subj", "/CN=authority"]
    signed = ["-CA", str(files.ca), "-CAkey", str(folder / "ca.key"), "-addext", "subjectAltName=IP:127.0.0.1"]
    ours = [
        "-keyout",
        str(files.key),
        "-out",
        str(files.cert),
        "-subj",
        "/CN=cdc",
        "-addext",
        "basicConstraints=CA:FALSE",
    ]
    for more in (authority, ours + signed):
        subprocess.run([*request, *more], check=True, capture_output=True)
    return files


class Received(NamedTuple):
    """``name``: of the topic, subject, stream or routing key."""

    name: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def event(self) -> dict[str, Any]:
        """Of structured mode."""
        return json.loads(self.body)


Server = TypeVar("Server", bound="BrokerServer")


class BrokerServer:
    """A server on a port of its own, which it keeps over a restart. ``options`` follow those that it needs."""

    scheme = ""
    program = ""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder = folder
        self.port = free_port()
        self.options: Sequence[str] = options
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def command(self) -> list[str]:
        raise NotImplementedError

    def url(self, template: str = "") -> str:
        """To deliver to."""
        raise NotImplementedError

    def tls_options(self, files: TlsFiles) -> list[str]:
        """To start it with, so that it speaks TLS only, and wants a certificate of its clients."""
        raise NotImplementedError

    async def prepare(self) -> None:
        """Make what does not come by itself with the first message."""

    async def received(self) -> list[Received]:
        """All that is in it, in the order in which a consumer reads it."""
        raise NotImplementedError

    def start(self) -> None:
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(self.command(), stdout=log, stderr=log, cwd=self.folder)
        eventually(self._listens, what=f"{self.program} listens")

    def _listens(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self.folder / "server.log").read_text()
        with socket.socket() as probe:
            probe.settimeout(1)
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        """It answers nothing, and its connections stay."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def restart(self, *options: str) -> None:
        self.kill()
        self.options = options or self.options
        self.start()


class NatsServer(BrokerServer):
    scheme, program = "nats", "nats-server"

    def command(self) -> list[str]:
        return [
            self.program, "--addr", "127.0.0.1", "--port", str(self.port), "--jetstream",
            "--store_dir", str(self.folder / "store"), *self.options,
        ]  # fmt: skip

    def url(self, template: str = "cdc.{type}") -> str:
        return f"nats://{self.address}/{template}"

    async def prepare(self, **limits: Any) -> None:
        async with await nats.connect(f"nats://{self.address}") as client:
            await client.jetstream().add_stream(name="CDC", subjects=["cdc.>"], **limits)

    def tls_options(self, files: TlsFiles) -> list[str]:
        return [
            "--tlsverify", "--tlscacert", str(files.ca), "--tlscert", str(files.cert), "--tlskey", str(files.key),
        ]  # fmt: skip

    async def change(self, **limits: Any) -> None:
        async with await nats.connect(f"nats://{self.address}") as client:
            await client.jetstream().update_stream(name="CDC", subjects=["cdc.>"], **limits)

    async def received(self) -> list[Received]:
        async with await nats.connect(f"nats://{self.address}") as client:
            stream = client.jetstream()
            last = (await stream.stream_info("CDC")).state.messages
            reader = await stream.subscribe("cdc.>", ordered_consumer=True)
            found = [await reader.next_msg(timeout=10) for _ in range(last)]
        return [Received(each.subject, each.headers or {}, each.data) for each in found]


class RedisServer(BrokerServer):
    scheme, program = "redis", "redis-server"

    def command(self) -> list[str]:
        return [
            self.program, "--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(self.folder),
            "--appendonly", "yes", "--appendfsync", "everysec", *self.options,
        ]  # fmt: skip

    def url(self, template: str = "cdc:{type}") -> str:
        return f"redis://{self.address}/0/{template}"

    def tls_options(self, files: TlsFiles) -> list[str]:
        return [
            "--port", "0", "--tls-port", str(self.port), "--tls-ca-cert-file", str(files.ca),
            "--tls-cert-file", str(files.cert), "--tls-key-file", str(files.key),
        ]  # fmt: skip

    async def set(self, setting: str, value: str) -> None:
        async with Redis(port=self.port) as client:
            await client.config_set(setting, value)

    async def put(self, key: str, text: str) -> None:
        async with Redis(port=self.port) as client:
            await client.set(key, text)

    async def received(self) -> list[Received]:
        async with Redis(port=self.port, decode_responses=True) as client:
            streams = sorted(await client.keys("*"))
            found: list[tuple[str, Any]] = [
                (str(name), fields) for name in streams for _, fields in await client.xrange(name)
            ]
        return [Received(name, fields, fields["event"].encode()) for name, fields in found]


def _running(server: Server) -> Iterator[Server]:
    if shutil.which(server.program, path=f"{os.environ.get('PATH', '')}:/usr/sbin") is None:
        assert not os.environ.get("CDC_REQUIRE_BROKERS"), f"there is no {server.program}"
        pytest.skip(f"there is no {server.program}: deploy/debian-setup --with-brokers")
    server.start()
    try:
        yield server
    finally:
        server.kill()


BROKERS = {server.scheme: server for server in (NatsServer, RedisServer)}


@pytest.fixture
def nats_server(tmp_path: Path) -> Iterator[NatsServer]:
    yield from _running(NatsServer(tmp_path))


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    yield from _running(RedisServer(tmp_path))


@pytest.fixture(params=list(BROKERS))
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BrokerServer]:
    """Each of them in turn."""
    yield from _running(BROKERS[request.param](tmp_path))
