"""Fuzzing, for as long as one likes: ``python -m tests.fuzz documents --minutes 10 --seed 7``.

Each round draws its inputs from the seed and its own number, and is judged before the next one begins. What fails is
played again with ``--seed`` and ``--first``, the number of its round.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from contextlib import AbstractContextManager
from typing import Any, Protocol, cast

from tests.fuzz import documents, http, messages, notify, settings

_TELL_EVERY_S = 30.0


class Target(Protocol):
    """A module: ``stage`` sets up, ``attack`` sends the inputs of a round and counts them, ``check`` judges."""

    def stage(self) -> AbstractContextManager[Any]: ...
    def attack(self, stage: Any, dice: random.Random) -> int: ...
    def check(self, stage: Any) -> None: ...


TARGETS: dict[str, Target] = {
    module.__name__.rpartition(".")[2]: cast("Target", module)
    for module in (documents, http, messages, notify, settings)
}


def fuzz(name: str, seconds: float, seed: int, first: int = 0) -> int:
    """Play rounds until the time is up, one at least. Returns how many inputs there were."""
    target, inputs = TARGETS[name], 0
    began = told = time.monotonic()
    with target.stage() as stage:
        number = first
        while number == first or time.monotonic() - began < seconds:
            try:
                inputs += target.attack(stage, random.Random(f"{seed}:{name}:{number}"))
                target.check(stage)
            except BaseException:
                print(f"{name}: round {number} of seed {seed}; again: --seed {seed} --first {number}", file=sys.stderr)
                raise
            number += 1
            if time.monotonic() - told > _TELL_EVERY_S:
                told = time.monotonic()
                print(f"{name}: {number - first} rounds, {inputs} inputs, {told - began:.0f} s", flush=True)
    print(f"{name}: {number - first} rounds, {inputs} inputs, {time.monotonic() - began:.0f} s, seed {seed}: held")
    return inputs


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.partition("\n")[0])
    parser.add_argument("target", nargs="+", choices=[*TARGETS, "all"])
    parser.add_argument("--minutes", type=float, default=10.0, help="for each target (default 10)")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10_000))
    parser.add_argument("--first", type=int, default=0, help="the round to begin with")
    arguments = parser.parse_args()
    names = list(TARGETS) if "all" in arguments.target else arguments.target
    for name in names:
        fuzz(name, arguments.minutes * 60, arguments.seed, arguments.first)


if __name__ == "__main__":
    main()
