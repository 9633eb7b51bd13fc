"""The images, running: on the machine's own network, where all that listens is on the loopback."""

from __future__ import annotations

import http.client
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import psycopg
from prometheus_client.parser import text_string_to_metric_families
from psycopg import sql
from psycopg.conninfo import make_conninfo
from testcontainers.core.container import DockerContainer

from cdc.contrib.demo.temp_server import free_port
from tests.container.images import CONSUMER, DATABASE
from tests.eventually import eventually

LOCKED_DOWN: dict[str, Any] = {
    "read_only": True,
    "cap_drop": ["ALL"],
    "security_opt": ["no-new-privileges"],
    "mem_limit": "256m",
}
"""What the manifests ask for, without their /tmp: the consumer itself writes nothing."""
_OFTEN = {"test": [], "interval": 1_000_000_000}
"""The check of the image, each second."""


Mounts = Iterable[tuple[Path | str, str, str]]
"""Each from where, to where, and ``ro`` or ``rw``."""


def container(image: str, env: dict[str, str], mounts: Mounts, **options: Any) -> DockerContainer:
    made = DockerContainer(image).with_envs(**env).with_kwargs(network_mode="host", **options)
    for here, there, mode in mounts:
        made.with_volume_mapping(here, there, mode)
    return made


def run(
    image: str, *command: str, env: dict[str, str] | None = None, mounts: Mounts = (), **options: Any
) -> tuple[int, str]:
    """To its end; the exit code and what it printed."""
    with container(image, env or {}, mounts, **options).with_command(list(command)) as running:
        code = running.get_wrapped_container().wait(timeout=60)["StatusCode"]
        return int(code), b"".join(running.get_logs()).decode()


class Database:
    """A server of the image DATABASE, reachable with a password on 127.0.0.1."""

    def __init__(self) -> None:
        self._password = uuid.uuid4().hex
        self.port = free_port()
        settings = {"port": str(self.port), "listen_addresses": "127.0.0.1", "log_connections": "on",
                    "log_disconnections": "on", "log_line_prefix": "%n %p "}  # fmt: skip
        command = ["postgres", *(word for item in settings.items() for word in ("-c", "=".join(item)))]
        self._container = container(DATABASE, {"POSTGRES_PASSWORD": self._password}, []).with_command(command)

    def __enter__(self) -> Database:
        self._container.start()
        try:
            eventually(self._answers, within_s=60, what="the server answers")
        except AssertionError as silent:
            silent.add_note(self.log)
            self._container.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._container.stop()

    @property
    def log(self) -> str:
        return b"".join(self._container.get_logs()).decode()

    def dsn(self, **parts: str) -> str:
        superuser = {"user": "postgres", "password": self._password, "dbname": "postgres"}
        return make_conninfo(host="127.0.0.1", port=self.port, **superuser | parts)

    def _answers(self) -> bool:
        try:
            psycopg.connect(self.dsn()).close()
        except psycopg.OperationalError:
            return False
        return True


def create_consumer_role(admin: psycopg.Connection, name: str) -> str:
    """With the rights that the README gives the consumer, by way of the role ``consumers``; its password."""
    password = uuid.uuid4().hex
    create = sql.SQL("CREATE ROLE {} LOGIN REPLICATION PASSWORD {} IN ROLE consumers")
    admin.execute(create.format(sql.Identifier(name), sql.Literal(password)))
    return password


class Consumer:
    """A container of ``image`` that runs ``cdc run``; ``name`` is the role it works as."""

    def __init__(self, name: str, env: dict[str, str], mounts: Mounts, *, image: str = CONSUMER) -> None:
        self.name = name
        self.port = free_port()
        self.ended_at: float | None = None
        env = {"CDC_HTTP_HOST": "127.0.0.1", "CDC_HTTP_PORT": str(self.port), **env}
        self._container = container(image, env, mounts, healthcheck=_OFTEN, **LOCKED_DOWN).start()

    @property
    def log(self) -> str:
        return b"".join(self._container.get_logs()).decode()

    def wait_for(self, text: str) -> None:
        def said() -> bool:
            assert self._state()["Running"], self.log
            return text in self.log

        eventually(said, within_s=60, what=f"the log of {self.name} saying {text!r}")

    def wait_until_healthy(self) -> None:
        """By the engine's own opinion: the image's check has run."""
        eventually(lambda: self._state()["Health"]["Status"] == "healthy", within_s=60, what=f"{self.name} is healthy")

    def get(self, path: str) -> tuple[int, str]:
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            link.request("GET", path)
            answer = link.getresponse()
            return answer.status, answer.read().decode()
        finally:
            link.close()

    def metric(self, name: str, **labels: str) -> float:
        """Scraped; summed over the labels that are not named."""
        return sum(
            sample.value
            for family in text_string_to_metric_families(self.get("/metrics")[1])
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def terminate(self) -> tuple[int, float]:
        """As an orchestrator stops it: SIGTERM to its process number 1. The exit code, and the seconds it took."""
        began = time.monotonic()
        self._container.get_wrapped_container().kill("SIGTERM")
        return self._ended(), time.monotonic() - began

    def kill(self) -> None:
        self.ended_at = time.time()  # nothing that it does comes later
        self._container.get_wrapped_container().kill("SIGKILL")
        self._ended()

    def _ended(self) -> int:
        code = int(self._container.get_wrapped_container().wait(timeout=60)["StatusCode"])
        self.ended_at = self.ended_at or time.time()
        return code

    def _state(self) -> dict[str, Any]:
        self._container.reload()
        state: dict[str, Any] = self._container.get_wrapped_container().attrs["State"]
        return state

    def remove(self) -> None:
        self._container.stop()
