"""The demo's output: a line for each change that is shown, and the summary. Text from values, nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from cdc.contrib.demo.tracker import STEPS, Journey, percentile


class Paint(Protocol):
    """``paint(text, colour, bold=...)``: the text in a colour, or unchanged where colours are off."""

    def __call__(self, text: str, colour: str | None = None, *, bold: bool | None = None) -> str: ...


@dataclass(frozen=True, slots=True)
class Totals:
    """Counted by the database, in the documented views. ``dead``: changes that are not tried again."""

    captured: int
    processed: int
    retried: int
    dead: int


@dataclass(frozen=True, slots=True)
class Burst:
    """``written_s``: the writer's transaction; ``processed_s``: from its commit to the last change processed."""

    rows: int
    written_s: float
    processed_s: float


HEADER = f"{'table':26}  {'change':6}  {'stored':>6}  {'wake-up':>12}  {'handler':>14}  {'processed':>9}"


def line(journey: Journey, paint: Paint) -> str:
    """One change on its way from the table to processed, in milliseconds after the writer sent its row."""
    wakeup = paint(f"{journey.source:5}", "cyan" if journey.source == "wal" else "yellow")
    return "  ".join(
        [
            f"{journey.table:26}",
            f"{journey.operation:6}",
            _ms(_since_sent(journey, "stored")).rjust(6),
            f"{wakeup} {_ms(_since_sent(journey, 'wake-up')):>6}",
            f"{journey.handler:7} {_ms(_since_sent(journey, 'handler')):>6}",
            paint(_ms(_since_sent(journey, "processed")).rjust(9), "green" if journey.attempts == 1 else "yellow"),
            journey.note if journey.attempts == 1 else f"attempt {journey.attempts}",
        ]
    )


def failure(journey: Journey, error: BaseException, paint: Paint) -> str:
    """A failed attempt; the change waits for its next one."""
    reason = f"attempt {journey.attempts} failed: {type(error).__name__}"
    return f"{journey.table:26}  {journey.operation:6}  {'':6}  {'':12}  {journey.handler:7} {paint(reason, 'yellow')}"


def burst_line(burst: Burst, paint: Paint) -> str:
    # Over the whole time, the writer's part included, as a person with a stop-watch would compute it.
    rate = burst.rows / (burst.written_s + burst.processed_s)
    return paint(
        f"burst: {burst.rows:,} messages in one transaction, written in {burst.written_s * 1000:,.0f} ms,"
        f" processed {burst.processed_s * 1000:,.0f} ms later ({rate:,.0f}/s)",
        bold=True,
    )


def summary(
    totals: Totals, journeys: Sequence[Journey], wakeups: Mapping[str, int], resident_bytes: float | None, paint: Paint
) -> Iterator[str]:
    """The lines at the end."""
    lost = totals.captured - totals.processed
    yield paint("Summary", bold=True)
    yield f"  captured   {totals.captured:>6,}"
    yield f"  processed  {paint(f'{totals.processed:>6,}', 'red' if lost else 'green')}"
    yield f"  retried    {totals.retried:>6,}"
    yield f"  dead       {paint(f'{totals.dead:>6,}', 'red' if totals.dead else None)}"
    if left := lost - totals.dead:
        yield paint(f"  unfinished {left:>6,}", "red")
    yield "  wake-ups   " + ", ".join(f"{source} {count:,}" for source, count in wakeups.items())
    if resident_bytes is not None:
        yield f"  memory     {resident_bytes / 1e6:>6.0f} MB resident: consumer, handlers and application, one process"
    yield ""
    yield from _latencies([journey for journey in journeys if journey.attempts == 1])


def _latencies(journeys: Sequence[Journey]) -> Iterator[str]:
    """Without retried changes: their backoff sets how long they take."""
    yield f"  {f'{len(journeys):,} changes, each':21}{'after the row was sent':>24}{'after its commit returned':>29}"
    yield f"  {'on its own way':21}{'p50':>14}{'p99':>10}{'p50':>19}{'p99':>10}   ms"
    for step in STEPS:
        sent = [seconds for journey in journeys if (seconds := _since_sent(journey, step)) is not None]
        after = [s for journey in journeys if step != "stored" and (s := _since_commit(journey, step)) is not None]
        if sent:  # without a slot there are no wake-ups
            yield f"  {step:21}" + _percentiles(sent, 14) + _percentiles(after, 19)


def _percentiles(values: Sequence[float], width: int) -> str:
    return f"{_ms(percentile(values, 50)):>{width}}{_ms(percentile(values, 99)):>10}" if values else ""


def _since_sent(journey: Journey, step: str) -> float | None:
    at = journey.step(step)
    return None if at is None else at - journey.sent


def _since_commit(journey: Journey, step: str) -> float | None:
    at = journey.step(step)
    return None if at is None or journey.stored is None else at - journey.stored


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{round(seconds * 1000, 1) + 0.0:.1f}"  # + 0.0: no "-0.0"
