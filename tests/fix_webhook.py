"""``cdc whatsapp serve`` as users start it, and events sent to it as WhatsApp signs them."""

from __future__ import annotations

import hmac
import http.client
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.eventually import eventually
from tests.fix_consumer import ROOT

APP_SECRET = "s3cret"


class Endpoint:
    """One process; ``kill`` and ``start`` follow each other."""

    def __init__(self, dsn: str, log: Path) -> None:
        self._dsn = dsn
        self._log = log
        self._begins = 0
        self.port = 0
        self.start()

    def start(self) -> None:
        self._begins = len(self.log)
        with self._log.open("a") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cdc", "whatsapp", "serve", "--whatsapp-port", "0"],
                cwd=ROOT, env={**os.environ, "CDC_DSN": self._dsn, "CDC_WHATSAPP_APP_SECRET": APP_SECRET},
                stdout=output, stderr=output,
            )  # fmt: skip

        def said() -> str:
            assert self.process.poll() is None, self.log
            return "".join(re.findall(r"webhooks on http://127\.0\.0\.1:(\d+)/webhook", self.log[self._begins :]))

        self.port = int(eventually(said, what="the port of the endpoint"))

    @property
    def log(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    def ask(self, path: str) -> int:
        return self._request("GET", path, b"", {})[0]

    def post(self, event: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Raises OSError or HTTPException while nobody is there."""
        body = json.dumps(event).encode()
        signature = "sha256=" + hmac.new(APP_SECRET.encode(), body, "sha256").hexdigest()
        headers = {"Content-Type": "application/json", "X-Hub-Signature-256": signature}
        status, text = self._request("POST", "/webhook", body, headers)
        return status, json.loads(text)

    def _request(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            link.request(method, path, body, headers)
            answer = link.getresponse()
            return answer.status, answer.read()
        finally:
            link.close()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def endpoints() -> Iterator[list[Endpoint]]:
    """Append endpoints; what still runs at the end is killed."""
    started: list[Endpoint] = []
    yield started
    for endpoint in started:
        endpoint.kill()
