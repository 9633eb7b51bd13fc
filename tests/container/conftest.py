"""An engine, the images built on it, and a database: made once for the run.

Without an engine the tests are skipped with the reason. CDC_REQUIRE_DOCKER=1 starts one, as root, and fails where that
cannot be done.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from cdc.core.errors import NotFoundError
from tests.container.containers import Database
from tests.container.engine import Engine, answers
from tests.container.images import Bases, build_all


@pytest.fixture(scope="session")
def engine() -> Iterator[None]:
    if answers():
        yield
        return
    if not os.environ.get("CDC_REQUIRE_DOCKER"):
        pytest.skip("no Docker engine answers (DOCKER_HOST); CDC_REQUIRE_DOCKER=1 starts one, as root")
    with Engine():
        yield


@pytest.fixture(scope="session")
def images(engine: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bases]:
    """What CONSUMER and DATABASE were built on."""
    with ExitStack() as cleaning:
        try:
            bases = build_all(tmp_path_factory.mktemp("images"), cleaning)
        except NotFoundError as missing:
            if os.environ.get("CDC_REQUIRE_DOCKER"):
                raise
            pytest.skip(f"{missing}")
        yield bases


@pytest.fixture(scope="session")
def container_server(images: Bases) -> Iterator[Database]:
    """A running server of the database image, on a port of the loopback."""
    with Database() as running:
        yield running
