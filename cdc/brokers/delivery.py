"""Changes as messages to a broker: the handler of ``cdc run --deliver-to`` with the URL of one.

What becomes of them, ``brokers.publisher`` says. "Away" opens the handler's circuit breaker, as it does for HTTP.

Delivery is a router like any other: order, concurrency, retries and dead letters are the consumer's.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Sequence

from cdc.brokers.publisher import Publisher
from cdc.brokers.sender import BrokerSender
from cdc.core.broker_messages import Encoding, Message
from cdc.core.circuit_breaker import CircuitBreaker
from cdc.core.debezium import DebeziumEncoding
from cdc.core.deliveries import HANDLER, DeliveryError, UnreachedError
from cdc.core.model import Change
from cdc.core.name_template import Names
from cdc.core.router import ANY, Router
from cdc.observability.metrics import DeliveryMetrics

log = logging.getLogger("cdc.deliver")

BATCH = 500
"""Changes sent together, unless the setting says otherwise. More are no faster, and wait longer for each other."""
_LOOK_AGAIN_S = 3.0
"""As often as a circuit breaker lets a call through."""


class BrokerDelivery:
    """``router`` delivers changes of ``types`` (empty: all) through ``sender``. Made, opened and closed on the loop.

    ``batch``: changes sent together, at most. ``timeout_s``, ``target``: see ``Publisher``.
    """

    def __init__(
        self,
        sender: BrokerSender,
        names: Names,
        encoding: Encoding | DebeziumEncoding,
        *,
        target: str,
        types: Sequence[str] = (),
        batch: int | None = None,
        linger_s: float = 0.0,
        timeout_s: float | None = None,
    ) -> None:
        self._publisher = Publisher(
            sender, target=target, timeout_s=timeout_s, counted=self._count, connected=self._connected
        )
        self._names = names
        self._encoding = encoding
        self._types = tuple(dict.fromkeys(types)) or (ANY,)
        self._metrics: DeliveryMetrics | None = None
        self._breaker: CircuitBreaker | None = None
        self._reached: Callable[[], None] = lambda: None
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
            "delivers %s to %s", "every type" if self._types == (ANY,) else ", ".join(self._types),
            self._publisher.target,
        )  # fmt: skip

    async def check(self) -> None:
        """Say what stands behind the names that are known before a change comes, once the broker is there.

        Only says it: what is missing may come, and changes wait for it as they wait for a broker that is away.
        """
        names = self._names.all_known([each for each in self._types if each != ANY])
        waits = False
        while True:
            try:
                said = await self._publisher.look(names)
            except UnreachedError as away:
                if not waits:
                    log.warning("%s; it is waited for", away.summary)
                waits = True
                await asyncio.sleep(_LOOK_AGAIN_S)
            except DeliveryError as refused:
                log.warning("%s", refused.summary)
                return
            else:
                for sentence in said:
                    log.info("%s", sentence)
                return

    async def close(self) -> None:
        await self._publisher.close()

    async def _deliver(self, changes: list[Change]) -> None:
        await self._publisher.publish(changes, self._message)

    def _message(self, change: Change) -> Message:
        return self._encoding.message(change, self._names.name(change))

    def _connected(self) -> None:
        if self._breaker is not None and self._breaker.certain:
            self._reached()

    def _count(self, result: str, messages: int) -> None:
        if self._metrics:
            self._metrics.ended(result, messages)
