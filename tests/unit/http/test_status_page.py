import base64
import hashlib
import json
import math
import re
import threading
import time
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest

from cdc.core.lsn import Lsn
from cdc.core.model import ChangeState
from cdc.diagnostics.status import DeadLetter, Outbox, Readings, SlotReading
from cdc.http.status_page import StatusPage
from cdc.observability.failures import Failure, RecentFailures
from cdc.observability.snapshots import (
    ConsumerStatus,
    HandlerStatus,
    OutboxStatus,
    PollerStatus,
    ProcessStatus,
    StreamStatus,
)
from cdc.postgres.admin import Stats, TypeStats
from cdc.replication.slot_health import SlotReport
from tests.eventually import eventually

ID = UUID(int=7)


class _Source:
    """What a page is given, as the test has it."""

    def __init__(self) -> None:
        self.status = ProcessStatus()
        self.readings = Readings()
        self.failures = RecentFailures()

    def page(self, **options: Any) -> StatusPage:
        return StatusPage(
            lambda: self.status,
            lambda: [("loop.consumer", True, "0.4s")],
            readings=lambda: self.readings,
            failures=lambda: self.failures.all,
            **options,
        )


@pytest.fixture
def source() -> _Source:
    return _Source()


@pytest.fixture
def page(source: _Source) -> StatusPage:
    return source.page()


def _answer(page: StatusPage, path: str) -> tuple[dict[str, str], str]:
    headers, body = page.routes[path]()
    return dict(headers), body.decode()


def _figures(page: StatusPage) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads(_answer(page, "/status.json")[1])
    return figures


def _failure(told: str = "ValueError at x.py:3", handler: str = "invoice", again_in_s: float | None = 2) -> Failure:
    return Failure(0.0, handler, told, "order", ID, 1, again_in_s)


def _slot(**figures: Any) -> SlotReport:
    unknown = dict.fromkeys(SlotReport.__dataclass_fields__)
    shown = {"name": "cdc", "plugin": "wal2json", "active": True, "temporary": False, "wal_status": "reserved",
             "current_lsn": Lsn(0), "retained_wal_bytes": 10, "confirmed_lag_bytes": 3,
             "seen_at": datetime.now(UTC)}  # fmt: skip
    return SlotReport(**{**unknown, **shown, **figures})  # a test's own figures


def test_the_page_loads_nothing_from_elsewhere(page: StatusPage) -> None:
    _, html = _answer(page, "/")
    assert re.findall(r"(?:https?:)?//[\w.]+", re.sub(r"^\s*// .*$", "", html, flags=re.MULTILINE)) == []
    assert re.findall(r"\bsrc=|@import|url\(", html) == []
    linked = set(re.findall(r'href="([^"]*)"', html))
    assert linked == {"data:,", "metrics", "livez", "readyz", "status.json"}, "relative, so that a proxy may add a path"


def test_the_policy_lets_the_pages_own_style_and_script_run_and_nothing_else(page: StatusPage) -> None:
    headers, html = _answer(page, "/")
    policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == "'none'"
    for element, directive in (("script", "script-src"), ("style", "style-src")):
        [content] = re.findall(rf"<{element}>(.*?)</{element}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert policy[directive] == f"'sha256-{digest}'"
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert not re.search(r'\sstyle="|\son[a-z]+="|innerHTML|insertAdjacentHTML|eval\(', html)


def test_nothing_is_kept_by_the_browser_or_given_to_other_sites(page: StatusPage) -> None:
    for path in page.routes:
        headers, _ = _answer(page, path)
        assert headers["Cache-Control"] == "no-store"
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"


def test_before_anything_is_known_it_says_so_and_invents_no_figures(page: StatusPage) -> None:
    figures = _figures(page)
    assert (figures["outbox"], figures["slot"], figures["failures"], figures["history"]["points"]) == (
        None,
        None,
        [],
        [],
    )
    assert figures["schema"] == 1
    assert set(figures) == {
        "schema",
        "version",
        "at",
        "up_s",
        "beside",
        "consumer",
        "subscriptions",
        "outbox",
        "slot",
        "failures",
        "history",
    }


def test_the_consumers_own_figures_are_those_of_its_status(page: StatusPage, source: _Source) -> None:
    source.status = ProcessStatus(
        stream=StreamStatus(reason="slot_busy"),
        consumer=ConsumerStatus(owned_shards=21, members=3, window=2000, running=4, queued=5, settling=6),
        handlers=HandlerStatus(attempts={"processed": 1}),
    )
    consumer = _figures(page)["consumer"]
    assert (consumer["role"], consumer["not_streaming"]) == ("standby", "slot_busy")
    assert consumer["shards"] == {"owned": 21, "of": 64}
    assert consumer["consumers"] == 3
    assert consumer["window"] == {"running": 4, "queued": 5, "settling": 6, "capacity": 2000}
    assert consumer["attempts"]["processed"] == 1
    assert consumer["checks"] == [{"name": "loop.consumer", "ok": True, "detail": "0.4s"}]


def test_an_error_that_repeats_is_one_line_and_does_not_push_out_the_others(page: StatusPage, source: _Source) -> None:
    source.failures.add(_failure("KeyError at y.py:1"))
    for _ in range(100):
        source.failures.add(_failure())
    source.failures.add(_failure(handler="answer", again_in_s=None))
    shown = [
        (each["handler"], each["summary"], each["times"], each["again_in_s"]) for each in _figures(page)["failures"]
    ]
    assert shown == [
        ("answer", "ValueError at x.py:3", 1, None),
        ("invoice", "ValueError at x.py:3", 100, 2),
        ("invoice", "KeyError at y.py:1", 1, 2),
    ]


def test_only_the_last_errors_are_kept(page: StatusPage, source: _Source) -> None:
    for number in range(100):
        source.failures.add(_failure(f"ValueError at x.py:{number}"))
    assert [each["summary"] for each in _figures(page)["failures"]] == [
        f"ValueError at x.py:{n}" for n in range(99, 79, -1)
    ]


def test_the_outbox_is_shown_as_it_was_seen_and_goes_when_it_cannot_be_read(page: StatusPage, source: _Source) -> None:
    at = datetime(2026, 1, 2, 3, 4, 5, 6, UTC)
    dead_letter = DeadLetter(5, ID, ChangeState.DEAD, "order", 3, at, True, "ValueError")
    stats = Stats([TypeStats("order", 4, 1, 2, 3, 1, 0.5, None)], more_dead=True)
    source.readings = Readings(outbox=(time.monotonic(), Outbox(stats, [dead_letter])))
    outbox = _figures(page)["outbox"]
    assert outbox["types"][0]["dead"] == 3
    assert outbox["more"] == {"fresh": False, "waiting": False, "dead": True}
    assert outbox["dead_letters"] == [
        {"seq": 5, "id": str(ID), "state": "dead", "entity_type": "order", "attempts": 3, "at": "2026-01-02T03:04:05Z",
         "pauses_key": True, "error": "ValueError"}
    ]  # fmt: skip
    source.readings = Readings()
    assert _figures(page)["outbox"] is None


def test_the_slot_is_shown_with_its_health(page: StatusPage, source: _Source) -> None:
    source.readings = Readings(slot=SlotReading(0, "cdc", _slot(wal_status="lost")))
    slot = _figures(page)["slot"]
    assert (slot["present"], slot["wal_status"], slot["health"]["fine"]) == (True, "lost", False)
    assert "cdc slot recreate cdc" in slot["health"]["remedy"]
    source.readings = Readings(slot=SlotReading(0, "cdc", None))
    assert _figures(page)["slot"]["present"] is False
    source.readings = Readings()
    assert _figures(page)["slot"] is None


def test_a_slot_that_will_soon_be_lost_is_found_by_two_readings(page: StatusPage, source: _Source) -> None:
    before, slot = (
        _slot(active=False, safe_wal_bytes=10 << 20, current_lsn=Lsn(written),
              seen_at=datetime.fromtimestamp(seconds, UTC))
        for seconds, written in ((0, 0), (10, 1 << 20))
    )  # fmt: skip
    source.readings = Readings(slot=SlotReading(0, "cdc", slot, before))
    assert "lost in about 100 s" in _figures(page)["slot"]["health"]["sentence"]


def test_its_thread_keeps_the_past_of_the_status(source: _Source) -> None:
    page = source.page(every_s=0.01)
    page.start()
    try:
        eventually(lambda: _figures(page)["history"]["points"], what="two readings")
        source.status = ProcessStatus(
            handlers=HandlerStatus(attempts={"processed": 1}, latency=((0.1, 0), (0.25, 1), (math.inf, 1))),
            poller=PollerStatus(outbox=OutboxStatus(changes={}, oldest_ready_age_s=7, table_bytes=0, dead_tuples=0)),
        )
        processed = eventually(lambda: _with(page, "processed_per_s"), what="the rate of what was processed")
        assert 0.1 <= processed["latency_p50_s"] <= 0.25
        assert eventually(lambda: _with(page, "oldest_ready_age_s"))["oldest_ready_age_s"] == 7
        assert _figures(page)["history"]["points"][-1]["retained_wal_bytes"] is None, "no slot was seen"
    finally:
        page.stop(20)


def _with(page: StatusPage, figure: str) -> Any:
    return next((point for point in _figures(page)["history"]["points"] if point[figure]), None)


def test_stop_ends_its_thread_and_may_come_before_the_start(source: _Source) -> None:
    source.page().stop(1)
    page = source.page()
    page.start()
    page.stop(20)
    assert "cdc-page" not in [thread.name for thread in threading.enumerate()]


def test_what_others_named_is_data_and_no_markup(page: StatusPage, source: _Source) -> None:
    source.failures.add(_failure("</script><b>"))
    assert _answer(page, "/status.json")[0]["Content-Type"] == "application/json"
    assert _figures(page)["failures"][0]["summary"] == "</script><b>"
