"""Brokers of the tests that are containers: of the images that Compose names, or of what stands in for them."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
from testcontainers.core.container import DockerContainer

from tests import compose
from tests.container.containers import Mounts, container, run
from tests.container.images import broker_image
from tests.eventually import eventually
from tests.fix_brokers import KAFKA_JARS, BrokerServer, KafkaServer, NatsServer, RabbitServer, RedisServer


class _Contained(BrokerServer):
    """On the machine's own network, and in its folder; killed and started again as a process is."""

    package = ""
    """Debian's, of what stands in for the image."""
    _container: DockerContainer | None = None

    @cached_property
    def _wanted(self) -> str:
        name = compose.BROKERS[self.scheme]
        service: dict[str, Any] = compose.services(name)[name]
        return str(service["image"])

    @cached_property
    def _image(self) -> str:
        return broker_image(self._wanted, self.package)

    @cached_property
    def _stands_in(self) -> bool:
        return self._image != self._wanted

    def _mounts(self) -> Mounts:
        return [(self.folder, str(self.folder), "rw")]

    def _launch(self) -> None:
        # In the place of the image's entry, which would become a user that cannot write into the folder.
        self._container = container(
            self._image, self.environment, self._mounts(), user=str(os.getuid()), entrypoint=self.command(),
            working_dir="/",
        ).start()  # fmt: skip

    def _listens(self) -> bool:
        assert self._container is not None
        self._container.reload()
        log = b"".join(self._container.get_logs()).decode()
        assert self._container.get_wrapped_container().status == "running", log
        return self._answers()

    def kill(self) -> None:
        if self._container is not None:
            self._container.stop()
            self._container = None
            eventually(lambda: not self._answers(), what=f"{self.program} is gone")


class ContainedNats(_Contained, NatsServer):
    package = "nats-server"


class ContainedRedis(_Contained, RedisServer):
    package = "redis-server"


class ContainedKafka(_Contained, KafkaServer):
    """Where the image is not to be had, the Java is the container's, and the jars are those of the other tests."""

    package = "openjdk-17-jre-headless"
    jars = Path("opt/kafka/libs")
    """Of the image."""

    def _mounts(self) -> Mounts:
        if not self._stands_in:
            return super()._mounts()
        if not any(KAFKA_JARS.glob("kafka_*.jar")):
            pytest.skip("there is neither an image of Kafka nor its jars: make kafka")
        return [*super()._mounts(), (KAFKA_JARS, f"/{self.jars}", "ro")]

    def _java(self, *arguments: str) -> None:
        words = [*self._program(), *arguments]
        code, said = run(
            self._image, mounts=self._mounts(), user=str(os.getuid()), entrypoint=words, working_dir="/"
        )  # fmt: skip
        assert code == 0, said


class ContainedRabbit(_Contained, RabbitServer):
    package = "rabbitmq-server"

    def command(self) -> list[str]:
        return _of_rabbit(self.program)

    def control(self, *command: str) -> None:
        assert self._container is not None
        code, said = self._container.exec(_of_rabbit("rabbitmqctl", *command))
        assert code == 0, said.decode()


def _of_rabbit(*command: str) -> list[str]:
    """Debian has programs of these names on the usual path, which want to be another user."""
    return ["sh", "-c", 'export PATH="/usr/lib/rabbitmq/bin:$PATH"; exec "$@"', "sh", *command]
