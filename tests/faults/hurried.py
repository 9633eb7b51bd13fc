"""``python -m tests.faults.hurried run ...``: the command line, which despairs and looks again sooner.

Nothing is decided otherwise, only sooner: what an operator must fix, or another consumer let go of, is looked at again
every two seconds instead of every minute or five seconds; a silent server is given up after three, not thirty; who may
have died has half a second to say that it lives, not five; and a settle of four changes moves positions, not of 256.
"""

from __future__ import annotations

from functools import partial

from cdc.app import application, components
from cdc.cli import main
from cdc.core import reconnect
from cdc.engine import crash_guard
from cdc.engine.health_checks import HealthThresholds
from cdc.postgres import subscription
from cdc.replication.stream import StreamSettings

WAL_SENDER_TIMEOUT_S = 2.0

if __name__ == "__main__":
    reconnect.PERMANENT_PAUSE_S = reconnect.STANDBY_PAUSE_MAX_S = 2.0
    crash_guard.GRACE_S = 0.5
    subscription.MOVING_MIN = 4
    vars(application)["HealthThresholds"] = partial(HealthThresholds, stall_s=3.0)
    vars(components)["StreamSettings"] = partial(
        StreamSettings, wal_sender_timeout_s=WAL_SENDER_TIMEOUT_S, lock_timeout_s=2.0
    )
    main()
