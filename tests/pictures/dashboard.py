"""docs/pictures/dashboard*.svg: the panels of deploy/grafana, with what a real Prometheus answers to their queries.

A shop's changes for three minutes, and what befalls them: a burst, a provider that is away and then takes no more than
a limit allows, letters that cannot be sent, a consumer that is killed, a type that is paused. Two consumers share the
work. ``make pictures`` makes them; needs Prometheus.
"""

from __future__ import annotations

import os
import re
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psycopg

from cdc.contrib.demo.temp_server import TempServer, free_port
from cdc.postgres import migrations
from tests.fix_consumer import Process
from tests.pictures.dashboard_drawing import Panel, Series, draw
from tests.prometheus.fix_queries import RULES, dashboard
from tests.prometheus.fix_server import Prometheus

PICTURES = {
    reader: Path(__file__).resolve().parents[2] / f"docs/pictures/{name}"
    for reader, name in {"operators": "dashboard.svg", "handlers": "dashboard-handlers.svg"}.items()
}
_JOB, _SLOT = "shop", "cdc"
_STEP_S = 2
_TICK_S = 0.05
_SECONDS = 180
_BURST_AT, _AWAY_FROM, _AWAY_UNTIL, _KILLED_AT, _BACK_AT = 40, 70, 100, 125, 140
_PAUSED_AT, _RESUMED_AT = 145, 165
_BURST = 3_000
_VARIABLES = {
    "$__rate_interval": "10s", "$job": _JOB, "$instance": ".+", "$slot": _SLOT, "$handler": ".+", "$type": ".+",
}  # fmt: skip
_PUBLISH = """
SELECT publish_change('order', (random() * 500)::integer::text, new_data => '{"total": 12.5}'),
  publish_change('customer', (random() * 100)::integer::text, 'UPDATE', '{"name": "Ada"}', '{"name": "A"}'),
  publish_change('mail', (random() * 200)::integer::text,
    new_data => jsonb_build_object('to', CASE WHEN random() < 0.01 THEN 'nobody' ELSE 'ada' END))
"""
_PAUSE = "INSERT INTO cdc_controls (entity_type, because, set_by) VALUES ('customer', 'the index is rebuilt', 'Ada')"
_RESUME = "DELETE FROM cdc_controls"
_PUBLISH_BURST = "SELECT publish_change('order', n::text, new_data => '{}') FROM generate_series(1, %s) AS n"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        os.environ["PICTURE_AWAY"] = str(Path(folder) / "away")
        server = stack.enter_context(TempServer(durable=False, settings={"max_slot_wal_keep_size": "1GB"}))
        db = stack.enter_context(psycopg.connect(server.dsn(), autocommit=True))
        migrations.install(db, "public")
        ports = [free_port(), free_port()]
        prometheus = Prometheus(Path(folder), {_JOB: ports}, RULES.read_text("utf-8"))
        stack.callback(prometheus.stop)
        since = _play(server.dsn(), db, Path(folder), ports)
        for reader, picture in PICTURES.items():
            panels = [_panel(prometheus, panel, since) for panel in dashboard(reader)["panels"]]
            picture.write_text(draw(panels, f"The dashboard of deploy/grafana for {reader}"), "utf-8")


def _play(dsn: str, db: psycopg.Connection, folder: Path, ports: list[int]) -> float:
    """Returns when it began, as seconds of the epoch."""

    def start(number: int) -> Process:
        return Process(
            dsn, folder / f"{number}.log", handlers="tests.pictures.handlers:router", http_port=ports[number],
            slot_name=_SLOT, poll_interval=1,
        )  # fmt: skip

    consumers = [start(0), start(1)]
    try:
        for consumer in consumers:
            consumer.wait_for("owns")
        since, begun = time.time(), time.monotonic()
        for seconds in _ticks(begun):
            db.execute(_PUBLISH)
            if seconds == _BURST_AT:
                db.execute(_PUBLISH_BURST, [_BURST])
            elif seconds == _AWAY_FROM:
                Path(os.environ["PICTURE_AWAY"]).touch()
            elif seconds == _AWAY_UNTIL:
                Path(os.environ["PICTURE_AWAY"]).unlink()
            elif seconds == _KILLED_AT:
                consumers[0].process.send_signal(signal.SIGKILL)
                consumers[0].process.wait()
            elif seconds == _BACK_AT:
                consumers[0] = start(0)
            elif seconds in (_PAUSED_AT, _RESUMED_AT):
                db.execute(_PAUSE if seconds == _PAUSED_AT else _RESUME)
        return since
    finally:
        for consumer in consumers:
            consumer.terminate()


def _ticks(begun: float) -> Iterator[float]:
    """Some twenty a second; each whole second is given once, as such."""
    last = 0
    while (seconds := time.monotonic() - begun) < _SECONDS:
        if int(seconds) > last:
            last = int(seconds)
            yield last
        else:
            yield seconds
        time.sleep(_TICK_S)


def _panel(prometheus: Prometheus, panel: Mapping[str, Any], since: float) -> Panel:
    place = panel["gridPos"]
    series = [
        Series(_legend(target.get("legendFormat", ""), found["metric"]), _points(found["values"], since))
        for target in panel.get("targets", ())
        for found in prometheus.query_range(_filled(target["expr"]), since, since + _SECONDS, _STEP_S)
    ]
    unit = panel.get("fieldConfig", {}).get("defaults", {}).get("unit", "none")
    return Panel(panel["type"], panel["title"], place["x"], place["y"], place["w"], place["h"], unit, tuple(series))


def _filled(expression: str) -> str:
    for variable, value in _VARIABLES.items():
        expression = expression.replace(variable, value)
    return expression


def _legend(template: str, labels: Mapping[str, str]) -> str:
    return re.sub(r"{{\s*(\w+)\s*}}", lambda found: labels.get(found[1], ""), template)


def _points(values: list[tuple[float, str]], since: float) -> tuple[tuple[float, float], ...]:
    return tuple((at - since, float(value)) for at, value in values if value != "NaN")


if __name__ == "__main__":
    main()
