from __future__ import annotations

from cdc.contrib.demo import report
from cdc.contrib.demo.report import Burst, Totals
from cdc.contrib.demo.tracker import Journey


def plain(text: str, colour: str | None = None, *, bold: bool | None = None) -> str:
    return text


def painted(text: str, colour: str | None = None, *, bold: bool | None = None) -> str:
    return f"<{colour}>{text}" if colour else text


def journey(*, notified: float | None = 10.002, attempts: int = 1) -> Journey:
    return Journey(
        table="whatsapp_message_reactions", operation="INSERT", note="✅ → task", shown=True, sent=10.0, stored=10.0015,
        notified=notified, handler="react", started=10.003, attempts=attempts, processed=10.0045,
    )  # fmt: skip


def test_a_line_shows_every_step_in_milliseconds_and_fits_a_terminal() -> None:
    line = report.line(journey(), plain)
    assert line.split()[:9] == [
        "whatsapp_message_reactions", "INSERT", "1.5", "wal", "2.0", "react", "3.0", "4.5", "✅",
    ]  # fmt: skip
    assert len(line) <= 98  # the check mark takes two columns


def test_columns_stand_under_their_titles() -> None:
    for title, end in (("stored", "1.5"), ("wake-up", "2.0"), ("handler", "3.0"), ("processed", "4.5")):
        line = report.line(journey(), plain)
        assert report.HEADER.index(title) + len(title) == line.index(end) + len(end)


def test_what_was_swept_or_tried_again_stands_out() -> None:
    assert "<cyan>wal" in report.line(journey(), painted)
    assert "<yellow>sweep" in report.line(journey(notified=None), painted)
    retried = report.line(journey(attempts=3), painted)
    assert "<yellow>      4.5" in retried
    assert retried.endswith("attempt 3")


def test_the_summary_leaves_the_retried_out_of_the_latencies() -> None:
    slow = journey(attempts=2)
    slow.processed = 99.0
    text = "\n".join(report.summary(Totals(2, 2, 1, 0), [journey(), slow], {"wal": 2}, 5e7, plain))
    assert "1 changes, each" in text
    assert "89000" not in text
    assert "50 MB resident" in text


def test_what_was_not_processed_is_said_in_red() -> None:
    text = "\n".join(report.summary(Totals(10, 7, 0, 1), [], {"wal": 10}, None, painted))
    assert "<red>     7" in text
    assert "<red>     1" in text
    assert "unfinished      2" in text


def test_the_rate_of_the_burst_counts_the_writing_too() -> None:
    assert "(1,000/s)" in report.burst_line(Burst(500, written_s=0.2, processed_s=0.3), plain)


def test_where_nothing_rang_the_summary_has_no_line_for_it() -> None:
    text = "\n".join(report.summary(Totals(1, 1, 0, 0), [journey(notified=None)], {"sweep": 1}, None, plain))
    assert "  wake-up  " not in text
    assert "  handler  " in text
