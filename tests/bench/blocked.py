"""The consumer draining no-op changes while others cannot run: held back behind one key, waiting, dead.

They were there first, so that the consumer meets them before those it is to handle.
"""

from __future__ import annotations

import psycopg

from cdc.contrib.demo.temp_server import TempServer
from tests.bench.database import fresh_outbox, preload, preload_unprocessed, rest, settled
from tests.bench.processes import Consumer
from tests.bench.report import Figure
from tests.bench.size import Size

_WITHIN_S = 600.0
_LAST = 500


def measure(server: TempServer, size: Size) -> list[Figure]:
    alone = _rate(server, size, "none")
    figures = [Figure("alone", alone, "changes/s")]
    for others in ("behind one key", "waiting", "dead"):
        rate = _rate(server, size, others)
        figures += [
            Figure(f"{size.blocked:,} {others}", rate, "changes/s"),
            Figure(f"{size.blocked:,} {others}, to alone", rate / alone, ""),
        ]
    return figures


def _rate(server: TempServer, size: Size, others: str) -> float:
    with fresh_outbox(server) as connection:
        _preload_others(connection, others, size.blocked)
        preload(connection, changes=size.beside, keys=size.keys)
        rest(connection)
        # Looking for what is left would walk all that is held back, and count in one of the cases only.
        newest = "SELECT id FROM entity_changes WHERE shard IS NOT NULL ORDER BY seq DESC LIMIT %s"
        last = [id_ for (id_,) in connection.execute(newest, [_LAST])]
        with Consumer(connection.info.dsn, "noop") as consumer:
            consumer.until(lambda: _processed(connection, last), within_s=_WITHIN_S)
            consumer.until(lambda: settled(connection).changes == size.beside, within_s=_WITHIN_S)
        return settled(connection).rate


def _preload_others(connection: psycopg.Connection, others: str, changes: int) -> None:
    match others:
        case "behind one key":
            preload_unprocessed(connection, 1, wait="1 day", key="stuck")
            preload_unprocessed(connection, changes, key="stuck")
        case "waiting":
            preload_unprocessed(connection, changes, wait="1 day")
        case "dead":
            preload_unprocessed(connection, changes, dead=True)


def _processed(connection: psycopg.Connection, ids: list[object]) -> bool:
    found = connection.execute("SELECT bool_and(processed) FROM entity_changes WHERE id = ANY (%s)", [ids]).fetchone()
    return found == (True,)
