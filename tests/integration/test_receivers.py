"""The receiving applications of examples/, which docs/guides/http-delivery.md shows, in their languages."""

from __future__ import annotations

import base64
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import psycopg
import pytest

from cdc.contrib.demo.temp_server import free_port
from cdc.http import webhook_signature
from tests.eventually import eventually, eventually_async
from tests.fix_consumer import consuming, settled, states

_SECRET = "whsec_" + base64.b64encode(b"a" * 32).decode()
_OTHER_SECRET = "whsec_" + base64.b64encode(b"b" * 32).decode()
_ROOT = Path(__file__).resolve().parents[2]
_EXAMPLES = {"python": "app.py", "typescript": "app.ts"}


def _example(language: str) -> str:
    return (_ROOT / f"examples/http_receiver_{language}" / _EXAMPLES[language]).read_text("utf-8")


@pytest.mark.parametrize("language", _EXAMPLES)
def test_the_page_shows_the_example(language: str) -> None:
    page = (_ROOT / "docs/guides/http-delivery.md").read_text("utf-8")
    [shown] = re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)
    assert shown == _example(language)


def _command(language: str, folder: Path) -> list[str]:
    """How the example is started."""
    if language == "python":
        (folder / "app.py").write_text(_example("python"))
        return [sys.executable, "app.py"]
    if missing := [program for program in ("node", "esbuild") if shutil.which(program) is None]:
        assert not os.environ.get("CDC_REQUIRE_NODE"), f"CDC_REQUIRE_NODE is set, and {missing} are missing"
        pytest.skip(f"no {' and '.join(missing)}: deploy/debian-setup --with-node installs them")
    # Nothing but the types is taken out, which newer versions of Node do by themselves.
    without_types = subprocess.run(
        ["esbuild", "--loader=ts", "--format=esm"],
        input=_example("typescript"),
        capture_output=True,
        text=True,
        check=True,
    )
    (folder / "app.mjs").write_text(without_types.stdout)
    return ["node", "app.mjs"]


class _Receiver:
    def __init__(self, command: list[str], folder: Path, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}/"
        self._log = folder / "log"
        with self._log.open("w") as log:
            environ = {**os.environ, "CDC_DELIVER_SECRET": _SECRET, "PORT": str(port)}
            self.process = subprocess.Popen(command, cwd=folder, env=environ, stdout=log, stderr=log)

    @property
    def said(self) -> str:
        return self._log.read_text()


@contextmanager
def _running(command: list[str], folder: Path) -> Iterator[_Receiver]:
    receiver = _Receiver(command, folder, free_port())
    try:
        yield receiver
    finally:
        receiver.process.kill()
        receiver.process.wait()


@pytest.fixture(params=["python", "typescript"])
def receiver(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[_Receiver]:
    with _running(_command(request.param, tmp_path), tmp_path) as running:
        yield running


def _publish(db: psycopg.Connection) -> list[str]:
    statement = "SELECT publish_change('order', n::text, 'INSERT', '{\"total\": 1}') FROM generate_series(1, 20) AS n"
    db.execute(statement)
    return [str(identity) for (identity,) in db.execute("SELECT id FROM entity_changes").fetchall()]


async def _all_settled(db: psycopg.Connection) -> None:
    async def check() -> bool:
        return settled(db)

    await eventually_async(check, what="every change processed or dead")


async def test_the_example_takes_what_a_consumer_delivers(
    receiver: _Receiver, outbox: str, outbox_db: psycopg.Connection
) -> None:
    published = _publish(outbox_db)
    # It may still be starting: that is what the consumer is patient for.
    async with consuming(outbox, None, deliver_to=receiver.url, deliver_secret=_SECRET):
        await _all_settled(outbox_db)
    assert states(outbox_db) == {"processed": 20}
    # Its threads print at the same time: what each says is in one piece, and two of them may share a line.
    eventually(lambda: len(re.findall(r"cdc\.order\.insert .*?total", receiver.said)) == 20)
    assert all(identity in receiver.said for identity in published)


async def test_the_example_takes_nothing_that_is_signed_with_another_secret(
    receiver: _Receiver, outbox: str, outbox_db: psycopg.Connection
) -> None:
    _publish(outbox_db)
    async with consuming(
        outbox, None, deliver_to=receiver.url, deliver_secret=_OTHER_SECRET, max_attempts=2, backoff_base=0.01
    ):
        await _all_settled(outbox_db)
    assert states(outbox_db) == {"dead": 20}
    [(told,)] = outbox_db.execute("SELECT DISTINCT last_error FROM entity_changes").fetchall()
    assert told == "answered 401 Unauthorized"


async def test_the_example_answers_forged_requests_and_its_own_failures_differently(receiver: _Receiver) -> None:
    now = int(time.time())
    body = b"this is no event"

    def signed(at: int, message: bytes = body, changed: Mapping[str, str] | None = None) -> dict[str, str]:
        keys = [webhook_signature.key(_OTHER_SECRET), webhook_signature.key(_SECRET)]
        return {**webhook_signature.headers(keys, "id", at, message), **(changed or {})}

    cases: list[tuple[dict[str, str], int]] = [
        (signed(now), 500),
        (signed(now, b"something else"), 401),
        (signed(now - 1000), 401),
        (signed(now + 1000), 401),
        (signed(now, changed={"webhook-id": "another"}), 401),
        (signed(now, changed={"webhook-signature": "v1,AAAA v1 x"}), 401),
        ({}, 401),
    ]
    async with aiohttp.ClientSession() as session:

        async def status(headers: dict[str, str]) -> int:
            async with session.post(receiver.url, data=body, headers=headers) as response:
                return response.status

        async def listens() -> Any:
            try:
                return await status({})
            except aiohttp.ClientConnectorError:
                return None

        await eventually_async(listens, what="the example listening")
        assert [await status(headers) for headers, _ in cases] == [expected for _, expected in cases]
