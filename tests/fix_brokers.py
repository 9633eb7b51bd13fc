"""Brokers that changes are delivered to: real servers on loopback, thrown away with their test.

A test is skipped where its server is not installed; CDC_REQUIRE_BROKERS=1 makes that a failure.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import aio_pika
import nats
import pytest
from confluent_kafka import Consumer, TopicPartition
from confluent_kafka import Message as Record
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # it has them, and does not say so
    AdminClient,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)
from confluent_kafka.cimpl import NewTopic
from psycopg.conninfo import make_conninfo
from redis.asyncio import Redis

from cdc.contrib.demo.temp_server import free_port
from tests.eventually import eventually
from tests.fix_proxy import Proxy

_RABBITMQ = "/usr/lib/rabbitmq/bin/rabbitmq-server"
_RABBITMQ_CTL = "/usr/lib/rabbitmq/bin/rabbitmqctl"
"""Not those of the PATH, which want to be another user."""
KAFKA_JARS = Path(__file__).parent.parent / ".venv-kafka"


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
    key: str = ""

    @property
    def event(self) -> dict[str, Any]:
        """Of structured mode."""
        return json.loads(self.body)


Server = TypeVar("Server", bound="BrokerServer")


class BrokerServer:
    """A server on a port of its own, which it keeps over a restart. ``options`` follow those that it needs."""

    scheme = ""
    program = ""
    starts_s = 30.0
    refused = "Connection refused"
    """Why it cannot be reached while it does not run."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder = folder
        self.port = free_port()
        self.options: Sequence[str] = options
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """What it needs on top of the environment of the test."""
        return {}

    def command(self) -> list[str]:
        raise NotImplementedError

    def url(self, template: str = "", port: int = 0) -> str:
        """To deliver to. ``port``: another one than its own, such as that of a proxy."""
        raise NotImplementedError

    def proxy(self) -> Proxy:
        """Before this server, not started."""
        return Proxy(make_conninfo("", host="127.0.0.1", port=self.port))

    def tls_options(self, files: TlsFiles) -> list[str]:
        """To start it with, so that it speaks TLS only, and wants a certificate of its clients."""
        raise NotImplementedError

    async def prepare(self) -> None:
        """Make what does not come by itself with the first message."""

    async def remove(self) -> None:
        """Take away what ``prepare`` has made, with all that is in it; ``prepare_again`` makes it again."""
        raise NotImplementedError

    async def prepare_again(self) -> None:
        await self.prepare()

    async def received(self) -> list[Received]:
        """All that is in it, in the order in which a consumer reads it."""
        raise NotImplementedError

    async def fill(self) -> None:
        """From now on it takes nothing, until ``make_room``."""
        raise NotImplementedError

    async def make_room(self) -> None:
        raise NotImplementedError

    async def let_in(self, user: str, password: str) -> None:
        """A login that may do everything. Of a user that there is, the password is another one: connections end."""
        raise NotImplementedError

    def login_url(self) -> str:
        """To deliver to as such a user."""
        return self.url()

    def start(self) -> None:
        self._launch()
        eventually(self._listens, within_s=self.starts_s, what=f"{self.program} listens")

    def _launch(self) -> None:
        with (self.folder / "server.log").open("ab") as log:
            # In a group of its own: what is started by a script ends with it.
            self._process = subprocess.Popen(
                self.command(), stdout=log, stderr=log, cwd=self.folder, env={**os.environ, **self.environment},
                start_new_session=True,
            )  # fmt: skip

    def _listens(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self.folder / "server.log").read_text()
        return self._answers()

    def _answers(self) -> bool:
        with socket.socket() as probe:
            probe.settimeout(1)
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    @property
    def running(self) -> bool:
        return self._process is not None

    @property
    def has_ended(self) -> bool:
        return self._process is None or self._process.poll() is not None

    def kill(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):  # it has ended by itself
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
            eventually(lambda: not self._answers(), what=f"{self.program} is gone")

    def end(self) -> None:
        """For good, with all that belongs to it."""
        self.kill()

    def pause(self) -> None:
        """It answers nothing, and its connections stay."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGCONT)

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

    def url(self, template: str = "cdc.{type}", port: int = 0) -> str:
        return f"nats://127.0.0.1:{port or self.port}/{template}"

    async def prepare(self, **limits: Any) -> None:
        async with await nats.connect(f"nats://{self.address}") as client:
            await client.jetstream().add_stream(name="CDC", subjects=["cdc.>"], **limits)

    async def remove(self) -> None:
        async with await nats.connect(f"nats://{self.address}") as client:
            await client.jetstream().delete_stream("CDC")

    def tls_options(self, files: TlsFiles) -> list[str]:
        return [
            "--tlsverify", "--tlscacert", str(files.ca), "--tlscert", str(files.cert), "--tlskey", str(files.key),
        ]  # fmt: skip

    async def fill(self) -> None:
        async with await nats.connect(f"nats://{self.address}") as client:
            count = (await client.jetstream().stream_info("CDC")).state.messages
        await self.change(max_msgs=count, discard="new")

    async def make_room(self) -> None:
        await self.change()

    async def let_in(self, user: str, password: str) -> None:
        """Who says nothing is the other one: the test itself. A reload would lose its streams."""
        logins = f'{{user: {user}, password: "{password}"}}, {{user: test, password: "test"}}'
        settings = self.folder / "logins.conf"
        settings.write_text(f"authorization {{ users: [{logins}] }}\nno_auth_user: test\n")
        await asyncio.to_thread(self.restart, "--config", str(settings))

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

    def url(self, template: str = "cdc:{type}", port: int = 0) -> str:
        return f"redis://127.0.0.1:{port or self.port}/0/{template}"

    def tls_options(self, files: TlsFiles) -> list[str]:
        return [
            "--port", "0", "--tls-port", str(self.port), "--tls-ca-cert-file", str(files.ca),
            "--tls-cert-file", str(files.cert), "--tls-key-file", str(files.key),
        ]  # fmt: skip

    async def set(self, setting: str, value: str) -> None:
        async with Redis(port=self.port) as client:
            await client.config_set(setting, value)

    async def fill(self) -> None:
        await self.set("maxmemory", "1")

    async def make_room(self) -> None:
        await self.set("maxmemory", "0")

    async def let_in(self, user: str, password: str) -> None:
        async with Redis(port=self.port) as client:
            await client.execute_command("ACL", "SETUSER", user, "on", "resetpass", f">{password}", "~*", "&*", "+@all")
            await client.execute_command("CLIENT", "KILL", "USER", user)

    async def put(self, key: str, text: str) -> None:
        async with Redis(port=self.port) as client:
            await client.set(key, text)

    async def remove(self) -> None:
        async with Redis(port=self.port) as client:
            await client.flushall()

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


class KafkaServer(BrokerServer):
    """One node that is broker and controller. It takes seconds to start, so it is there for all tests of a run."""

    scheme, program = "kafka", "java"
    jars = KAFKA_JARS
    starts_s = 120.0
    refused = "no connection"

    def __init__(self, folder: Path, more: Mapping[str, str] | None = None) -> None:
        """``more``: settings that come on top of those that it needs."""
        super().__init__(folder)
        self.secure_port, self.login_port, self._controller_port = free_port(), free_port(), free_port()
        self._proxied_port, self._proxy_port = free_port(), free_port()
        self.files = tls_files(folder)
        self._prefix = ""
        self._types: Sequence[str] = ()
        chain = folder / "server.pem"
        chain.write_text(self.files.key.read_text() + self.files.cert.read_text())
        listener = {
            "PLAINTEXT": self.port, "SSL": self.secure_port, "SASL_PLAINTEXT": self.login_port,
            "PROXIED": self._proxied_port,
        }  # fmt: skip
        sasl, modules = "listener.name.sasl_plaintext", "org.apache.kafka.common.security"
        settings = {
            "process.roles": "broker,controller",
            "node.id": 1,
            "controller.quorum.voters": f"1@127.0.0.1:{self._controller_port}",
            "listeners": _written({**listener, "CONTROLLER": self._controller_port}),
            "advertised.listeners": _written({**listener, "PROXIED": self._proxy_port}),
            "controller.listener.names": "CONTROLLER",
            "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,SSL:SSL,SASL_PLAINTEXT:SASL_PLAINTEXT,"
            "PROXIED:PLAINTEXT,CONTROLLER:PLAINTEXT",
            "log.dirs": folder / "data",
            "num.partitions": 4,
            "auto.create.topics.enable": "false",
            "offsets.topic.replication.factor": 1,
            "transaction.state.log.replication.factor": 1,
            "transaction.state.log.min.isr": 1,
            "ssl.keystore.type": "PEM",
            "ssl.keystore.location": chain,
            "ssl.truststore.type": "PEM",
            "ssl.truststore.location": self.files.ca,
            "listener.name.ssl.ssl.client.auth": "required",
            "sasl.enabled.mechanisms": "PLAIN,SCRAM-SHA-256,SCRAM-SHA-512,OAUTHBEARER",
            f"{sasl}.plain.sasl.jaas.config": f'{modules}.plain.PlainLoginModule required user_app="hunter";',
            **{
                f"{sasl}.scram-sha-{bits}.sasl.jaas.config": f"{modules}.scram.ScramLoginModule required;"
                for bits in (256, 512)
            },
            # Tokens without a signature, as RFC 7515 has them.
            f"{sasl}.oauthbearer.sasl.jaas.config": f"{modules}.oauthbearer.OAuthBearerLoginModule required;",
            **(more or {}),
        }
        self._settings = folder / "server.properties"
        self._settings.write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
        users = [f"SCRAM-SHA-{bits}=[name=app,password=hunter]" for bits in (256, 512)]
        self._java(
            "kafka.tools.StorageTool", "format", "-t", "AAAAAAAAAAAAAAAAAAAAAA", "-c", str(self._settings),
            *(part for user in users for part in ("--add-scram", user)),
        )  # fmt: skip

    def _java(self, *arguments: str) -> None:
        subprocess.run([*self._program(), *arguments], check=True, capture_output=True)

    def _program(self) -> list[str]:
        return [
            "java", "-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-cp", f"{self.jars}/*",
        ]  # fmt: skip

    def command(self) -> list[str]:
        return [*self._program(), "kafka.Kafka", str(self._settings)]

    def proxy(self) -> Proxy:
        """On the port that this server names to who comes through it."""
        return Proxy(make_conninfo("", host="127.0.0.1", port=self._proxied_port), self._proxy_port)

    def url(self, template: str = "{type}", port: int = 0) -> str:
        return f"kafka://127.0.0.1:{port or self.port}/{self._prefix}.{template}"

    async def let_in(self, user: str, password: str) -> None:
        """It keeps the connections of who is logged in: only a restart ends them."""
        login = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_256, 4_096)
        admin = AdminClient({"bootstrap.servers": self.address})
        changed = UserScramCredentialUpsertion(user, login, password.encode())
        [made] = admin.alter_user_scram_credentials([changed]).values()
        await asyncio.to_thread(made.result, 30)
        await asyncio.to_thread(self.restart)

    def login_url(self) -> str:
        return f"{self.url(port=self.login_port)}?sasl=SCRAM-SHA-256"

    async def prepare(self, types: Sequence[str] = ("x", "order", "wanted"), **limits: str) -> None:
        self._prefix, self._types = f"cdc-{uuid.uuid4().hex[:8]}", types
        await self._create(limits)

    async def _create(self, limits: Mapping[str, str]) -> None:
        topics = [NewTopic(f"{self._prefix}.{each}", 4, 1, config=dict(limits)) for each in self._types]
        admin = AdminClient({"bootstrap.servers": self.address})
        for made in (await asyncio.to_thread(admin.create_topics, topics)).values():
            await asyncio.to_thread(made.result, 30)

    async def remove(self) -> None:
        topics = [f"{self._prefix}.{each}" for each in self._types]
        admin = AdminClient({"bootstrap.servers": self.address})
        for gone in (await asyncio.to_thread(admin.delete_topics, topics)).values():
            await asyncio.to_thread(gone.result, 30)

        def forgotten() -> bool:
            return not set(topics) & set(admin.list_topics(timeout=10).topics)

        await asyncio.to_thread(eventually, forgotten, what="the broker knows the topics no more")

    async def prepare_again(self) -> None:
        await self._create({})

    async def received(self) -> list[Received]:
        return await asyncio.to_thread(read_topics, self.address, self._prefix)


def read_topics(servers: str, prefix: str) -> list[Received]:
    """All records of the topics whose names begin with this, each partition in its order."""
    reader = Consumer({"bootstrap.servers": servers, "group.id": prefix, "enable.auto.commit": False})
    try:
        topics = [each for name, each in reader.list_topics(timeout=10).topics.items() if name.startswith(prefix)]
        parts = [TopicPartition(each.topic, number, 0) for each in topics for number in each.partitions]
        left = sum(reader.get_watermark_offsets(part, timeout=10)[1] for part in parts)
        reader.assign(parts)
        found = []
        while left:
            records = reader.consume(left, timeout=10)
            assert records, f"{left} records are missing"
            left -= len(records)
            found += records
    finally:
        reader.close()
    return [_of_kafka(record) for record in found]


class RabbitServer(BrokerServer):
    """A node with a port mapper of its own. It takes seconds to start, so it is there for all tests of a run."""

    scheme, program = "amqp", "rabbitmq-server"
    starts_s = 120.0

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.secure_port, self._mapper_port, self._nodes_port = free_port(), free_port(), free_port()
        self.files = tls_files(folder)
        (folder / "plugins").write_text("[].\n")
        (folder / "rabbitmq.conf").write_text(
            f"listeners.tcp.1 = {self.address}\nlisteners.ssl.1 = 127.0.0.1:{self.secure_port}\n"
            f"ssl_options.cacertfile = {self.files.ca}\nssl_options.certfile = {self.files.cert}\n"
            f"ssl_options.keyfile = {self.files.key}\n"
            "ssl_options.verify = verify_peer\nssl_options.fail_if_no_peer_cert = true\n"
            "distribution.listener.interface = 127.0.0.1\nmax_message_size = 2000000\nlog.file.level = warning\n"
        )
        self._mapper: subprocess.Popen[bytes] | None = None
        self._exchange = ""
        self._users: set[str] = set()

    def command(self) -> list[str]:
        return [_RABBITMQ]

    @property
    def environment(self) -> dict[str, str]:
        mapper = {"ERL_EPMD_PORT": str(self._mapper_port), "ERL_EPMD_ADDRESS": "127.0.0.1"}
        ours = {"MNESIA_BASE": "data", "LOG_BASE": "log", "CONFIG_FILE": "rabbitmq.conf", "PID_FILE": "pid",
                "ENABLED_PLUGINS_FILE": "plugins", "CONF_ENV_FILE": "none"}  # fmt: skip
        places = {f"RABBITMQ_{name}": str(self.folder / file) for name, file in ours.items()}
        node = {"RABBITMQ_NODENAME": f"cdc{self.port}@localhost", "RABBITMQ_DIST_PORT": str(self._nodes_port)}
        return {"HOME": str(self.folder), **mapper, **places, **node}

    def _launch(self) -> None:
        if self._mapper is None:
            self._mapper = subprocess.Popen(["epmd"], env={**os.environ, **self.environment})
        super()._launch()

    def start(self) -> None:
        super().start()
        self.control("await_startup")  # it listens before it takes what an operator says

    async def fill(self) -> None:
        """An alarm: it confirms nothing more to who publishes."""
        await asyncio.to_thread(self.control, "set_disk_free_limit", "1000000GB")

    async def make_room(self) -> None:
        await asyncio.to_thread(self.control, "set_disk_free_limit", "1MB")

    async def let_in(self, user: str, password: str) -> None:
        if user in self._users:
            await asyncio.to_thread(self.control, "change_password", user, password)
            await asyncio.to_thread(self.control, "close_all_connections", "another password")
            return
        self._users.add(user)
        await asyncio.to_thread(self.control, "add_user", user, password)
        await asyncio.to_thread(self.control, "set_permissions", user, ".*", ".*", ".*")

    def control(self, *command: str) -> None:
        """What an operator does by rabbitmqctl."""
        environment = {**os.environ, **self.environment}
        subprocess.run([_RABBITMQ_CTL, *command], env=environment, check=True, capture_output=True)

    def end(self) -> None:
        self.kill()
        if self._mapper is not None:
            self._mapper.kill()
            self._mapper.wait()

    def url(self, template: str = "{type}", port: int = 0) -> str:
        return f"amqp://127.0.0.1:{port or self.port}/%2F/{self._exchange}/{template}"

    async def prepare(self, *, bound: str = "#", limits: dict[str, Any] | None = None) -> None:
        self._exchange = f"cdc-{uuid.uuid4().hex[:8]}"
        await self._declare(bound, limits)

    async def _declare(self, bound: str, limits: dict[str, Any] | None) -> None:
        async with await aio_pika.connect(f"amqp://guest:guest@{self.address}/") as connection:
            channel = await connection.channel()
            exchange = await channel.declare_exchange(self._exchange, "topic", durable=True)
            queue = await channel.declare_queue(self._exchange, durable=True, arguments=limits)
            await queue.bind(exchange, bound)

    async def remove(self) -> None:
        async with await aio_pika.connect(f"amqp://guest:guest@{self.address}/") as connection:
            channel = await connection.channel()
            await channel.queue_delete(self._exchange)
            await channel.exchange_delete(self._exchange)

    async def prepare_again(self) -> None:
        await self._declare("#", None)

    async def received(self) -> list[Received]:
        async with await aio_pika.connect(f"amqp://guest:guest@{self.address}/") as connection:
            queue = await (await connection.channel()).get_queue(self._exchange)
            count = queue.declaration_result.message_count or 0
            found = [await queue.get(no_ack=True, timeout=10) for _ in range(count)]
        return [
            Received(
                each.routing_key or "",
                {"content-type": str(each.content_type), **{name: str(value) for name, value in each.headers.items()}},
                each.body,
                str(each.message_id),
            )
            for each in found
            if each is not None
        ]


def _written(listeners: Mapping[str, int]) -> str:
    return ",".join(f"{name}://127.0.0.1:{port}" for name, port in listeners.items())


def _of_kafka(record: Record) -> Received:
    headers: Any = record.headers() or []
    key: Any = record.key()
    body: Any = record.value()
    return Received(
        str(record.topic()), {name: value.decode() for name, value in headers}, body or b"", (key or b"").decode()
    )


BROKERS = {server.scheme: server for server in (NatsServer, RedisServer)}


def _again(server: Server) -> Iterator[Server]:
    """As the test before found it."""
    if not server.running:
        server.start()
    yield server
    if server.running:
        server.resume()


@pytest.fixture(scope="session")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaServer]:
    if shutil.which("java") is None or not any(KAFKA_JARS.glob("kafka_*.jar")):
        assert not os.environ.get("CDC_REQUIRE_BROKERS"), "there is no Java, or no Kafka"
        pytest.skip("there is no Kafka: deploy/debian-setup --with-brokers, make kafka")
    server = KafkaServer(tmp_path_factory.mktemp("kafka"))
    server.start()
    try:
        yield server
    finally:
        server.kill()


@pytest.fixture
def kafka_server(kafka: KafkaServer) -> Iterator[KafkaServer]:
    yield from _again(kafka)


@pytest.fixture
def nats_server(tmp_path: Path) -> Iterator[NatsServer]:
    yield from _running(NatsServer(tmp_path))


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    yield from _running(RedisServer(tmp_path))


@pytest.fixture(scope="session")
def rabbit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitServer]:
    if not Path(_RABBITMQ).exists():
        assert not os.environ.get("CDC_REQUIRE_BROKERS"), "there is no RabbitMQ"
        pytest.skip("there is no rabbitmq-server: deploy/debian-setup --with-brokers")
    server = RabbitServer(tmp_path_factory.mktemp("rabbit"))
    try:
        server.start()
        yield server
    finally:
        server.end()


@pytest.fixture
def rabbit_server(rabbit: RabbitServer) -> Iterator[RabbitServer]:
    yield from _again(rabbit)


@pytest.fixture(params=list(BROKERS))
def small_broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BrokerServer]:
    """Those that start in a moment, so that each test has its own."""
    yield from _running(BROKERS[request.param](tmp_path))


@pytest.fixture(params=["kafka", "amqp", *BROKERS])
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BrokerServer]:
    """Each of them in turn."""
    if request.param == "kafka":
        yield request.getfixturevalue("kafka_server")
    elif request.param == "amqp":
        yield request.getfixturevalue("rabbit_server")
    else:
        yield from _running(BROKERS[request.param](tmp_path))
