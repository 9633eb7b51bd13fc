"""The status page for operators without a dashboard, and its figures, all from memory.

A request reads memory and uses neither the database nor the event loop, so the page works while they do not. Its
figures have three sources: the status of this process, sampled every few seconds by the page's own thread, which keeps
the history; the last reading of the database; and the failures of handlers as they are logged, by class and place and
without their text, which may quote a row.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import resources
from typing import Any

from cdc import __version__
from cdc.core.model import SHARDS
from cdc.core.pauses import Pause
from cdc.diagnostics.status import Outbox, Readings, SlotReading
from cdc.observability.failures import Failure
from cdc.observability.history import History, Point, Reading
from cdc.observability.snapshots import ProcessStatus
from cdc.replication.slot_health import assess, outlook
from cdc.runtime.supervisor import Supervisor

SCHEMA = 1
"""Raised when a field of /status.json is renamed or removed; new fields do not raise it."""

_EVERY_S = 5.0
_KEPT_S = 900.0

Answer = tuple[list[tuple[str, str]], bytes]
"""Headers and body."""
Checks = Callable[[], Iterable[tuple[str, bool, str]]]
"""(name, whether it passed, detail)."""

_ALWAYS = [
    ("Cache-Control", "no-store"),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
]


class StatusPage:
    """start() once, stop() once. Its arguments are called in its own threads. ``checks``: those of the probes.

    ``beside``: the subscriptions of all consumers of this process, where it has several.
    """

    def __init__(
        self,
        status: Callable[[], ProcessStatus],
        checks: Checks,
        *,
        readings: Callable[[], Readings] = Readings,
        failures: Callable[[], Sequence[tuple[int, Failure]]] = list,
        beside: Sequence[str] = (),
        every_s: float = _EVERY_S,
        supervisor: Supervisor | None = None,
    ) -> None:
        self._supervisor = supervisor or Supervisor()
        self._status = status
        self._checks = checks
        self._readings = readings
        self._failures = failures
        self._beside = beside
        self._every_s = every_s
        self._html = _document()
        self._started = time.monotonic()
        self._history = History(round(_KEPT_S / _EVERY_S))
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._kept, name="cdc-page", daemon=True)

    @property
    def routes(self) -> Mapping[str, Callable[[], Answer]]:
        return {"/": lambda: self._html, "/status.json": self.answer}

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    # --- history ---------------------------------------------------------------------------------------------------

    def _kept(self) -> None:
        self._supervisor.keep_here("page", self._run, self._stopping)

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._history.add(_reading(time.monotonic(), self._status()))
            self._stopping.wait(self._every_s)

    # --- answers ---------------------------------------------------------------------------------------------------

    def answer(self) -> Answer:
        """/status.json."""
        body = json.dumps(self.figures(), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return [("Content-Type", "application/json"), *_ALWAYS], body.encode()

    def figures(self) -> dict[str, Any]:
        """The content of /status.json. Ages in seconds, so that the reader's clock does not matter."""
        now, status, readings = time.monotonic(), self._status(), self._readings()
        return {
            "schema": SCHEMA,
            "version": __version__,
            "at": _iso(datetime.now(UTC)),
            "up_s": round(now - self._started, 1),
            "consumer": self._consumer(status, now),
            "subscriptions": _of_subscriptions(status),
            "beside": list(self._beside),
            "outbox": readings.outbox and _of_outbox(*readings.outbox, status, now),
            "slot": readings.slot and _of_slot(readings.slot, now),
            "failures": [_of_failure(*each, time.time()) for each in self._failures()],
            "history": {
                "every_s": self._every_s,
                "points": [_of_point(point, now) for point in self._history.points()],
            },
        }

    def _consumer(self, status: ProcessStatus, now: float) -> dict[str, Any]:
        consumer = status.consumer
        return {
            "checks": [{"name": name, "ok": ok, "detail": detail} for name, ok, detail in self._checks()],
            "subscription": status.subscription,
            "paused": consumer.paused,
            "role": status.role,
            "not_streaming": status.not_streaming,
            "shards": {"owned": consumer.owned_shards, "of": SHARDS},
            "consumers": consumer.members,
            "window": {
                "running": consumer.running,
                "queued": consumer.queued,
                "settling": consumer.settling,
                "capacity": consumer.window,
            },
            "attempts": dict(status.handlers.attempts),
            "pauses": [_of_pause(pause, now - consumer.pauses_read_at) for pause in consumer.pauses],
        }


def _reading(at: float, status: ProcessStatus) -> Reading:
    handlers, outbox, slot = status.handlers, status.poller.outbox, status.poller.slot
    return Reading(
        at=at,
        processed=handlers.attempts.get("processed", 0),
        failed=handlers.errors,
        latency=handlers.latency,
        oldest_ready_age_s=outbox.oldest_ready_age_s if outbox else None,
        retained_wal_bytes=slot.retained_wal_bytes if slot else None,
        confirmed_lag_bytes=slot.confirmed_lag_bytes if slot else None,
    )


def _of_point(point: Point, now: float) -> dict[str, float | None]:
    figures = {name: value if value is None else round(value, 6) for name, value in asdict(point).items()}
    del figures["at"]
    return {"s_ago": round(now - point.at, 1), **figures}


def _of_outbox(at: float, outbox: Outbox, status: ProcessStatus, now: float) -> dict[str, Any]:
    stats, figures = outbox.stats, status.poller.outbox
    return {
        "seen_s_ago": round(now - at, 1),
        "oldest_ready_age_s": figures.oldest_ready_age_s if figures else None,
        "truncate_age_s": figures.truncate_age_s if figures else None,
        "due_later": outbox.due_later and asdict(outbox.due_later),
        "types": [asdict(each) for each in stats.types],
        "more": {"fresh": stats.more_fresh, "waiting": stats.more_waiting, "dead": stats.more_dead},
        "dead_letters": [
            {**asdict(dead_letter), "id": str(dead_letter.id), "at": dead_letter.at and _iso(dead_letter.at)}
            for dead_letter in outbox.dead_letters
        ],
    }


def _of_subscriptions(status: ProcessStatus) -> dict[str, Any] | None:
    """Those that this consumer tells of; None: it may not see them, or has not yet."""
    seen = status.poller.subscriptions
    return None if seen is None else asdict(seen)


def _of_pause(pause: Pause, read_s_ago: float) -> dict[str, Any]:
    """Without the key, which is row content."""
    return {
        "what": str(pause),
        "scope": pause.scope,
        "since_s_ago": round(pause.age_s + read_s_ago, 1),
        "ends_in_s": None if pause.ends_in_s is None else max(0.0, round(pause.ends_in_s - read_s_ago, 1)),
        "by": pause.set_by,
        "because": pause.because,
    }


def _of_slot(reading: SlotReading, now: float) -> dict[str, Any]:
    seen = {"seen_s_ago": round(now - reading.at, 1), "name": reading.name}
    slot = reading.slot
    if slot is None:
        return {**seen, "present": False}
    health = assess(slot, outlook(reading.before, slot) if reading.before else None)
    shown = ("plugin", "active", "temporary", "wal_status", "retained_wal_bytes", "confirmed_lag_bytes",
             "safe_wal_bytes", "spilled_bytes")  # fmt: skip
    return {**seen, "present": True, **{name: getattr(slot, name) for name in shown}, "health": asdict(health)}


def _of_failure(times: int, failure: Failure, now: float) -> dict[str, Any]:
    figures = {**asdict(failure), "id": str(failure.id), "times": times, "s_ago": round(now - failure.at, 1)}
    del figures["at"]
    return figures


def _iso(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _document() -> Answer:
    """The page with its one style and its one script; the policy names their hashes, so no other may run."""
    html = resources.files("cdc.http").joinpath("status_page.html").read_text("utf-8")
    policy = {
        "default-src": "'none'",
        "script-src": _hash_of("script", html),
        "style-src": _hash_of("style", html),
        "connect-src": "'self'",
        "img-src": "data:",  # the empty icon, without which a browser requests one
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
