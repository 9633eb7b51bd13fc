"""A Prometheus of the test's own, on loopback, with the alert rules made impatient."""

from __future__ import annotations

import json
import re
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml

from cdc.contrib.demo.temp_server import free_port
from tests.eventually import eventually
from tests.prometheus.fix_queries import RULES, needed

_EVERY = "1s"

THRESHOLDS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "CdcBacklogOld": (("> 300", "> 1"),),
    "CdcTruncateStands": (("> 300", "> 1"),),
    "CdcStalled": (("> 60", "> 1"),),
    "CdcLimitStarves": (("> 1800", "> 2"),),
    "CdcLoopStuck": (("> 120", "> 5"),),
    "CdcStreamSilent": (("> 90", "> 12"),),
    "CdcStreamFlapping": (("> 10", "> 2"),),
    "CdcSlotWalRetentionHigh": (("1024^3", "1024^2"),),
    "CdcOrphanSlot": (("1024^3", "1024^2"),),
}
"""What a test cannot wait for. Ranges become seconds and ``for`` a moment in every rule."""

_RANGES = {"10m": "8s", "15m": "30s", "30m": "60s"}


def impatient_rules() -> str:
    """The rules that are shipped, with shorter times and lower bounds; nothing else differs."""
    content = yaml.safe_load(RULES.read_text())
    for group in content["groups"]:
        for rule in group["rules"]:
            rule["expr"] = re.sub(r"\[(\d+m)\]", lambda found: f"[{_RANGES[found[1]]}]", rule["expr"])
            if "for" in rule:
                rule["for"] = _EVERY
            for bound, lower in THRESHOLDS.get(rule.get("alert", ""), ()):
                assert bound in rule["expr"], rule
                rule["expr"] = rule["expr"].replace(bound, lower)
    return yaml.safe_dump(content)


class Exporter:
    """postgres_exporter, on a port of the loopback. Ends with ``stop``."""

    def __init__(self, dsn: str, folder: Path) -> None:
        self.port = free_port()
        with (folder / "exporter.log").open("w") as output:
            self._process = subprocess.Popen(
                [needed("prometheus-postgres-exporter"), f"--web.listen-address=127.0.0.1:{self.port}"],
                env={"DATA_SOURCE_NAME": f"{dsn} sslmode=disable"}, stdout=output, stderr=output,
            )  # fmt: skip

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(30)


class Prometheus:
    """``targets``: job -> port or ports on this host. ``rules``: by default impatient ones. Ends with ``stop``."""

    def __init__(self, folder: Path, targets: Mapping[str, int | list[int]], rules: str | None = None) -> None:
        self._port = free_port()
        self._stack = ExitStack()
        (folder / "cdc.rules.yaml").write_text(impatient_rules() if rules is None else rules)
        jobs = [
            {"job_name": job, "static_configs": [{"targets": [f"127.0.0.1:{port}" for port in _ports(found)]}]}
            for job, found in targets.items()
        ]
        content = {
            "global": {"scrape_interval": _EVERY, "evaluation_interval": _EVERY},
            "rule_files": ["cdc.rules.yaml"],
            "scrape_configs": jobs,
        }
        (folder / "prometheus.yml").write_text(yaml.safe_dump(content))
        self._log = folder / "prometheus.log"
        with self._log.open("w") as output:
            self._process = subprocess.Popen(
                [needed("prometheus"), f"--config.file={folder / 'prometheus.yml'}",
                 f"--storage.tsdb.path={folder / 'tsdb'}", f"--web.listen-address=127.0.0.1:{self._port}",
                 "--log.level=warn"],
                stdout=output, stderr=output,
            )  # fmt: skip
        eventually(self._ready, within_s=60, what="Prometheus is ready")

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(30)

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series of an instant query. Raises HTTPError where it is none."""
        return self._ask("query", query=expression)

    def query_range(self, expression: str, since: float, until: float, step_s: int) -> list[dict[str, Any]]:
        """The series between two moments, which are seconds of the epoch: their ``values`` are (moment, text)."""
        return self._ask("query_range", query=expression, start=since, end=until, step=step_s)

    def _ask(self, what: str, **parameters: object) -> list[dict[str, Any]]:
        address = f"http://127.0.0.1:{self._port}/api/v1/{what}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(address, timeout=30) as answer:
            found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
        return found

    def firing(self, alert: str, **labels: str) -> bool:
        chosen = "".join(f',{label}="{value}"' for label, value in labels.items())
        return bool(self.query(f'ALERTS{{alertname="{alert}",alertstate="firing"{chosen}}}'))

    def _ready(self) -> bool:
        assert self._process.poll() is None, self._log.read_text()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/-/ready", timeout=5):
                return True
        except OSError:
            return False


def _ports(found: int | list[int]) -> list[int]:
    return [found] if isinstance(found, int) else found
