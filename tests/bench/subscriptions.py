"""Subscriptions: the rate of another one beside the default one's, three in one process, and many that are idle.

Rates are those of ``cdc_changes_handled_total``, which a consumer has in memory: to count what another subscription has
done in its tables would take more time than the work. From the first look that sees some handled to the last that sees
some left, as looks are far apart.
"""

from __future__ import annotations

import re
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from cdc.contrib.demo.temp_server import TempServer, free_port
from cdc.core.subscription import DEFAULT
from cdc.postgres.subscriptions import Subscriptions
from tests.bench.database import fresh_outbox, preload, rest, streaming
from tests.bench.processes import Consumer
from tests.bench.report import Figure, LeftOutError
from tests.bench.size import Size
from tests.fix_tally import Tally

_WITHIN_S = 600.0
_READY_S = 60.0
_QUIET_AFTER_S = 20.0
"""What a consumer does more of in its first seconds is not idleness."""
_IDLE_S = 5
"""Times as long as a steady load: some statements come every 15 s only."""
_LOOK_EVERY_S = 0.5
"""Each look is an answer of the process that is measured, some milliseconds for each of its consumers. Of three in one
process a third as many are taken, so that looks have the same share of the time."""
_LOOKS_MIN = 3
_TOGETHER = 3
_MANY, _ACTIVE = 200, 20
_HANDLED = re.compile(r'^cdc_changes_handled_total\{(.*outcome="processed".*)\} (\S+)$', re.MULTILINE)
_LABEL = re.compile(r'subscription="(\w+)"')


def measure(server: TempServer, size: Size) -> list[Figure]:
    """Each beside the default one before and after it: a machine is not as fast in each minute."""
    (before,), (second,), (between,), together, (after,) = (
        _rates(server, size, names) for names in ([DEFAULT], ["s1"], [DEFAULT], [DEFAULT, "s1", "s2"], [DEFAULT])
    )
    default = (between + after) / 2
    alone = [default, second, second]
    return [
        Figure("default", (before + between + after) / 3, "changes/s"),
        Figure("another", second, "changes/s"),
        Figure("another to default", second / ((before + between) / 2), ""),
        Figure("three in one process, the slowest", min(together), "changes/s"),
        Figure("the slowest of three to a third", min(together) / (default / _TOGETHER), ""),
        Figure(
            "the least of three to a third of itself alone",
            min(rate / (own / _TOGETHER) for rate, own in zip(together, alone, strict=True)),
            "",
        ),
    ]


def measure_idle(server: TempServer, size: Size) -> list[Figure]:
    """Of so many subscriptions some are consumed, in one process, and nothing is written."""
    seconds = float(size.seconds * _IDLE_S)
    with fresh_outbox(server) as connection, tempfile.TemporaryDirectory(prefix="cdcbench") as folder:
        for number in range(_MANY):
            Subscriptions("public").create(connection, f"s{number}", start="beginning")
        rest(connection)
        tally = Tally(connection.info.dsn)
        tally.start()
        try:
            names = [f"s{number}" for number in range(_ACTIVE)]
            with Consumer(tally.dsn, "nothing", config=_sections(folder, "nothing", names)) as consumer:
                consumer.until(lambda: streaming(connection), within_s=_READY_S)
                _let_pass(consumer, _QUIET_AFTER_S)
                cpu_s, passed, began = consumer.cpu_s, tally.passed, time.monotonic()
                _let_pass(consumer, seconds)
                took_s = time.monotonic() - began
                cpu_s, passed = consumer.cpu_s - cpu_s, tally.passed.since(passed)
        finally:
            tally.stop()
    return [
        Figure("cpu", 100 * cpu_s / took_s, "% of a core"),
        Figure("statements", passed.statements / took_s, "1/s"),
    ]


def _rates(server: TempServer, size: Size, names: Sequence[str]) -> list[float]:
    """Changes a second of each of these, in one process."""
    others, port = [name for name in names if name != DEFAULT], free_port()
    with fresh_outbox(server) as connection, tempfile.TemporaryDirectory(prefix="cdcbench") as folder:
        for name in others:
            Subscriptions("public").create(connection, name, start="beginning")
        preload(connection, changes=size.changes, keys=size.keys)
        rest(connection)
        alone = {"subscription": others[0]} if others and DEFAULT not in names else {}
        several = {"config": _sections(folder, "noop", others)} if others and not alone else {}
        seen: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        with Consumer(connection.info.dsn, "noop", **{"http_port": port, **alone, **several}) as consumer:
            consumer.until(
                lambda: _look(port, seen, names[0], size.changes),
                within_s=_WITHIN_S,
                look_every_s=_LOOK_EVERY_S * len(names),
            )
    return [_rate(seen[name], size.changes) for name in names]


def _look(port: int, seen: dict[str, list[tuple[float, float]]], only: str, changes: int) -> bool:
    """Note how many each has handled. Whether all have handled all."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
    except (urllib.error.URLError, OSError):
        return False
    now, counts = time.monotonic(), dict.fromkeys(seen, 0.0)
    for labels, value in _HANDLED.findall(text):
        label = _LABEL.search(labels)
        counts[label.group(1) if label else only] += float(value)
    for name, count in counts.items():
        if count:
            seen[name].append((now, count))
    return all(count >= changes for count in counts.values())


def _rate(looks: Sequence[tuple[float, float]], changes: int) -> float:
    within = [look for look in looks if look[1] < changes]
    if len(within) < _LOOKS_MIN:
        raise LeftOutError("the changes were handled too soon to be measured")
    (first, already), (last, handled) = within[0], within[-1]
    return (handled - already) / (last - first)


def _sections(folder: str, router: str, names: Sequence[str]) -> str:
    file = Path(folder, "cdc.toml")
    file.write_text("".join(f'[subscription.{name}]\nhandlers = "tests.bench.handlers:{router}"\n' for name in names))
    return str(file)


def _let_pass(consumer: Consumer, seconds: float) -> None:
    end = time.monotonic() + seconds
    consumer.until(lambda: time.monotonic() >= end, within_s=seconds + 1)
