"""The images under test, and what they are built on: the official images, or, without a registry, Debian's packages."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from docker.errors import DockerException, ImageNotFound  # type: ignore[import-untyped]  # it has no types
from requests import RequestException
from testcontainers.core.docker_client import DockerClient
from testcontainers.core.image import DockerImage

from cdc.core.errors import NotFoundError
from tests.fix_consumer import ROOT

_PYTHON, _POSTGRES = "python:3.13-slim-bookworm", "postgres:15"
_DEBIAN, _BUILDER, _STANDIN = "cdc-test/debian:bookworm", "cdc-test/builder", "cdc-test/postgres"
CONSUMER, DATABASE = "cdc-test/consumer", "cdc-test/database"
_STANDINS = Path(__file__).parent / "standins"
_CERTIFICATES = Path("/usr/local/share/ca-certificates")


class Bases(NamedTuple):
    python: str
    builder: str
    postgres: str


def build_all(folder: Path, cleaning: ExitStack) -> Bases:
    """Build CONSUMER and DATABASE; ``cleaning`` removes them. What they were built on stays for the next run."""
    with ThreadPoolExecutor() as run_inline:
        if _there(_PYTHON) and _there(_POSTGRES):
            bases = Bases(_PYTHON, _PYTHON, _POSTGRES)
        else:
            import_debian(folder)
            bases = Bases(_DEBIAN, _BUILDER, _STANDIN)
            made = [run_inline.submit(_make_builder, folder / "builder"), run_inline.submit(_make_postgres)]
            for one in made:
                one.result()
        built = [
            run_inline.submit(
                build, ROOT, CONSUMER, dockerfile_path="deploy/Dockerfile",
                buildargs={"BASE_IMAGE": bases.python, "BUILD_IMAGE": bases.builder},
            ),
            run_inline.submit(build, ROOT / "deploy/postgres", DATABASE, buildargs={"BASE_IMAGE": bases.postgres}),
        ]  # fmt: skip
        for image in built:
            cleaning.callback(image.result().remove)
    return bases


def broker_image(wanted: str, package: str) -> str:
    """That one, or what stands in for it: Debian with this package."""
    if _there(wanted):
        return wanted
    standin = f"cdc-test/{package}"
    build(_STANDINS / "broker", standin, clean_up=False, buildargs={"BASE_IMAGE": _DEBIAN, "PACKAGE": package}).remove()
    return standin


def build(context: Path, tag: str, **options: Any) -> DockerImage:
    """By the engine's classic builder, on the machine's network: the bridge may have no way out."""
    return DockerImage(context, tag=tag, network_mode="host", rm=True, forcerm=True, **options).build()


def _there(image: str) -> bool:
    """Whether it is here already, or a registry has it."""
    return bool(with_images(lambda images: _got(images, image)))


def _got(images: Any, image: str) -> bool:
    try:
        images.get(image)
    except ImageNotFound:
        try:
            images.pull(image)
        except (DockerException, RequestException):
            return False
    return True


def with_images(do: Callable[[Any], Any]) -> Any:
    client = DockerClient().client
    try:
        return do(client.images)
    finally:
        client.close()


def import_debian(folder: Path) -> None:
    """An image of Debian 12 with Python, made from packages. Raises NotFoundError where that cannot be done."""
    if _there(_DEBIAN):
        return
    program = shutil.which("debootstrap", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if program is None or os.geteuid() != 0:
        raise NotFoundError(
            "no image registry answers, and no image can be made from Debian's packages",
            hint=f"pull {_PYTHON} and {_POSTGRES}; or as root: deploy/debian-setup --with-docker",
        )
    root, archive = folder / "debian", folder / "debian.tar"
    packages = "--include=python3,ca-certificates"
    _run(program, "--variant=minbase", packages, "bookworm", root)
    # What debootstrap fetched, not what the image is made of.
    _run("tar", "-C", root, "--exclude=./var/cache/apt/*", "--exclude=./var/lib/apt/lists/*", "-cf", archive, ".")
    shutil.rmtree(root)
    client = DockerClient().client
    try:
        repository, _, tag = _DEBIAN.partition(":")
        client.api.import_image_from_file(str(archive), repository=repository, tag=tag)
    finally:
        client.close()
        archive.unlink()


def _make_builder(context: Path) -> None:
    shutil.copytree(_STANDINS / "builder", context)
    if _CERTIFICATES.exists():
        shutil.copytree(_CERTIFICATES, context / "certificates")
    else:
        (context / "certificates").mkdir()
    build(context, _BUILDER, clean_up=False, buildargs={"BASE_IMAGE": _DEBIAN}).remove()


def _make_postgres() -> None:
    build(_STANDINS / "postgres", _STANDIN, clean_up=False, buildargs={"BASE_IMAGE": _DEBIAN}).remove()


def _run(*command: str | Path) -> None:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
