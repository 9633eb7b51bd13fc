"""Named points in the code at which a test may stop, inspect or kill the process.

The names are collected from the source by the tests, which force a crash at each of them in turn.
"""

from __future__ import annotations

from collections.abc import Callable

_nothing: Callable[[str], object] = len
"""A builtin: a lone change passes seven points, and a function of Python's would cost 50 ns more at each."""

here = _nothing
"""``failpoints.here(name)`` marks a point, by the module's name: in production it does nothing."""


def install(hook: Callable[[str], object] | None) -> None:
    """Call ``hook(name)`` at every point from now on; None removes it."""
    global here  # noqa: PLW0603 - one hook a process is the point: production code passes no test object around
    here = hook or _nothing
