"""Logical messages that whoever may connect can emit: of our prefix and others, small and large, with any bytes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

from cdc.core.model import message_prefix
from tests.fuzz.stage import Stage

_MESSAGES = 300
_LARGE_BYTES = 8 << 20
_OURS = message_prefix("public")


@contextmanager
def stage() -> Iterator[Stage]:
    with Stage("UTF8") as made:
        yield made


def attack(stage: Stage, dice: random.Random) -> int:
    db = stage.databases["UTF8"]
    for _ in range(_MESSAGES):
        prefix = dice.choice((_OURS, _OURS, _OURS + "x", "entity_change", "", "other\u2028", "x" * 2_000))
        transactional, content = dice.random() < 0.5, _content(dice)
        if isinstance(content, bytes):
            db.execute("SELECT pg_logical_emit_message(%s, %s, %s::bytea)", [transactional, prefix, content])
        else:
            db.execute("SELECT pg_logical_emit_message(%s, %s, %s::text)", [transactional, prefix, content])
    return _MESSAGES


def check(stage: Stage) -> None:
    stage.holds("UTF8")


def _content(dice: random.Random) -> bytes | str:
    return dice.choice(
        (
            dice.randbytes(dice.randrange(2_000)),
            f"{dice.getrandbits(63)},{dice.randrange(64)}",
            f"{dice.getrandbits(80)},{dice.randrange(-5, 200)}",
            "9" * dice.choice((10, 5_000, 100_000)) + ",1",
            '{"action":"M","content":"1,1"}' * dice.randrange(50),
            "[" * dice.choice((10, 2_000, 100_000)),
            "" if dice.random() < 0.9 else "x" * _LARGE_BYTES,
            f" {dice.randrange(100)} , {dice.randrange(64)}\n",
        )
    )
