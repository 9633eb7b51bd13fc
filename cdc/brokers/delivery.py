"""Changes as messages to a broker: the handler of ``cdc run --deliver-to`` with the URL of one.

    changes ──> messages ──> sent together ──> each acknowledged ────────────────────> done
                               │                 ├─ will never be accepted ─────────> dead
                               │                 ├─ is not accepted as things stand ─> again later, an attempt
                               │                 └─ no acknowledgement, or the broker
                               │                    cannot take anything ────────────> away: no attempt
                               └─ not even a connection ─────────────────────────────> away: no attempt

What is sent together, and what a lost connection means, ``core.message_rounds`` decides. What follows a change of its
key that waits, waits with it. "Away" opens the handler's circuit breaker, as it does for HTTP.

Delivery is a router like any other: order, concurrency, retries and dead letters are the consumer's.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Sequence

from cdc.brokers.acks import Result
from cdc.brokers.sender import BrokerSender
from cdc.core import failpoints
from cdc.core.broker_messages import Encoding, Message
from cdc.core.circuit_breaker import CircuitBreaker
from cdc.core.debezium import DebeziumEncoding
from cdc.core.deliveries import HANDLER, AwayError, LostError, RejectedError, UnreachedError
from cdc.core.errors import Failed, Snooze, Unavailable
from cdc.core.message_rounds import MessageRounds
from cdc.core.model import Change, Key
from cdc.core.name_template import NameTemplate
from cdc.core.router import ANY, Router
from cdc.observability.metrics import DeliveryMetrics

log = logging.getLogger("cdc.deliver")

BATCH = 500
"""Changes sent together, unless the setting says otherwise. More are no faster, and wait longer for each other."""
ACKNOWLEDGED_S = 60.0
"""Until an acknowledgement has come, where the setting gives handlers no limit: silence is an outage, not a hang."""
_AFTER_S = 0.1
"""Until a change is looked at again whose predecessor in the same batch has failed: it waits for that one anyway."""


class BrokerDelivery:
    """``router`` delivers changes of ``types`` (empty: all) through ``sender``. Made, opened and closed on the loop.

    ``batch``: changes sent together, at most. ``timeout_s``: until an acknowledgement has come; None:
    ``ACKNOWLEDGED_S``. ``target``: the broker, for messages.
    """

    def __init__(
        self,
        sender: BrokerSender,
        names: NameTemplate,
        encoding: Encoding | DebeziumEncoding,
        *,
        target: str,
        types: Sequence[str] = (),
        batch: int | None = None,
        linger_s: float = 0.0,
        timeout_s: float | None = None,
    ) -> None:
        self._sender = sender
        self._names = names
        self._encoding = encoding
        self._target = target
        self._types = tuple(dict.fromkeys(types)) or (ANY,)
        self._timeout_s = ACKNOWLEDGED_S if timeout_s is None else timeout_s
        self._connecting = asyncio.Lock()
        self._metrics: DeliveryMetrics | None = None
        self._breaker: CircuitBreaker | None = None
        self._reached: Callable[[], None] = lambda: None
        self._rounds = MessageRounds()
        self.router = Router()
        for entity_type in self._types:
            on = self.router.on(
                entity_type, *encoding.operations, name=HANDLER, timeout=math.inf, batch=batch or BATCH, linger=linger_s
            )
            on(self._deliver)

    def open(self, metrics: DeliveryMetrics | None, breaker: CircuitBreaker, reached: Callable[[], None]) -> None:
        """``breaker`` is that of ``HANDLER``; ``reached`` is called when a connection is made while it is open.

        The first messages make the connection: a broker may start after its consumer.
        """
        self._metrics, self._breaker, self._reached = metrics, breaker, reached
        log.info(
            "delivers %s to %s", "every type" if self._types == (ANY,) else ", ".join(self._types), self._target,
        )  # fmt: skip

    async def close(self) -> None:
        await self._sender.close()

    async def _deliver(self, changes: list[Change]) -> None:
        errors: dict[Change, BaseException | str] = {}
        held: dict[Key, Exception] = {}
        gone: Exception | None = None
        for each_once in self._rounds.rounds(changes):
            due: list[Change] = []
            for change in each_once:
                if (error := gone or held.get(change.key)) is not None:
                    errors[change] = error
                else:
                    due.append(change)
            while due:
                count = self._rounds.together(due)
                part, due = due[:count], due[count:]
                for change, result in await self._send(part):
                    if result is not None:
                        errors[change] = result
                        if not isinstance(result, RejectedError):
                            held[change.key] = result if isinstance(result, Unavailable) else Snooze(_AFTER_S)
                    if isinstance(result, LostError | UnreachedError):
                        gone = result
                if gone is not None:  # each attempt might take long to find that out
                    errors |= dict.fromkeys(due, gone)
                    break
        if errors:
            raise Failed(errors)

    async def _send(self, changes: Sequence[Change]) -> list[tuple[Change, Result]]:
        """Each change, and how its message ended."""
        refused: list[tuple[Change, Result]] = []
        messages: list[Message] = []
        due: list[Change] = []
        for change in changes:
            try:
                messages.append(self._encoding.message(change, self._names.name(change)))
                due.append(change)
            except RejectedError as error:
                refused.append((change, error))
        if not due:
            return refused
        try:
            await self._connect()
        except UnreachedError as unreached:
            self._count("unreached", len(due))
            return [*refused, *((change, unreached) for change in due)]
        failpoints.here("deliver.before_send")
        results = await self._sender.send(messages, self._timeout_s)
        failpoints.here("deliver.after_send")
        self._count_all(results)
        return [*refused, *zip(due, self._rounds.ended(due, results), strict=True)]

    async def _connect(self) -> None:
        if self._sender.connected:
            return
        async with self._connecting:
            if not self._sender.connected:
                await self._sender.connect()
                log.info("connected to %s", self._target)
        if self._breaker is not None and self._breaker.certain:
            self._reached()

    def _count_all(self, results: Sequence[Result]) -> None:
        acknowledged = results.count(None)
        self._count("acknowledged", acknowledged)
        if acknowledged < len(results):
            for result in results:
                if result is not None:
                    self._count("broken" if isinstance(result, AwayError) else "refused", 1)

    def _count(self, result: str, messages: int) -> None:
        if self._metrics:
            self._metrics.ended(result, messages)
