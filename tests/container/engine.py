"""The Docker engine of the run: the one that answers, else a private one, with nothing but loopback to talk on."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType

from docker.errors import DockerException  # type: ignore[import-untyped]  # it has no types
from testcontainers.core.config import testcontainers_config
from testcontainers.core.docker_client import DockerClient

from cdc.core.errors import NotFoundError
from tests.eventually import eventually

# It would be one more image, and remove what is left by a run that was killed. What we start, we end.
testcontainers_config.ryuk_disabled = True

_UNIX = "unix://"
_USUAL = "unix:///var/run/docker.sock"
_START_S = 120.0
_STOP_S = 180.0


def answers() -> bool:
    """Whether there is an engine, where DOCKER_HOST says or at the usual place."""
    place = os.environ.get("DOCKER_HOST") or _USUAL
    if place.startswith(_UNIX) and not _listened_to(place.removeprefix(_UNIX)):
        return False
    try:
        client = DockerClient().client
    except DockerException:
        return False
    try:
        return bool(client.ping())
    finally:
        client.close()


def _listened_to(path: str) -> bool:
    """Asked first, because the client leaves its sockets open where nobody listens."""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(path) == 0


class Engine:
    """``with Engine():`` an engine of our own, named by DOCKER_HOST; nothing of it is left at the end.

    Raises NotFoundError where it cannot be started: it needs root, and the program dockerd.
    """

    def __init__(self) -> None:
        program = shutil.which("dockerd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
        if program is None or os.geteuid() != 0:
            raise NotFoundError(
                "no Docker engine answers, and none can be started",
                hint="start one and set DOCKER_HOST; or as root: deploy/debian-setup --with-docker",
            )
        self._program = program
        self._before = os.environ.get("DOCKER_HOST")

    def __enter__(self) -> Engine:
        # Not in /tmp, which may lie in memory: images of two gigabytes are built in it.
        self._folder = Path(tempfile.mkdtemp(prefix="cdc-docker-", dir="/var/tmp"))
        os.environ["DOCKER_HOST"] = f"unix://{self._folder}/docker.sock"
        self._log = self._folder / "log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(self._command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            eventually(self._is_up, within_s=_START_S, what="the Docker engine answers")
        except AssertionError:
            self.__exit__(None, None, None)
            raise
        return self

    def _command(self) -> list[str]:
        places = {"host": f"unix://{self._folder}/docker.sock", "data-root": f"{self._folder}/data",
                  "exec-root": f"{self._folder}/exec", "pidfile": f"{self._folder}/pid"}  # fmt: skip
        # No bridge and no rules in the machine's packet filter: containers use the machine's own loopback.
        alone = {"bridge": "none", "iptables": "false", "ip6tables": "false"}
        # Whatever ends this process, the engine ends with it.
        bound = ["setpriv", "--pdeathsig", "TERM", self._program]
        return [*bound, *(f"--{name}={value}" for name, value in (places | alone).items())]

    def _is_up(self) -> bool:
        assert self._process.poll() is None, self._log.read_text()
        return answers()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()  # it ends its containers, and unmounts what they had
        self._process.wait(_STOP_S)
        _unmount_below(self._folder)
        shutil.rmtree(self._folder)
        if self._before is None:
            del os.environ["DOCKER_HOST"]
        else:
            os.environ["DOCKER_HOST"] = self._before


def _unmount_below(folder: Path) -> None:
    """An engine leaves the name of the machine's network behind, as a mount."""
    mounted = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    for place in reversed([place for place in mounted if place.startswith(f"{folder}/")]):
        subprocess.run(["umount", place], check=True)
