"""All that can be measured, by name."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import NamedTuple

from cdc.contrib.demo.temp_server import TempServer
from tests.bench import (
    backfill,
    blocked,
    debezium,
    drain,
    floor,
    growth,
    history,
    idle,
    latency,
    lone,
    marks,
    memory,
    queues,
    slot,
    snapshot,
    subscriptions,
    web_interface,
    writers,
)
from tests.bench.report import Figure
from tests.bench.size import Size


class Turn(Enum):
    """When a scenario is measured. NAMED: once, and only if it is asked for."""

    EACH_ROUND = "each round"
    ONCE = "once"
    NAMED = "when named"


class Scenario(NamedTuple):
    purpose: str
    measure: Callable[[TempServer, Size], list[Figure]]
    turn: Turn = Turn.EACH_ROUND


SCENARIOS = {
    "floor": Scenario("fetch and mark by key, batches of 500, one connection, no consumer", floor.measure),
    "drain": Scenario("the consumer draining no-op changes, async handler", drain.measure),
    "drain-sync": Scenario("the same, with a handler that runs in a thread", drain.measure_sync),
    "drain-batch": Scenario("the same, with a handler for batches of 200", drain.measure_batches),
    "floor-inserts": Scenario("the floor with one row inserted for each change, groups of 50", floor.measure_inserting),
    "drain-inserts": Scenario(
        "the consumer with a transactional handler that inserts one row", drain.measure_inserting
    ),
    "await": Scenario("a handler that awaits 10 ms, 100 at a time", drain.measure_awaiting),
    "consumers": Scenario("one and two consumers, a handler that awaits 20 ms, 50 at a time each", drain.measure_two),
    "consumers-noop": Scenario("one and two consumers draining no-op changes", drain.measure_two_noop),
    "pgqueuer": Scenario("a peer draining no-op jobs", queues.measure_pgqueuer),
    "graphile": Scenario("a peer draining no-op jobs", queues.measure_graphile),
    "awa": Scenario("a peer draining no-op jobs", queues.measure_awa),
    "oban": Scenario("a peer draining no-op jobs", queues.measure_oban, Turn.ONCE),
    "procrastinate": Scenario("a peer draining no-op jobs", queues.measure_procrastinate, Turn.ONCE),
    "documented": Scenario("the documented processor, as it is written", queues.measure_documented, Turn.ONCE),
    "latency": Scenario("commit to handler at a steady pace, and NOTIFY for comparison", latency.measure),
    "relayed": Scenario("the same on a consumer that does not stream", latency.measure_relayed),
    "lone": Scenario("processor time and waits of the consumer and its sessions at a steady pace", lone.measure),
    "backfill": Scenario("the same beside a backfill that waits for the consumer only", backfill.measure),
    "backfill-alone": Scenario("a backfill without a consumer, and INSERT ... SELECT", backfill.measure_alone),
    "writers": Scenario("pgbench: inserts untracked, tracked, with the documented trigger", writers.measure),
    "bulk": Scenario("what a row of one large INSERT costs, untracked and tracked", writers.measure_bulk),
    "marks": Scenario("what fetching and marking cost the server, batches of 500", marks.measure),
    "idle": Scenario("processor time and statements of a consumer with nothing to do", idle.measure, Turn.ONCE),
    "subscriptions": Scenario(
        "no-op changes in the default subscription, in another one, and in three of one process",
        subscriptions.measure,
    ),
    "subscriptions-idle": Scenario(
        "200 subscriptions, 20 of them with a consumer in one process, and nothing to do",
        subscriptions.measure_idle,
        Turn.NAMED,
    ),
    "ui": Scenario("each page of cdc ui, 200 consumers and a large history", web_interface.measure, Turn.NAMED),
    "start": Scenario("from the start of the process to its first change", memory.measure_start),
    "slot": Scenario("reading the slot, and pg_recvlogical beside it", slot.measure, Turn.ONCE),
    "snapshot": Scenario("the consumer while an old snapshot is held", snapshot.measure, Turn.ONCE),
    "snapshot-pgqueuer": Scenario("a peer in the same place", snapshot.measure_pgqueuer, Turn.ONCE),
    "snapshot-documented": Scenario("the documented processor, too", snapshot.measure_documented, Turn.ONCE),
    "transaction": Scenario("resident memory through one large transaction", memory.measure_transaction, Turn.ONCE),
    "backlog": Scenario("resident memory and first change with a large backlog", memory.measure_backlog, Turn.ONCE),
    "blocked": Scenario("draining beside changes that are held back, waiting, dead", blocked.measure, Turn.NAMED),
    "history": Scenario("views, commands, collector and consumer on a large history", history.measure, Turn.NAMED),
    "debezium": Scenario("commit to a reader of Kafka, and Debezium beside it", debezium.measure, Turn.NAMED),
    "growth-backlog": Scenario("rate and memory by the length of the backlog", growth.by_backlog, Turn.NAMED),
    "growth-payload": Scenario("rate by the size of a row", growth.by_payload, Turn.NAMED),
    "growth-keys": Scenario("rate by the number of keys", growth.by_keys, Turn.NAMED),
    "growth-consumers": Scenario("rate by the number of consumers", growth.by_consumers, Turn.NAMED),
    "growth-history": Scenario("rate and latency by the processed rows in the table", growth.by_history, Turn.NAMED),
}

GROUPS = {
    "all": [name for name, scenario in SCENARIOS.items() if scenario.turn is not Turn.NAMED],
    "growth": [name for name in SCENARIOS if name.startswith("growth-")],
}
"""Names that stand for several. ``all`` is what is measured where nothing is named."""
