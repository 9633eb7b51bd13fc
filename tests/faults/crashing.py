"""``python -m tests.faults.crashing POINT NTH ...``: the command line, killed at a failpoint.

When the point is reached for the NTH time the process kills itself, as ``kill -9`` would: no exit handler, no flush, no
goodbye to the server.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

from cdc.cli import main
from cdc.core import failpoints


def kill_at(point: str, nth: int) -> None:
    lock = threading.Lock()  # the stream's thread and the event loop pass points of their own
    left = nth

    def hook(name: str) -> None:
        nonlocal left
        if name != point:
            return
        with lock:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    failpoints.install(hook)


if __name__ == "__main__":
    kill_at(sys.argv[1], int(sys.argv[2]))
    sys.argv = ["cdc", *sys.argv[3:]]
    main()
