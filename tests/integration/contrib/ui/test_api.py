"""The API: it says what the commands say, does what they do, and takes what its document allows and nothing else."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import psycopg
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.generation import GenerationMode

from cdc.core.pauses import Pause
from cdc.core.router import Router
from cdc.postgres.actions import ActionLog
from cdc.postgres.controls import Controls
from tests.commands import answer, invoke
from tests.commands_subscription import create
from tests.fix_consumer import states
from tests.fix_outbox import fill
from tests.fix_ui import ask, failed, serving

WHY = {"because": "a test"}


def _without_ages(value: Any) -> Any:
    """Ages differ between two readings."""
    if isinstance(value, dict):
        return {name: _without_ages(item) for name, item in value.items() if not name.endswith(("age_s", "ends_in_s"))}
    return [_without_ages(item) for item in value] if isinstance(value, list) else value


_SAYING = {
    "/api/changes": "outbox list --state dead", "/api/changes/2": "outbox show 2",
    "/api/changes/2?payload=true": "outbox show 2 --show-payload", "/api/controls": "controls",
    "/api/actions": "actions", "/api/backfills": "backfill status", "/api/subscriptions": "subscription list",
    "/api/status": "status", "/api/limits": "limits list",
}  # fmt: skip


@pytest.mark.parametrize("path", _SAYING)
def test_it_says_what_the_commands_say(interface: str, outbox: str, outbox_db: psycopg.Connection, path: str) -> None:
    failed(outbox_db, 3)
    create(outbox, "search")
    Controls("public").pause(outbox_db, Pause(0, entity_type="mail", because="it is down", set_by="anna"))
    answer(invoke(outbox, "limits", "set", "send", "--rate", "5/s", "--because", "busy", "--json"))
    outbox_db.execute("CREATE TABLE t (id int PRIMARY KEY)")
    answer(invoke(outbox, "track", "t", "--json"))
    answer(invoke(outbox, "backfill", "t", "--json"))
    said = answer(invoke(outbox, *_SAYING[path].split(), "--json"))
    status, found, _ = ask(interface, path)
    assert status == 200, found
    for name in ["outbox"] if path == "/api/status" else said:
        assert _without_ages(found[name]) == _without_ages(said[name])
        assert found[name], "something is compared"


def test_changes_are_decided_about_by_name_and_by_filters(interface: str, outbox_db: psycopg.Connection) -> None:
    failed(outbox_db, 5)
    failed(outbox_db, 2, "order")
    by_type = {"filters": {"type": "mail"}, **WHY}
    assert ask(interface, "/api/changes/retry", {**by_type, "dry_run": True})[1]["matching"] == 5
    assert states(outbox_db) == {"dead": 7}
    status, refused, _ = ask(interface, "/api/changes/retry", {**by_type, "at_most": 4})
    assert (status, "5 match now" in refused["error"]) == (409, True)
    status, done, _ = ask(interface, "/api/changes/retry", by_type)
    assert (status, done["done"], done["left"]) == (200, 5, 0)
    assert ask(interface, "/api/changes/discard", {"changes": [6, 7], **WHY})[1]["done"] == 2
    status, done, _ = ask(interface, "/api/changes/replay", {"changes": [6], **WHY})
    assert (status, done["done"]) == (200, 1)
    assert states(outbox_db) == {"waiting": 5, "processed": 2, "fresh": 1}
    assert [(each.action, each.via, each.person, each.count, each.because) for each in
            ActionLog("public").latest(outbox_db, 10)] == [
        (action, "api", "anna", count, "a test") for action, count in (("replay", 1), ("discard", 2), ("retry", 5))
    ]  # fmt: skip


def test_a_replay_by_filters_is_given_again_without_doing_it_twice(
    interface: str, outbox_db: psycopg.Connection
) -> None:
    fill(outbox_db, 4)
    asked = {"filters": {}, **WHY}
    _, done, _ = ask(interface, "/api/changes/replay", asked)
    _, again, _ = ask(
        interface, "/api/changes/replay", {**asked, "unless_replayed_since": done["unless_replayed_since"]}
    )
    assert (done["done"], again["done"], states(outbox_db)["fresh"]) == (4, 0, 4)


def test_pauses_are_set_and_ended(interface: str, outbox_db: psycopg.Connection) -> None:
    status, made, _ = ask(interface, "/api/pauses", {"handler": "mail", "for": "30m", **WHY})
    assert (status, made["paused"]["scope"], made["paused"]["set_by"]) == (200, "handler", "anna")
    assert ask(interface, "/api/pauses/resume", {"type": "other", **WHY})[0] == 404
    status, ended, _ = ask(interface, "/api/pauses/resume", {"handler": "mail", **WHY})
    assert (status, len(ended["resumed"]), ended["left"]) == (200, 1, [])


def test_it_says_what_was_done_of_late_by_handler_and_type(outbox: str, outbox_db: psycopg.Connection) -> None:
    router = Router()
    router.on("task", "INSERT", name="assign")(lambda _change: None)
    fill(outbox_db, 4, days=-0.1)  # later than now, so that the minute does not end
    outbox_db.execute("UPDATE entity_changes SET changed_at = processed_at - 2 * seq * interval '1 s'")
    outbox_db.execute("UPDATE entity_changes SET entity_type = 'task'")
    outbox_db.execute(
        "INSERT INTO change_attempts (seq, subscription, attempt, handler, ended_at, outcome, error_kind, error_class,"
        " error_text) SELECT n, 'default', 1, 'assign', now() - n * interval '20 min', CASE n WHEN 2 THEN 'dead' ELSE"
        " 'retried' END, 'KeyError', 'builtins.KeyError', 'x' FROM generate_series(5, 0, -1) AS n"
    )
    with serving(outbox, router=router) as address:
        _, found, _ = ask(address, "/api/activity")
    [done] = found["processed"]
    assert (done["handler"], done["entity_type"], done["operation"]) == ("assign", "task", "INSERT")
    assert done["per_s"] == pytest.approx(4 / 60)
    assert (done["latency_p50_s"], done["latency_p99_s"]) == (pytest.approx(5), pytest.approx(7.94))
    [failure] = found["failed"]
    assert (failure["handler"], failure["error_kind"], failure["attempts"], failure["dead"], failure["more"]) == (
        "assign", "KeyError", 3, 1, False
    )  # fmt: skip


def test_limits_are_set_changed_and_removed(interface: str, outbox_db: psycopg.Connection) -> None:
    for rate in ("14/s", "5/s"):
        status, made, _ = ask(interface, "/api/limits", {"handler": "send", "rate": rate, "at_once": 50, **WHY})
        assert (status, made["limit"]["rate"], made["limit"]["set_by"]) == (200, rate, "anna")
    ask(interface, "/api/limits", {"handler": "other", "at_once": 1, **WHY})
    assert [each["handler"] for each in ask(interface, "/api/controls")[1]["limits"]] == ["send", "other"]
    assert ask(interface, "/api/limits/clear", {"handler": "none", **WHY})[0] == 404
    status, ended, _ = ask(interface, "/api/limits/clear", {"handler": "send", **WHY})
    assert (status, [each["rate"] for each in ended["cleared"]]) == (200, ["5/s"])
    assert len(ask(interface, "/api/limits/clear", {"all": True, **WHY})[1]["cleared"]) == 1
    assert [(each.action, each.via, each.because) for each in ActionLog("public").latest(outbox_db, 10)] == [
        (action, "api", "a test") for action in ("clear limit", "clear limit", "limit", "limit", "limit")
    ]


_RETRY, _PAUSES, _LIMITS = "/api/changes/retry", "/api/pauses", "/api/limits"


@pytest.mark.parametrize(("path", "body", "status"), [
    (_RETRY, {"changes": [1]}, 422), (_RETRY, {"filters": {}, "because": "  "}, 422), (_RETRY, {**WHY}, 422),
    (_RETRY, {"changes": [1], "filters": {}, **WHY}, 422), (_RETRY, {"changes": [1], **WHY}, 404),
    (_RETRY, {"filters": {"handler": "x"}, **WHY}, 400), (_PAUSES, {"key": "1", **WHY}, 422),
    (_PAUSES, {"for": "soon", **WHY}, 422), (_PAUSES, {"subscription": "none", **WHY}, 404),
    ("/api/backfills/7/pause", {**WHY}, 404), ("/api/subscriptions/none/drop", {**WHY}, 404),
    (_LIMITS, {"handler": "x", **WHY}, 422),
    (_LIMITS, {"handler": "*", "rate": "1/s", **WHY}, 422), (_LIMITS, {"handler": "x", "rate": "fast", **WHY}, 422),
    (_LIMITS, {"handler": "x", "rate": "1/s", "by": "nothing", **WHY}, 422),
    (_LIMITS, {"handler": "x", "rate": "1/s", "subscription": "none", **WHY}, 404),
    ("/api/limits/clear", {**WHY}, 422), ("/api/limits/clear", {"all": True, "handler": "x", **WHY}, 422),
])  # fmt: skip
def test_what_does_not_make_sense_is_refused_in_a_sentence(
    interface: str, path: str, body: dict[str, Any], status: int
) -> None:
    found, said, _ = ask(interface, path, body)
    assert (found, bool(said["error"])) == (status, True)


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_no_request_that_the_document_allows_or_forbids_breaks_it(
    interface: str, outbox_db: psycopg.Connection, mode: GenerationMode
) -> None:
    """No 500, no status and no answer that the document does not know. Of the doctor no request says anything."""
    failed(outbox_db, 3)
    fill(outbox_db, 3)
    load_all_checks()
    checks = CHECKS.get_by_names(
        ["not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance"]
    )
    document = schemathesis.openapi.from_url(f"{interface}/api/openapi.json")
    operations: list[Any] = [found.ok() for found in document.get_all_operations()]  # type: ignore[union-attr]
    for operation in operations:
        if not operation.path.endswith("/doctor"):
            _try(operation, mode, checks)
    assert len(operations) > 10


def _try(operation: Any, mode: GenerationMode, checks: Any) -> None:
    @settings(max_examples=12, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(operation.as_strategy(generation_mode=mode))
    def each(case: Any) -> None:
        case.call_and_validate(checks=checks)

    with suppress(Unsatisfiable):  # what takes nothing cannot be asked for wrongly
        each()
