"""The page for people without a dashboard, and the figures behind it, all of them in memory.

A request reads what is here and asks nobody: neither the database nor the event loop, so that the page is there when
they are not. What it shows comes from three sides: the metrics of this process, read every few seconds by a thread of
the page's own, which is how it has a past; the database, as the collector saw it last; and the failures of handlers as
the log tells them, by class and place and without their text, which may quote a row.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import resources
from typing import Any

from prometheus_client import CollectorRegistry

from cdc import __version__
from cdc.core.model import SHARDS
from cdc.diagnostics.status import Outbox
from cdc.observability.failures import Failure
from cdc.observability.history import Buckets, History, Point, Reading, added_up
from cdc.replication.slot_health import Slot, judge, outlook
from cdc.runtime.supervisor import Supervisor

SCHEMA = 1
"""Raised when a field of /status.json is renamed or removed; new fields do not raise it."""

_EVERY_S = 5.0
_KEPT_S = 900.0
_FAILURES_MAX = 20

Answer = tuple[list[tuple[str, str]], bytes]
"""Headers and body."""
Checks = Callable[[], Iterable[tuple[str, bool, str]]]
"""(name, whether it is well, detail)."""

_METRICS = (
    "cdc_role", "cdc_stream_unavailable", "cdc_shards_owned", "cdc_members", "cdc_lanes_changes", "cdc_lanes_capacity",
    "cdc_changes_handled_total", "cdc_handler_errors_total", "cdc_change_latency_seconds_bucket",
    "cdc_outbox_changes", "cdc_outbox_oldest_ready_age_seconds", "cdc_slot_retained_wal_bytes",
    "cdc_slot_confirmed_lag_bytes",
)  # fmt: skip
_ALWAYS = [
    ("Cache-Control", "no-store"),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
]


class Page:
    """start() once, stop() once; fed from any thread. ``checks``: those of the probes."""

    def __init__(
        self,
        registry: CollectorRegistry,
        checks: Checks,
        *,
        every_s: float = _EVERY_S,
        supervisor: Supervisor | None = None,
    ) -> None:
        self._supervisor = supervisor or Supervisor()
        self._registry = registry
        self._checks = checks
        self._every_s = every_s
        self._html = _document()
        self._started = time.monotonic()
        self._history = History(round(_KEPT_S / _EVERY_S))
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._kept, name="cdc-page", daemon=True)
        # Each replaced whole by one writer, and read by the threads that answer.
        self._failures: dict[tuple[str, str], tuple[int, Failure]] = {}
        self._outbox: tuple[float, Outbox] | None = None
        self._slot: tuple[float, dict[str, Any]] | None = None
        self._slot_before: Slot | None = None

    @property
    def routes(self) -> Mapping[str, Callable[[], Answer]]:
        return {"/": lambda: self._html, "/status.json": self._figures}

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    # --- what others tell ------------------------------------------------------------------------------------------

    def failed(self, failure: Failure) -> None:
        """An attempt failed; on the event loop. An error that repeats is one line, or it would push out the others."""
        key = (failure.handler, failure.told)
        times, _ = self._failures.get(key, (0, failure))
        others = [item for item in self._failures.items() if item[0] != key]
        self._failures = dict([*others, (key, (times + 1, failure))][-_FAILURES_MAX:])

    def show_outbox(self, outbox: Outbox | None) -> None:
        """As the database has it; None: it could not be read, and old figures are worse than none."""
        self._outbox = (time.monotonic(), outbox) if outbox else None

    def show_slot(self, name: str, slot: Slot | None) -> None:
        """None: there is none of that name."""
        expected = outlook(self._slot_before, slot) if self._slot_before and slot else None
        self._slot_before = slot
        figures = {"name": name, "present": False} if slot is None else _of_slot(slot, asdict(judge(slot, expected)))
        self._slot = (time.monotonic(), figures)

    def forget_slot(self) -> None:
        """It could not be read."""
        self._slot, self._slot_before = None, None

    # --- the past --------------------------------------------------------------------------------------------------

    def _kept(self) -> None:
        self._supervisor.keep_here("page", self._run, self._stopping)

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._history.add(_reading(time.monotonic(), _Values(self._registry)))
            self._stopping.wait(self._every_s)

    # --- answers ---------------------------------------------------------------------------------------------------

    def _figures(self) -> Answer:
        body = json.dumps(self.figures(), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return [("Content-Type", "application/json"), *_ALWAYS], body.encode()

    def figures(self) -> dict[str, Any]:
        """What /status.json holds. Ages in seconds: the reader's clock has no say in them."""
        values, now = _Values(self._registry), time.monotonic()
        return {
            "schema": SCHEMA,
            "version": __version__,
            "at": _iso(datetime.now(UTC)),
            "up_s": round(now - self._started, 1),
            "consumer": self._consumer(values),
            "outbox": self._outbox and _of_outbox(*self._outbox, values, now),
            "slot": self._slot and {"seen_s_ago": round(now - self._slot[0], 1), **self._slot[1]},
            "failures": [_of_failure(*each, time.time()) for each in reversed(self._failures.values())],
            "history": {
                "every_s": self._every_s,
                "points": [_of_point(point, now) for point in self._history.points()],
            },
        }

    def _consumer(self, values: _Values) -> dict[str, Any]:
        return {
            "checks": [{"name": name, "ok": ok, "detail": detail} for name, ok, detail in self._checks()],
            "role": values.state("cdc_role"),
            "not_streaming": values.state("cdc_stream_unavailable"),
            "shards": {"owned": int(values.sum("cdc_shards_owned")), "of": SHARDS},
            "consumers": int(values.sum("cdc_members")),
            "window": {**values.by("cdc_lanes_changes"), "capacity": int(values.sum("cdc_lanes_capacity"))},
            "attempts": values.by("cdc_changes_handled_total", "outcome"),
        }


class _Values:
    """The samples of the metrics that the page shows, read once."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._samples: dict[str, list[tuple[dict[str, str], float]]] = {}
        for family in registry.restricted_registry(_METRICS).collect():
            for sample in family.samples:
                self._samples.setdefault(sample.name, []).append((sample.labels, sample.value))

    def sum(self, name: str, **labels: str) -> float:
        """0 where there are none."""
        return sum(value for having, value in self._samples.get(name, ()) if labels.items() <= having.items())

    def gauge(self, name: str) -> float | None:
        """None where it has no value now."""
        return self.sum(name) if name in self._samples else None

    def state(self, name: str) -> str | None:
        """Of a state set the label whose value is 1."""
        return next(
            (label for having, value in self._samples.get(name, ()) if value for label in having.values()), None
        )

    def by(self, name: str, label: str = "state") -> dict[str, int]:
        """Counts, summed over the other labels."""
        found: dict[str, int] = {}
        for having, value in self._samples.get(name, ()):
            found[having[label]] = found.get(having[label], 0) + int(value)
        return found

    def histogram(self, name: str) -> Buckets:
        """Over all labels."""
        return added_up([((float(having["le"]), value),) for having, value in self._samples.get(f"{name}_bucket", ())])


def _reading(at: float, values: _Values) -> Reading:
    return Reading(
        at=at,
        processed=values.sum("cdc_changes_handled_total", outcome="processed"),
        failed=values.sum("cdc_handler_errors_total"),
        latency=values.histogram("cdc_change_latency_seconds"),
        oldest_ready_age_s=values.gauge("cdc_outbox_oldest_ready_age_seconds"),
        retained_wal_bytes=values.gauge("cdc_slot_retained_wal_bytes"),
        confirmed_lag_bytes=values.gauge("cdc_slot_confirmed_lag_bytes"),
    )


def _of_point(point: Point, now: float) -> dict[str, float | None]:
    figures = {name: value if value is None else round(value, 6) for name, value in asdict(point).items()}
    del figures["at"]
    return {"s_ago": round(now - point.at, 1), **figures}


def _of_outbox(at: float, outbox: Outbox, values: _Values, now: float) -> dict[str, Any]:
    stats = outbox.stats
    return {
        "seen_s_ago": round(now - at, 1),
        "oldest_ready_age_s": values.gauge("cdc_outbox_oldest_ready_age_seconds"),
        "types": [asdict(each) for each in stats.types],
        "more": {"fresh": stats.more_fresh, "waiting": stats.more_waiting, "dead": stats.more_dead},
        "letters": [
            {**asdict(letter), "id": str(letter.id), "at": letter.at and _iso(letter.at)} for letter in outbox.letters
        ],
    }


def _of_slot(slot: Slot, verdict: dict[str, Any]) -> dict[str, Any]:
    shown = ("name", "plugin", "active", "temporary", "wal_status", "retained_wal_bytes", "confirmed_lag_bytes",
             "safe_wal_bytes", "spilled_bytes")  # fmt: skip
    return {"present": True, **{name: getattr(slot, name) for name in shown}, "verdict": verdict}


def _of_failure(times: int, failure: Failure, now: float) -> dict[str, Any]:
    figures = {**asdict(failure), "id": str(failure.id), "times": times, "s_ago": round(now - failure.at, 1)}
    del figures["at"]
    return figures


def _iso(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _document() -> Answer:
    """The page with its one style and its one script, which nothing else may join: the policy names their hashes."""
    html = resources.files("cdc.http").joinpath("status_page.html").read_text("utf-8")
    policy = {
        "default-src": "'none'",
        "script-src": _hash_of("script", html),
        "style-src": _hash_of("style", html),
        "connect-src": "'self'",
        "img-src": "data:",  # the empty icon, without which a browser asks for one
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
    }
    headers = [
        ("Content-Type", "text/html; charset=utf-8"),
        ("Content-Security-Policy", "; ".join(f"{name} {value}" for name, value in policy.items())),
        *_ALWAYS,
    ]
    return headers, html.encode()


def _hash_of(element: str, html: str) -> str:
    [content] = re.findall(rf"<{element}>(.*?)</{element}>", html, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
