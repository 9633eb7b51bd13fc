"""A child that a handler forks keeps none of this process's sockets.

A session lives as long as any process has its socket: the shards of a killed consumer would stay locked until the
last of its forked children ends. So in a child each of these sockets is replaced by /dev/null. It is not closed:
the number would be given to the next file, and a driver that is cleaned up there would write its goodbye into it.

Programs that are started (``subprocess``) have none of them anyway, and neither have processes that are spawned.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from typing import Protocol
from weakref import WeakSet


class HasSocket(Protocol):
    def fileno(self) -> int:
        """Raises, or is negative, when it is closed."""
        ...


_ours: WeakSet[HasSocket] = WeakSet()


def not_for_children(*sockets: HasSocket) -> None:
    """Replace these in each child from now on. Each is remembered as long as it lives."""
    _ours.update(sockets)


def _in_child() -> None:
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for number in _numbers(list(_ours)):
        with contextlib.suppress(OSError):
            os.dup2(null, number, inheritable=False)
    os.close(null)


def _numbers(sockets: Iterable[HasSocket]) -> Iterable[int]:
    for socket in sockets:
        with contextlib.suppress(Exception):  # a closed socket, which each class reports differently
            yield socket.fileno()


os.register_at_fork(after_in_child=_in_child)
