"""Brokers of the tests that are containers: of the images that Compose names, or of what stands in for them."""

from __future__ import annotations

from typing import Any

from testcontainers.core.container import DockerContainer

from tests import compose
from tests.container.containers import container
from tests.container.images import broker_image
from tests.eventually import eventually
from tests.fix_brokers import BrokerServer, NatsServer, RedisServer


class _Contained(BrokerServer):
    """On the machine's own network, and in its folder; killed and started again as a process is."""

    _container: DockerContainer | None = None

    def start(self) -> None:
        service: dict[str, Any] = compose.services(compose.BROKERS[self.scheme])[compose.BROKERS[self.scheme]]
        made = container(broker_image(service["image"]), {}, [(self.folder, str(self.folder), "rw")], user="0")
        self._container = made.with_command(self.command()).start()
        eventually(self._answers, within_s=self.starts_s, what=f"{self.program} listens")

    def kill(self) -> None:
        if self._container is not None:
            self._container.stop()
            self._container = None
            eventually(lambda: not self._answers(), what=f"{self.program} is gone")


class ContainedNats(_Contained, NatsServer):
    pass


class ContainedRedis(_Contained, RedisServer):
    pass
