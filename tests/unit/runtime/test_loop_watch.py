"""An event loop that does not turn: what is said of it."""

from __future__ import annotations

from cdc.runtime.loop_watch import LoopWatch


def test_what_blocks_the_loop_is_named_by_file_line_and_function_once_a_minute() -> None:
    watch = LoopWatch()
    turned_at = watch.last_iteration_at

    def index(secret: str) -> list[str | None]:
        return list(map(watch.blocks, (turned_at + seconds for seconds in (4, 6, 8, 65, 67))))

    early, said, again, still, later = index("hunter2")
    assert (early, again, still) == (None, None, None)
    assert said is not None
    assert later is not None
    assert said.startswith("the event loop has not turned for 6 s")
    assert "test_loop_watch.py:13 in index" in said
    assert "hunter2" not in said


def test_of_a_loop_that_has_turned_meanwhile_nothing_is_said() -> None:
    watch = LoopWatch()
    watch.last_iteration_at += 60
    assert watch.blocks(watch.last_iteration_at + 1) is None
