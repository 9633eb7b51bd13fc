"""What a broker's client is for its delivery: one connection, and messages that are sent together."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from cdc.brokers.acks import Result
from cdc.core.broker_messages import Message
from cdc.core.deliveries import UnreachedError

_T = TypeVar("_T")

CONNECT_S = 5.0


@dataclass(frozen=True, slots=True)
class Login:
    """``password`` returns the one of the moment, or None. A secret."""

    user: str | None = None
    password: Callable[[], str | None] = lambda: None


class BrokerSender(Protocol):
    """One file for each broker. Used on the event loop, by several tasks."""

    @property
    def connected(self) -> bool:
        """Whether messages can be sent. False once the connection is seen to be lost."""

    async def connect(self) -> None:
        """Raises UnreachedError where no connection can be made, or the login is refused."""

    async def send(self, messages: Sequence[Message], timeout_s: float) -> list[Result]:
        """Send all, then wait ``timeout_s`` for their acknowledgements. Raises only a cancellation.

        Ends soon after the time is up, whatever the broker and the link to it do.
        """

    async def describe(self, name: str) -> str:
        """What stands behind ``name`` on a connected broker, a sentence for ``cdc doctor``.

        Raises DeliveryError if messages to it would be refused.
        """

    async def close(self) -> None:
        """What is under way is lost."""


async def first_reached(servers: Sequence[str], connect: Callable[[str], Awaitable[_T]]) -> _T:
    """The connection to the first of them that can be made. Raises the last one's UnreachedError where none can."""
    for server in servers[:-1]:
        with contextlib.suppress(UnreachedError):
            return await connect(server)
    return await connect(servers[-1])
