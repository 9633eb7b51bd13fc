"""NOTIFY payloads that anybody may send, at a consumer that listens, relays and prunes."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Iterator
from contextlib import contextmanager

from tests.fuzz.stage import Stage

_PAYLOADS = 200
_BYTES_MAX = 7_999
_DOCUMENTED = {"table": "orders", "operation": "INSERT", "entity_type": "order"}


@contextmanager
def stage() -> Iterator[Stage]:
    with Stage("UTF8") as made:
        yield made


def attack(stage: Stage, dice: random.Random) -> int:
    db = stage.databases["UTF8"]
    for _ in range(_PAYLOADS):
        db.execute("SELECT pg_notify('entity_change', %s)", [_payload(dice)])
    return _PAYLOADS


def check(stage: Stage) -> None:
    stage.holds("UTF8")


def _payload(dice: random.Random) -> str:
    match dice.randrange(8):
        case 0:
            nested = dice.choice(('{"a":', "[", '{"table":['))
            made = nested * dice.randrange(1, _BYTES_MAX // len(nested))
        case 1:
            made = json.dumps(_DOCUMENTED)
            place = dice.randrange(len(made))
            made = made[:place] + dice.choice(string.printable) + made[place + 1 :]
        case 2:
            pairs = (f" {_number(dice)},{_number(dice)}" for _ in range(dice.randrange(300)))
            made = "entity_change:public" + "".join(pairs)
        case 3:
            made = f"entity_change:{_word(dice)} {_number(dice)},{dice.randrange(70)}"
        case 4:
            made = "entity_change:public " + "9" * dice.randrange(5_000) + ",1"
        case 5:
            made = _word(dice) * dice.randrange(1, 50)
        case 6:
            made = json.dumps({**_DOCUMENTED, "table": _word(dice) * 20})
        case _:
            made = ""
    return made.encode()[:_BYTES_MAX].decode(errors="ignore")


def _number(dice: random.Random) -> str:
    return dice.choice(("0", "-1", "1e9", "", "٣", "0x10", str(dice.getrandbits(70)), str(dice.randrange(64))))


def _word(dice: random.Random) -> str:
    alphabet = "ab_%. ,:{}[]\"'\\\t\n\x01\u202e\u2028ß\U0001f600"
    return "".join(dice.choices(alphabet, k=dice.randrange(1, 40)))
