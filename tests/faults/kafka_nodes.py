"""Three nodes of Kafka, each broker and controller, for what happens to a partition whose leader goes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from cdc.contrib.demo.temp_server import free_port
from tests.eventually import eventually
from tests.fix_brokers import KAFKA_JARS, Received, read_topics

TOPIC = "cdc.x"
_STARTS_S = 180.0
_JAVA = ["java", "-Xmx192m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-cp", f"{KAFKA_JARS}/*"]


class KafkaNodes:
    """Numbered from 0. A topic of 4 partitions, 3 replicas, of which 2 must be in sync."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ports = [free_port() for _ in range(3)]
        controllers = [free_port() for _ in range(3)]
        voters = ",".join(f"{n}@127.0.0.1:{port}" for n, port in enumerate(controllers))
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        for n in range(3):
            settings = {
                "process.roles": "broker,controller",
                "node.id": n,
                "controller.quorum.voters": voters,
                "listeners": f"PLAINTEXT://127.0.0.1:{self._ports[n]},CONTROLLER://127.0.0.1:{controllers[n]}",
                "advertised.listeners": f"PLAINTEXT://127.0.0.1:{self._ports[n]}",
                "controller.listener.names": "CONTROLLER",
                "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
                "log.dirs": folder / f"data{n}",
                "auto.create.topics.enable": "false",
                "log.cleaner.dedupe.buffer.size": 8_388_608,  # of 128 MiB by default, which this heap has no room for
                "offsets.topic.num.partitions": 1,
            }
            file = folder / f"{n}.properties"
            file.write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
            format_ = ["kafka.tools.StorageTool", "format", "-t", "AAAAAAAAAAAAAAAAAAAAAA", "-c", str(file)]
            subprocess.run([*_JAVA, *format_], check=True, capture_output=True)

    @property
    def servers(self) -> str:
        return ",".join(f"127.0.0.1:{port}" for port in self._ports)

    def start(self, *nodes: int) -> None:
        for n in nodes:
            with (self._folder / f"{n}.log").open("ab") as log:
                command = [*_JAVA, "kafka.Kafka", str(self._folder / f"{n}.properties")]
                self._running[n] = subprocess.Popen(
                    command, stdout=log, stderr=log, cwd=self._folder, start_new_session=True
                )

    def make_topic(self) -> None:
        admin = AdminClient({"bootstrap.servers": self.servers, "log_level": 0})

        def all_there() -> bool:
            assert [each.poll() for each in self._running.values()] == [None] * len(self._ports), "a node has ended"
            with contextlib.suppress(KafkaException):  # none of them listens yet
                return len(admin.list_topics(timeout=10).brokers) == len(self._ports)
            return False

        eventually(all_there, within_s=_STARTS_S, what="three nodes")
        [made] = admin.create_topics([NewTopic(TOPIC, 4, 3, config={"min.insync.replicas": "2"})]).values()
        made.result(60)
        eventually(lambda: self.in_sync() == 3, what="all replicas are in sync")

    def _partitions(self) -> list[tuple[int, int]]:
        """Leader, and number of replicas in sync, of each."""
        admin = AdminClient({"bootstrap.servers": self.servers, "log_level": 0})
        topic = admin.list_topics(timeout=10).topics.get(TOPIC)
        found = topic.partitions.values() if topic is not None else ()
        return [(each.leader, len(each.isrs)) for each in found]

    def in_sync(self) -> int:
        return min((count for _, count in self._partitions()), default=0)

    def leader(self) -> int:
        """Of the first partition."""
        return self._partitions()[0][0]

    def kill(self, node: int) -> None:
        process = self._running.pop(node)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def end(self) -> None:
        for node in list(self._running):
            self.kill(node)

    def received(self) -> list[Received]:
        return read_topics(self.servers, TOPIC)
