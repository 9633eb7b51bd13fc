"""What the figures are to be. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tests.bench.report import Summary, aligned, number


class Target(NamedTuple):
    """This figure is at least ``bound`` in the worst of the rounds; or with ``at_most``, at most that."""

    what: str
    scenario: str
    figure: str
    bound: float
    unit: str = ""
    at_most: bool = False

    @property
    def wanted(self) -> str:
        return f"{'at most' if self.at_most else 'at least'} {number(self.bound)} {self.unit}".rstrip()


class Verdict(NamedTuple):
    """``found`` None: it was not measured. ``met`` None: the same."""

    target: Target
    found: Summary | None

    @property
    def met(self) -> bool | None:
        if self.found is None:
            return None
        values, bound = self.found.values, self.target.bound
        return max(values) <= bound if self.target.at_most else min(values) >= bound

    @property
    def said(self) -> str:
        return {True: "met", False: "not met", None: "not measured"}[self.met]

    @property
    def spread(self) -> str:
        return f"{number(min(self.found.values))} - {number(max(self.found.values))}" if self.found else ""

    def as_json(self) -> dict[str, Any]:
        median = self.found.median if self.found else None
        return {"target": self.target.what, "wanted": self.target.wanted, "median": median, "met": self.met}


TARGETS = (
    Target("no-op changes, async, to the SQL floor", "ratio", "drain to floor", 1.3),
    Target("no-op changes, async, to pgqueuer's best", "ratio", "drain to pgqueuer", 2.0),
    Target("no-op changes, async, to graphile-worker's best", "ratio", "drain to graphile-worker", 1.6),
    Target("no-op changes, threads, to the SQL floor", "ratio", "drain-sync to floor", 0.4),
    Target("transactional handlers that insert a row each", "drain-inserts", "settled", 5_000, "changes/s"),
    Target("transactional handlers, to a plain psycopg loop", "ratio", "drain-inserts to floor-inserts", 1.5),
    Target("no-op changes, batches of 200, to the SQL floor", "ratio", "drain-batch to floor", 0.9),
    Target("handlers that await 10 ms, to the theoretical 10,000/s", "await", "to theoretical", 0.9),
    Target("commit to handler at 500/s, p50", "latency", "handler p50", 1.0, "ms", at_most=True),
    Target("commit to handler at 500/s, p99", "latency", "handler p99", 5.0, "ms", at_most=True),
    Target(
        "commit to handler, p50 to the documented NOTIFY", "latency", "handler p50 to documented", 1.0, at_most=True
    ),
    Target(
        "commit to handler, p99 to the documented NOTIFY", "latency", "handler p99 to documented", 1.0, at_most=True
    ),
    Target("consumer's processor time at 500/s", "lone", "consumer's cpu", 200.0, "us/change", at_most=True),
    Target("its sessions' processor time at 500/s", "lone", "server's cpu", 130.0, "us/change", at_most=True),
    Target("consumer's processor time at full speed", "writers", "consumer's cpu", 70.0, "us/change", at_most=True),
    Target("its sessions' processor time at full speed", "writers", "server's cpu", 65.0, "us/change", at_most=True),
    Target(
        "the server's to fetch and mark, 500 at a time",
        "marks",
        "fetch and mark, server's cpu",
        20.0,
        "us/change",
        at_most=True,
    ),
    Target("WAL of a mark, a row of 400 bytes", "marks", "mark, WAL", 540.0, "bytes", at_most=True),
    Target("commit to handler, relayed, p50", "relayed", "relayed p50", 2.5, "ms", at_most=True),
    Target("p99 beside a backfill, to that without", "backfill", "p99 beside to without", 1.5, at_most=True),
    Target("writers, tracked, to the documented NOTIFY", "writers", "tracked to documented", 2.5),
    Target("writers, tracked, to untracked", "writers", "tracked to untracked", 0.55),
    Target("old snapshot held: last third to first", "snapshot", "cdc, last to first", 0.85),
    Target("memory above idle, one large transaction", "transaction", "above idle", 80, "MB", at_most=True),
    Target("memory above idle, large backlog at start", "backlog", "above idle", 80, "MB", at_most=True),
    Target("reading the slot, to pg_recvlogical", "slot", "stream to pg_recvlogical", 0.9),
    Target("idle consumer, processor", "idle", "cpu", 1.0, "% of a core", at_most=True),
    Target("idle consumer, statements", "idle", "statements", 2.0, "1/s", at_most=True),
    Target("no-op changes in another subscription, to the default one", "subscriptions", "another to default", 0.7),
    Target(
        "three subscriptions in one process, the slowest to a third",
        "subscriptions",
        "the slowest of three to a third",
        1.0,
    ),
    Target("20 idle subscriptions of 200, processor", "subscriptions-idle", "cpu", 2.0, "% of a core", at_most=True),
    Target("20 idle subscriptions of 200, statements", "subscriptions-idle", "statements", 5.0, "1/s", at_most=True),
    Target("cdc ui, the slowest request for any page", "ui", "slowest request", 300, "ms", at_most=True),
    Target("two consumers, handlers that await 20 ms, to one", "consumers", "two to one", 1.8),
    Target("start to first change settled, nothing pending", "start", "start to first settled", 1.0, "s", at_most=True),
    Target("start to first change settled, large backlog", "backlog", "start to first settled", 2.0, "s", at_most=True),
)

HEAD = ("target", "median", "min - max", "wanted", "")


def judge(summaries: Sequence[Summary]) -> list[Verdict]:
    """All targets of whatever was measured, or would have been."""
    found: Mapping[tuple[str, str], Summary] = {(summary.scenario, summary.name): summary for summary in summaries}
    return [Verdict(target, found.get((target.scenario, target.figure))) for target in TARGETS]


def rows(verdicts: Sequence[Verdict]) -> list[tuple[str, ...]]:
    """Beneath HEAD."""
    return [
        (
            verdict.target.what,
            number(verdict.found.median) if verdict.found else "-",
            verdict.spread,
            verdict.target.wanted,
            verdict.said,
        )
        for verdict in verdicts
    ]


def table(verdicts: Sequence[Verdict]) -> str:
    return aligned([HEAD, *rows(verdicts)], right=(1,))
