"""Show something again and again, until Ctrl-C."""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Callable

import click

_HOME_AND_CLEAR = "\x1b[H\x1b[J"


def watch(show: Callable[[], None], *, every_s: float, times: int | None = None) -> None:
    """Call ``show`` every ``every_s`` seconds, ``times`` times or until Ctrl-C, which is a good end.

    On a terminal each picture takes the place of the one before; elsewhere they follow each other.
    """
    pause = threading.Event()
    try:
        for count in itertools.count(1):
            if sys.stdout.isatty():
                click.echo(_HOME_AND_CLEAR, nl=False)
            show()
            if count == times:
                return
            pause.wait(every_s)
    except KeyboardInterrupt:
        return
