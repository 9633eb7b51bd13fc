"""Named points in the code at which a test may stop, inspect or kill the process.

Silent in production: without a hook, ``here`` is one comparison. The names are collected from the source by the
tests, which force a crash at each of them in turn.
"""

from __future__ import annotations

from collections.abc import Callable

_hook: Callable[[str], None] | None = None


def install(hook: Callable[[str], None] | None) -> None:
    """Call ``hook(name)`` at every point from now on; None removes it."""
    global _hook  # noqa: PLW0603 - one hook a process is the point: production code passes no test object around
    _hook = hook


def here(name: str) -> None:
    if _hook is not None:
        _hook(name)
