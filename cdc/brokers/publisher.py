"""Messages of changes through a sender: what a delivery and a sink have in common.

    changes ──> messages ──> sent together ──> each acknowledged ────────────────────> done
                               │                 ├─ will never be accepted ─────────> dead
                               │                 ├─ is not accepted as things stand ─> again later, an attempt
                               │                 └─ no acknowledgement, or the broker
                               │                    cannot take anything ────────────> away: no attempt
                               └─ not even a connection ─────────────────────────────> away: no attempt

What is sent together, and what a lost connection means, ``core.message_rounds`` decides. What follows a change of its
key that waits, waits with it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from cdc.brokers.acks import Result
from cdc.brokers.sender import BrokerSender
from cdc.core import failpoints
from cdc.core.broker_messages import Message
from cdc.core.deliveries import AwayError, LostError, UnreachedError
from cdc.core.errors import Discard, Failed, Reject, Snooze, Unavailable
from cdc.core.message_rounds import MessageRounds
from cdc.core.model import Change, Key
from cdc.runtime.deadline import deadline

log = logging.getLogger("cdc.deliver")

ACKNOWLEDGED_S = 60.0
"""Until an acknowledgement has come, where the setting gives handlers no limit: silence is an outage, not a hang."""
LOOK_S = 20.0
_AFTER_S = 0.1
"""Until a change is looked at again whose predecessor in the same batch has failed: it waits for that one anyway."""

Encode = Callable[[Change], Message | None]
"""None: nothing is sent for this change. What it raises is the change's error."""


class Publisher:
    """``target``: the broker, for messages. ``timeout_s``: until an acknowledgement has come; None: ACKNOWLEDGED_S.

    ``counted`` is called with a result (acknowledged, refused, broken, unreached) and a number of messages;
    ``connected`` before messages are sent over a connection. Used on one event loop, by several tasks.
    """

    def __init__(
        self,
        sender: BrokerSender,
        *,
        target: str,
        timeout_s: float | None,
        counted: Callable[[str, int], None] = lambda *_: None,
        connected: Callable[[], None] = lambda: None,
    ) -> None:
        self.target = target
        self._sender = sender
        self._timeout_s = ACKNOWLEDGED_S if timeout_s is None else timeout_s
        self._counted = counted
        self._connected = connected
        self._connecting = asyncio.Lock()
        self._rounds = MessageRounds()

    async def close(self) -> None:
        await self._sender.close()

    async def look(self, names: Sequence[str]) -> list[str]:
        """What stands behind these names, a sentence each, after connecting. Sends nothing.

        Raises UnreachedError, also where no answer comes within LOOK_S, or DeliveryError where messages to one of them
        would be refused.
        """
        try:
            async with deadline(LOOK_S):
                await self._connect()
                return [await self._sender.describe(name) for name in names]
        except TimeoutError:
            raise UnreachedError(f"{self.target} gave no answer within {LOOK_S:g} s") from None

    async def publish(self, changes: Sequence[Change], encode: Encode) -> None:
        """In the order of each key. Raises ``cdc.Failed`` with the error of each change that was not acknowledged."""
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
                for change, result in await self._send(part, encode):
                    if result is not None:
                        errors[change] = result
                        if not isinstance(result, Reject | Discard):
                            held[change.key] = result if isinstance(result, Unavailable) else Snooze(_AFTER_S)
                    if isinstance(result, LostError | UnreachedError):
                        gone = result
                if gone is not None:  # each attempt might take long to find that out
                    errors |= dict.fromkeys(due, gone)
                    break
        if errors:
            raise Failed(errors)

    async def _send(self, changes: Sequence[Change], encode: Encode) -> list[tuple[Change, Result]]:
        """Each change, and how its message ended."""
        refused: list[tuple[Change, Result]] = []
        messages: list[Message] = []
        due: list[Change] = []
        for change in changes:
            try:
                message = encode(change)
            except Exception as error:  # noqa: BLE001 - of an author's function, it is this change's and no other's
                refused.append((change, error))
                continue
            if message is not None:
                messages.append(message)
                due.append(change)
        if not due:
            return refused
        try:
            await self._connect()
        except UnreachedError as unreached:
            self._counted("unreached", len(due))
            return [*refused, *((change, unreached) for change in due)]
        failpoints.here("deliver.before_send")
        results = await self._sender.send(messages, self._timeout_s)
        failpoints.here("deliver.after_send")
        self._count(results)
        return [*refused, *zip(due, self._rounds.ended(due, results), strict=True)]

    async def _connect(self) -> None:
        if self._sender.connected:
            return
        async with self._connecting:
            if not self._sender.connected:
                await self._sender.connect()
                log.info("connected to %s", self.target)
        self._connected()

    def _count(self, results: Sequence[Result]) -> None:
        acknowledged = results.count(None)
        self._counted("acknowledged", acknowledged)
        if acknowledged < len(results):
            for result in results:
                if result is not None:
                    self._counted("broken" if isinstance(result, AwayError) else "refused", 1)
