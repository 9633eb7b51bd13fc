"""docs/pictures/status-page.png: the page of the consumer of ``cdc demo``. ``make pictures`` takes it.

Needs Chromium. Takes a minute: the demo, and the readings that the charts are made of.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import urllib.request
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.eventually import eventually

ROOT = Path(__file__).resolve().parents[2]
PICTURE = ROOT / "docs/pictures/status-page.png"
_READINGS = 5
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--virtual-time-budget=3000",
    "--window-size=1100,1310",
)  # fmt: skip


def main() -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("there is no Chromium: deploy/debian-setup --with-browser installs it")
    demo = subprocess.Popen([sys.executable, "-m", "cdc", "demo", "--keep"], stdout=subprocess.PIPE, text=True)
    try:
        page = _page_of(demo)
        eventually(lambda: _readings(page) >= _READINGS, within_s=120, what="the charts have something to show")
        with tempfile.TemporaryDirectory() as folder:
            _save(page, Path(folder))
            _take(chromium, Path(folder))
    finally:
        demo.terminate()
        demo.wait()


def _page_of(demo: subprocess.Popen[str]) -> str:
    """The demo names it when it has written everything."""
    assert demo.stdout is not None
    for line in demo.stdout:
        if found := re.search(r"(http://127\.0\.0\.1:\d+/)metrics", line):
            return found[1]
    sys.exit("the demo has ended without a word of its page")


def _readings(page: str) -> int:
    with urllib.request.urlopen(f"{page}status.json") as answer:
        points: list[object] = json.load(answer)["history"]["points"]
    return len(points)


def _save(page: str, folder: Path) -> None:
    """The page and its figures of this moment, without the place of the source on this machine."""
    for name, saved in (("", "index.html"), ("status.json", "status.json")):
        with urllib.request.urlopen(page + name) as answer:
            (folder / saved).write_text(answer.read().decode().replace(f"{ROOT}/", ""), "utf-8")


class _Handler(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None: ...


def _take(chromium: str, folder: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/"
        flags = [*_FLAGS, f"--user-data-dir={folder / 'profile'}", f"--screenshot={PICTURE}"]
        subprocess.run([chromium, *flags, address], check=True, capture_output=True)
        server.shutdown()


if __name__ == "__main__":
    main()
