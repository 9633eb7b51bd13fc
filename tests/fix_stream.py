"""Streams without a consumer: what they hear is recorded."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

from cdc.core.errors import StreamError
from cdc.core.model import WakeUp, message_prefix
from cdc.replication.stream import Stream, StreamSettings
from tests.eventually import eventually

PUBLIC = message_prefix("public")


class Recorder:
    """StreamEvents that remembers."""

    def __init__(self) -> None:
        self.starts = 0
        self.wakeups: list[WakeUp] = []
        self.batches: list[int] = []
        self.committed_at: list[float | None] = []
        self.errors: list[StreamError] = []

    def streaming(self) -> None:
        self.starts += 1

    def notified(self, wakeups: Sequence[WakeUp], committed_at: float | None) -> None:
        self.wakeups += wakeups
        self.batches.append(len(wakeups))
        self.committed_at.append(committed_at)

    def interrupted(self, error: StreamError) -> None:
        self.errors.append(error)

    def first_error(self) -> StreamError | None:
        return self.errors[0] if self.errors else None

    @property
    def reasons(self) -> list[str]:
        return [error.reason for error in self.errors]


@contextmanager
def stream_of(dsn: str, slot: str, *, wait: bool = True, **settings: Any) -> Iterator[tuple[Stream, Recorder]]:
    """A stream of the outbox in ``public``; with ``wait`` it has started."""
    received = Recorder()
    chosen = replace(StreamSettings(dsn=dsn, schema="public", slot=slot, wal_sender_timeout_s=3.0), **settings)
    stream = Stream(chosen, received)
    stream.start()
    try:
        if wait:
            eventually(lambda: stream.status.connected, what="the stream starts")
        yield stream, received
    finally:
        assert stream.stop(20)


def send_wakeup(
    db: psycopg.Connection, seq: int, shard: int = 1, *, prefix: str = PUBLIC, transactional: bool = True
) -> None:
    db.execute("SELECT pg_logical_emit_message(%s, %s, %s)", [transactional, prefix, f"{seq},{shard}"])


def send_wakeups(db: psycopg.Connection, first: int, last: int) -> None:
    db.execute(
        "SELECT count(pg_logical_emit_message(true, %s, g || ',' || g %% 64)) FROM generate_series(%s::int, %s) g",
        [PUBLIC, first, last],
    )


def wait_for_wakeups(received: Recorder, *seqs: int) -> None:
    eventually(lambda: {wakeup.seq for wakeup in received.wakeups} >= set(seqs), what=f"wake-ups {seqs}")


Libraries = Callable[..., None]


@contextmanager
def offered_libraries(db: psycopg.Connection) -> Iterator[Libraries]:
    """``offer("pgoutput")``: from now on new connections to that database find no other plugin's library."""
    [(found,)] = db.execute("SELECT setting FROM pg_config WHERE name = 'PKGLIBDIR'").fetchall()
    if not Path(found).is_dir():
        pytest.skip("the server's libraries are on another machine")
    folder = Path(tempfile.mkdtemp(prefix="cdc", dir="/tmp"))
    folder.chmod(0o755)

    def offer(*plugins: str) -> None:
        for link in folder.iterdir():
            link.unlink()
        for plugin in plugins:
            (folder / f"{plugin}.so").symlink_to(Path(found) / f"{plugin}.so")
        # The server looks for a plugin's library there, and for any other one where its name says.
        search = sql.SQL("ALTER DATABASE {} SET dynamic_library_path = {}")
        db.execute(search.format(sql.Identifier(db.info.dbname), sql.Literal(str(folder))))

    try:
        yield offer
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def libraries(db: psycopg.Connection) -> Iterator[Libraries]:
    """``offered_libraries`` of the test's own database."""
    with offered_libraries(db) as offer:
        yield offer


Streaming = Callable[..., AbstractContextManager[tuple[Stream, Recorder]]]


@pytest.fixture(params=[pytest.param("wal2json", marks=pytest.mark.needs("wal2json")), "pgoutput"])
def plugin(request: pytest.FixtureRequest) -> str:
    """A test that asks for it, or for ``streaming``, runs with each output plugin."""
    return str(request.param)


@pytest.fixture
def streaming(plugin: str) -> Streaming:
    """``stream_of`` with ``plugin`` and no other."""
    return partial(stream_of, plugins=(plugin,))
