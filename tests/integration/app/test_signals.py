"""SIGTERM, SIGINT and SIGHUP, whenever they come: from the import of the handlers to a second one."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from tests.eventually import eventually
from tests.fix_consumer import ROOT, Process

SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
_WAITS = "import threading; print('imported so far', flush=True); threading.Event().wait(60)"
_SWALLOWS = f"""
try:
    {_WAITS}
except BaseException:
    pass
import cdc
router = cdc.Router()
"""
_NO_NAMES = """
import socket, sys, threading
sys.modules["uvloop"] = None  # which resolves names by itself
def getaddrinfo(*arguments, **named):
    print('resolving', flush=True)
    threading.Event().wait()
socket.getaddrinfo = getaddrinfo
import cdc
router = cdc.Router()
"""


@pytest.fixture
def started(tmp_path: Path) -> Iterator[list[subprocess.Popen[str]]]:
    running: list[subprocess.Popen[str]] = []
    yield running
    for process in running:
        process.kill()
        process.communicate()


def start(
    started: list[subprocess.Popen[str]],
    folder: Path,
    module: str,
    *command: str,
    dsn: str = "",
    before: tuple[str, ...] = (),
) -> subprocess.Popen[str]:
    """A command as users start it, in a folder with the module ``handlers``."""
    (folder / "handlers.py").write_text(module)
    environment = {**os.environ, "CDC_DSN": dsn, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [*before, sys.executable, "-m", "cdc", *command],
        cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    started.append(process)
    return process


def says(process: subprocess.Popen[str], words: str) -> str:
    """What it has written up to the line with these words."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if words in line:
            return "".join(lines)
    raise AssertionError(f"ended without {words!r}: {''.join(lines)}")


RUN = ("run", "--handlers", "handlers:router", "--http-port", "0", "--slot-name", "signals")


@pytest.mark.parametrize("module", [_WAITS, _SWALLOWS], ids=["import", "import_that_swallows_it"])
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_during_the_import_of_the_handlers_ends_it_with_0(
    number: int, module: str, started: list[subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = start(started, tmp_path, module, *RUN)
    says(process, "imported so far")
    process.send_signal(number)
    assert process.wait(20) == 0


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root and unshare")
def test_as_process_1_a_signal_during_the_import_is_not_lost(
    started: list[subprocess.Popen[str]], tmp_path: Path
) -> None:
    outer = start(started, tmp_path, _WAITS, *RUN, before=("unshare", "-pf", "--kill-child"))
    says(outer, "imported so far")
    [inner] = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()
    os.kill(int(inner), signal.SIGTERM)
    assert outer.wait(20) == 0


def test_a_signal_while_a_name_is_resolved_ends_it_with_0(started: list[subprocess.Popen[str]], tmp_path: Path) -> None:
    process = start(started, tmp_path, _NO_NAMES, *RUN, dsn="host=nowhere.invalid dbname=x user=x")
    says(process, "resolving")
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_drains_a_consumer_at_work(
    number: int, outbox: str, outbox_db: psycopg.Connection, processes: list[Process], tmp_path: Path
) -> None:
    process = Process(outbox, tmp_path / "log", handlers="tests.handlers_links:router", drain_time=0.5)
    processes.append(process)
    outbox_db.execute("SELECT publish_change('sleeps', '1')")
    process.wait_for("a handler is at work")
    process.process.send_signal(number)
    assert process.process.wait(30) == 0, process.log
    assert f"{signal.Signals(number).name}: stopping" in process.log
    assert "1 handlers were cut off" in process.log


def test_a_signal_ends_a_consumer_that_waits_for_its_tables(
    database: str, db: psycopg.Connection, processes: list[Process], tmp_path: Path
) -> None:
    process = Process(database, tmp_path / "log", options=["--no-stream"])
    processes.append(process)
    process.wait_for("waiting: ")
    assert process.terminate() == 0
    assert "Traceback" not in process.log


def test_a_second_signal_ends_it_at_once_even_where_a_handler_blocks_the_event_loop(
    outbox: str, outbox_db: psycopg.Connection, processes: list[Process], tmp_path: Path
) -> None:
    process = Process(outbox, tmp_path / "log", handlers="tests.handlers_links:router")
    processes.append(process)
    outbox_db.execute("SELECT publish_change('blocks', '1')")
    process.wait_for("a handler is at work")
    process.process.send_signal(signal.SIGTERM)
    process.wait_for("SIGTERM: stopping")
    process.process.send_signal(signal.SIGINT)
    assert process.process.wait(10) in (128 + signal.SIGINT, -signal.SIGINT)


def test_a_handler_that_swallows_its_cancellation_is_reported_and_does_not_keep_the_process(
    outbox: str, outbox_db: psycopg.Connection, processes: list[Process], tmp_path: Path
) -> None:
    process = Process(outbox, tmp_path / "log", handlers="tests.handlers_links:router", drain_time=0.5)
    processes.append(process)
    outbox_db.execute("SELECT publish_change('uncancellable', '1')")
    process.wait_for("handler uncancellable goes on though its limit of 1 s has passed")
    assert process.terminate(30) == 0, process.log
    assert "1 tasks go on after their cancellation" in process.log


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_the_endpoint_for_webhooks(
    number: int, database: str, started: list[subprocess.Popen[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CDC_WHATSAPP_APP_SECRET", "secret")
    process = start(started, tmp_path, "", "whatsapp", "serve", "--whatsapp-port", "0", dsn=database)
    says(process, "webhooks on")
    process.send_signal(number)
    assert process.wait(20) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_demo_and_its_server_goes_with_it(
    number: int, started: list[subprocess.Popen[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = uuid.uuid4().hex
    monkeypatch.setenv("MARK", mark)
    process = start(started, tmp_path, "", "demo")
    told = says(process, "Starting a private server" if number == signal.SIGHUP else "A consumer is at work")
    assert marked(mark)
    process.send_signal(number)
    told += "".join(process.stdout or ())
    assert process.wait(60) in (0, 1, 128 + number), told
    eventually(lambda: not marked(mark), what="nothing of it is left")


def marked(mark: str) -> list[str]:
    """Processes that have it in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark.encode() in (folder / "environ").read_bytes():
                found.append(folder.name)
    return found
