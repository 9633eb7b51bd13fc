"""What no handler wants stays as it is, is said, and is in nobody's way; to throw it away takes a word."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner, Result

import cdc
from cdc.cli import cdc as cdc_command
from cdc.core.errors import UsageError
from tests.eventually import eventually_async
from tests.fix_consumer import consuming, metric

router = cdc.Router()
router.on("order")(print)
router.ignore("refund")
_LEFT = "SELECT entity_type, count(*) FROM entity_changes WHERE NOT processed GROUP BY 1 ORDER BY 1"
_OUTCOMES = "SELECT entity_type, processed, last_error FROM entity_changes ORDER BY seq"


def _router(calls: Counter[str], *types: str) -> cdc.Router:
    router = cdc.Router()

    def count(change: cdc.Change) -> None:
        calls[f"{change.entity_type} {change.entity_id}"] += 1

    for each in types:
        router.on(each)(count)
    return router


def _publish(db: psycopg.Connection, entity_type: str, count: int) -> None:
    db.execute("SELECT publish_change(%s, n::text) FROM generate_series(1, %s) AS n", [entity_type, count])


async def _left(db: psycopg.Connection, expected: dict[str, int]) -> None:
    async def as_expected() -> bool:
        return dict(db.execute(_LEFT).fetchall()) == expected

    await eventually_async(as_expected, what=f"{expected} are left")


@pytest.mark.parametrize("types", [[], ["ordr"], ["other"]])
async def test_a_type_without_a_handler_is_left_and_warned_of_once(
    types: list[str], outbox: str, outbox_db: psycopg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    _publish(outbox_db, "order", 3)
    async with consuming(outbox, _router(Counter(), *types), stream=False, poll_interval=0.05) as app:

        async def told() -> bool:
            app.poll_now()
            return metric(app.metrics.registry, "cdc_outbox_unhandled_changes") == 3

        await eventually_async(told, what="the figure shows them")
        _publish(outbox_db, "other", 1)
        await _left(outbox_db, {"order": 3} | ({} if "other" in types else {"other": 1}))
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert sum("changes of the type order wait" in warning for warning in warnings) == 1
    assert any("no handler is declared" in warning for warning in warnings) == (not types)
    assert {row[2] for row in outbox_db.execute(_OUTCOMES).fetchall()} == {None}


async def test_what_is_ignored_is_discarded_and_says_so(outbox: str, outbox_db: psycopg.Connection) -> None:
    router = _router(Counter(), "order")
    router.ignore("noise", "more")
    for each in ("order", "noise", "more", "unknown"):
        _publish(outbox_db, each, 1)
    async with consuming(outbox, router, stream=False, poll_interval=0.05) as app:
        await _left(outbox_db, {"unknown": 1})
        assert metric(app.metrics.registry, "cdc_changes_handled_total", handler="none", outcome="discarded") == 2
        assert metric(app.metrics.registry, "cdc_changes_handled_total", outcome="skipped") == 0
    ignored = "discarded: no handler wants it, for the router ignores its type"
    assert outbox_db.execute(_OUTCOMES).fetchall() == [
        ("order", True, None), ("noise", True, ignored), ("more", True, ignored), ("unknown", False, None)
    ]  # fmt: skip


async def test_all_that_is_unhandled_is_discarded_where_the_settings_say_so(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    for each in ("order", "unknown"):
        _publish(outbox_db, each, 1)
    async with consuming(outbox, _router(Counter(), "order"), unhandled="discard", stream=False, poll_interval=0.05):
        await _left(outbox_db, {})
    [_, (_, processed, why)] = outbox_db.execute(_OUTCOMES).fetchall()
    assert processed
    assert why == "discarded: no handler wants its type, and unhandled is discard"


def test_a_type_cannot_be_ignored_and_handled() -> None:
    router = _router(Counter(), "order")
    with pytest.raises(UsageError, match="a handler wants changes of it"):
        router.ignore("order")
    with pytest.raises(UsageError):
        router.ignore("*")
    router.ignore("noise")
    with pytest.raises(UsageError, match="which the router ignores"):
        router.on("noise")(lambda change: None)


async def test_a_rolling_update_loses_nothing_though_each_version_lacks_a_handler_of_the_other(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    old_calls, new_calls = Counter[str](), Counter[str]()
    each = 10_000 // 3
    quick: dict[str, Any] = {"stream": False, "poll_interval": 0.1}
    async with consuming(outbox, _router(old_calls, "both", "old"), **quick):
        async with consuming(outbox, _router(new_calls, "both", "new"), **quick):
            for entity_type in ("both", "old", "new"):
                _publish(outbox_db, entity_type, each)

            async def both_done() -> bool:
                return "both" not in dict(outbox_db.execute(_LEFT).fetchall())

            await eventually_async(both_done, what="what both want is handled")
        # The new version is rolled back, then the old one goes on for all.
        await _left(outbox_db, {"new": each - sum(name.startswith("new") for name in new_calls)})
    async with consuming(outbox, _router(new_calls, "both", "new"), **quick):
        await _left(outbox_db, {})
    calls = old_calls + new_calls
    assert len(calls) == 3 * each
    assert set(calls.values()) == {1}, "each once, by one that wants it"
    assert not any(name.startswith("new") for name in old_calls)
    assert not any(name.startswith("old") for name in new_calls)


async def test_a_large_backlog_of_an_unwanted_type_holds_up_nothing(outbox: str, outbox_db: psycopg.Connection) -> None:
    outbox_db.execute(
        "INSERT INTO entity_changes (table_name, operation, entity_id, entity_type)"
        " SELECT 'x', 'INSERT', n::text, 'unwanted' FROM generate_series(1, 100000) AS n"
    )
    calls = Counter[str]()
    async with consuming(outbox, _router(calls, "order"), stream=False, poll_interval=0.1):
        _publish(outbox_db, "order", 50)
        await _left(outbox_db, {"unwanted": 100_000})
    assert len(calls) == 50


@pytest.mark.parametrize(
    ("named", "unhandled"),
    [
        ((), None), (("--deliver-to", "http://127.0.0.1:3000/"), []),
        (("--handlers", "tests.integration.engine.test_unhandled:router"), ["other"]),
        (("--deliver-to", "http://127.0.0.1:3000/", "--type", "order"), ["other", "refund"]),
        (("--handlers", "tests.nosuch:router"), None),
    ],
)  # fmt: skip
def test_the_types_that_wait_for_a_handler_are_named_by_stats_and_by_the_doctor(
    outbox: str, outbox_db: psycopg.Connection, named: tuple[str, ...], unhandled: list[str] | None
) -> None:
    _publish(outbox_db, "order", 1)
    _publish(outbox_db, "refund", 3)
    _publish(outbox_db, "other", 2)

    def told(*command: str) -> Result:
        return CliRunner().invoke(cdc_command, [*command, "--dsn", outbox, *named], catch_exceptions=False)

    stats = told("outbox", "stats")
    assert stats.exit_code == 0, stats.output
    assert (f"no handler wants: {', '.join(unhandled or [])}\n" in stats.stderr) == bool(unhandled)
    assert ("cannot be loaded" in stats.stderr) == ("tests.nosuch:router" in named)
    assert json.loads(told("outbox", "stats", "--json").stdout)["unhandled"] == unhandled
    findings = json.loads(told("doctor", "--no-stream", "--json").stdout)["findings"]
    [found] = [each for each in findings if each["id"] == "unhandled"]
    expected = "skip" if unhandled is None else "warn" if unhandled else "ok"
    assert found["severity"] == expected
    for entity_type, count in (("refund", 3), ("other", 2)):
        assert (f"{count} of {entity_type}" in found["detail"]) == (entity_type in (unhandled or []))
