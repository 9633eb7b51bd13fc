"""Consumers: one inside the test's event loop, and real processes that can be killed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import psycopg
import pytest
from prometheus_client import CollectorRegistry

from cdc.app import config
from cdc.app.application import App, subscription_of
from cdc.core.router import Router
from cdc.engine.health_checks import HealthThresholds
from tests.eventually import eventually
from tests.forked import Forked

ROOT = Path(__file__).parent.parent
MAX_ATTEMPTS = 3
"""Unless a test says otherwise: by default a change is dead after some hours only."""


def slot_name() -> str:
    return f"test_{uuid.uuid4().hex[:12]}"


@contextlib.asynccontextmanager
async def consuming(
    dsn: str, router: Router | None, thresholds: HealthThresholds | None = None, **settings: Any
) -> AsyncIterator[App]:
    """A consumer beside the test. Leaves by draining; what ended it early is raised."""
    always = {"dsn": dsn, "http_port": 0, "slot_name": slot_name(), "max_attempts": MAX_ATTEMPTS}
    chosen = config.from_options({**always, **settings})
    app = App(chosen, router, thresholds, subscription=await subscription_of(chosen))
    work = asyncio.create_task(app.run())
    try:
        yield app
        if work.done():
            work.result()
    finally:
        app.consumer.stop()
        await work


def metric(registry: CollectorRegistry, name: str, **labels: str) -> float:
    """A sample's value; summed over the labels that are not named; 0 where there is none."""
    return sum(
        sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


class Process:
    """``cdc run`` as users start it, its log in a file. ``module``: another one that ends in the command line."""

    def __init__(
        self,
        dsn: str,
        log: Path,
        *,
        handlers: str = "tests.handlers:router",
        module: str = "cdc",
        options: Sequence[str] = (),
        **settings: Any,
    ) -> None:
        self._log = log
        settings = {"slot_name": "cdc_test", "http_port": 0, "max_attempts": MAX_ATTEMPTS, **settings}
        if "deliver_to" not in settings:
            settings["handlers"] = handlers
        named = [item for name, value in settings.items() for item in (f"--{name.replace('_', '-')}", str(value))]
        log.touch()
        environment = {**os.environ, "CDC_DSN": dsn}
        self.process = Forked(module, ["run", *named, *options], cwd=ROOT, environment=environment, log=log)

    @property
    def log(self) -> str:
        return self._log.read_text()

    def wait_for(self, text: str) -> None:
        def said() -> bool:
            assert self.process.poll() is None, f"ended with {self.process.returncode}: {self.log}"
            return text in self.log

        eventually(said, what=f"the log saying {text!r}")

    def memory_bytes(self, field: str = "VmRSS") -> int:
        """VmRSS now, VmHWM at its highest."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(f"{field}:"))

    def terminate(self, within_s: float = 30.0) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(within_s)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[list[Process]]:
    """Append processes; whatever still runs at the end is killed."""
    started: list[Process] = []
    yield started
    for process in started:
        if process.process.poll() is None:
            process.kill()


def settled(db: psycopg.Connection) -> bool:
    """Nothing is fresh or waiting."""
    left = db.execute("SELECT FROM entity_changes WHERE NOT processed AND dead_at IS NULL LIMIT 1")
    return not left.fetchall()


def states(db: psycopg.Connection) -> dict[str, int]:
    """How many changes are in each state."""
    return dict(
        db.execute(
            "SELECT CASE WHEN processed THEN 'processed' WHEN dead_at IS NOT NULL THEN 'dead'"
            " WHEN next_attempt_at IS NOT NULL THEN 'waiting' ELSE 'fresh' END AS state, count(*)"
            " FROM entity_changes GROUP BY 1"
        ).fetchall()
    )
