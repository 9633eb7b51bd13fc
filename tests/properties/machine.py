"""How long the state machines run: CDC_TEST_EXAMPLES sequences of forty rules each, 300 unless told."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

MACHINE = settings(
    max_examples=int(os.environ.get("CDC_TEST_EXAMPLES", "300")),
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
