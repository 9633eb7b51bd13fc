"""RabbitMQ by AMQP 0-9-1: persistent messages to an exchange, each confirmed, and returned where no queue takes it.

Theory
------
The messages of a round are published on one channel, and their confirmations awaited together. An error of the channel
closes it, and ends all that is under way on it, whoever caused it. The exchange is the same for all, so an error about
it or about the rights to it is one of each of them. Any other error of a channel may be one message's: then they are
published one by one, each on a channel of its own: the first one is shared with other calls, and so is its end.

    confirmed                                       acknowledged
    returned: no queue has a binding for it         again later
    refused (nack): a queue is full                 away
    no exchange, no right                           again later
    an error of the channel, alone on it            dead
    its header is no frame that the broker takes    dead
    the connection is lost, no confirmation         away
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

import aio_pika
from aio_pika import DeliveryMode
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractExchange
from aio_pika.connection import Connection, make_url
from aiormq import exceptions, spec
from pamqp.common import FieldValue
from pamqp.header import ContentHeader

from cdc.brokers import tls
from cdc.brokers.acks import Result
from cdc.brokers.sender import CONNECT_S, Login, first_reached
from cdc.core.broker_messages import CONTENT_TYPE, Message
from cdc.core.broker_url import BrokerTarget
from cdc.core.deliveries import AwayError, DeliveryError, LostError, RejectedError, UnreachedError
from cdc.runtime.deadline import deadline

_HEARTBEAT_S = 10
_REFUSED = spec.Basic.Properties(user_id="nobody, to ask for a right", expiration="none")
"""No user has that name, and an expiration is a number: a login that may be anybody else is refused for that."""
_SURELY_FITS = 1_000
"""Characters of headers that no broker's frame is too small for: 4,096 bytes are the least."""
_FRAME_ENDS = 8
"""Bytes around the content of a frame."""
_GUEST = "guest"
"""The login of a server that has no other, which it grants on loopback only."""
_LOST = (exceptions.AMQPConnectionError, exceptions.ChannelInvalidStateError, OSError, RuntimeError)


class AmqpSender:
    def __init__(self, target: BrokerTarget, login: Login) -> None:
        self._target = target
        self._login = login
        self._virtual_host, self._exchange = target.places
        self._connection: AbstractConnection | None = None
        self._channel: AbstractChannel | None = None
        self._ended: tuple[AbstractConnection, LostError] | None = None
        """The last connection that was lost, and the reason for whatever was under way on it."""

    @property
    def connected(self) -> bool:
        return (
            self._connection is not None
            and not self._connection.is_closed
            and self._channel is not None
            and not self._channel.is_closed
        )

    async def connect(self) -> None:
        await self.close()
        self._connection = await first_reached(self._target.servers, self._connected_to)
        try:
            self._channel = await self._new_channel(self._connection)
        except (exceptions.AMQPError, *_LOST) as error:
            raise self._unreached(error) from error

    async def _connected_to(self, server: str) -> AbstractConnection:
        host, _, port = server.rpartition(":")
        context = tls.context(self._target)
        url = make_url(
            host=host.strip("[]"), port=int(port), virtualhost=self._virtual_host, ssl=self._target.tls,
            login=self._login.user or _GUEST, password=self._login.password() or _GUEST, heartbeat=_HEARTBEAT_S,
        )  # fmt: skip
        connection = Connection(url, ssl_context=context, client_properties={"connection_name": "cdc"})
        async with contextlib.AsyncExitStack() as unless_connected:
            unless_connected.push_async_callback(_closed, connection)
            try:
                async with deadline(CONNECT_S):
                    await connection.connect()
            except (exceptions.AMQPError, *_LOST) as error:
                raise self._unreached(error) from error
            unless_connected.pop_all()
        return connection

    def _unreached(self, error: BaseException) -> UnreachedError:
        if isinstance(error, exceptions.AuthenticationError | exceptions.ProbableAuthenticationError):
            return UnreachedError(f"{self._target} refuses the login")
        # The client has no class for what comes in place of an answer; which one it waited for is in its text.
        not_opened = isinstance(error, exceptions.InvalidFrameError) and "Connection.OpenOk" in str(error)
        if not_opened or isinstance(error, exceptions.ConnectionNotAllowed):
            return UnreachedError(f"{self._target} refuses the virtual host {self._virtual_host}")
        cause = next((each for each in (error.__cause__, error.__context__) if isinstance(each, OSError)), error)
        return UnreachedError(f"the broker at {self._target} cannot be reached ({tls.why(cause)})")

    @staticmethod
    async def _new_channel(connection: AbstractConnection) -> AbstractChannel:
        async with deadline(CONNECT_S):
            return await connection.channel(publisher_confirms=True, on_return_raises=True)

    async def send(self, messages: Sequence[Message], timeout_s: float) -> list[Result]:
        connection, channel = self._connection, self._channel
        assert connection is not None
        assert channel is not None
        results = await self._published(connection, channel, messages, timeout_s)
        for place, result in enumerate(results):
            if isinstance(result, RejectedError):  # or another message is, of this call or of one beside it
                results[place] = await self._alone(connection, messages[place], timeout_s)
        lost = next((result for result in results if isinstance(result, LostError)), None)
        if lost is None:
            return results
        if self._ended is None or self._ended[0] is not connection:
            self._ended = connection, lost
        why = self._ended[1]
        if connection is self._connection:
            await self.close()
        return [why if isinstance(result, LostError) else result for result in results]

    async def _alone(self, connection: AbstractConnection, message: Message, timeout_s: float) -> Result:
        try:
            # The channel is closed in the end, which waits for the broker, too.
            async with deadline(2 * CONNECT_S + timeout_s), await self._new_channel(connection) as channel:
                [result] = await self._published(connection, channel, [message], timeout_s)
                return result
        except (exceptions.AMQPError, *_LOST) as error:
            return _meaning(error, message.name)

    async def _published(
        self, connection: AbstractConnection, channel: AbstractChannel, messages: Sequence[Message], timeout_s: float
    ) -> list[Result]:
        try:
            exchange = await channel.get_exchange(self._exchange, ensure=False)
            async with deadline(timeout_s):
                found = await asyncio.gather(
                    *(_publish(exchange, message, _frame_max(connection)) for message in messages),
                    return_exceptions=True,
                )
        except TimeoutError:
            why = ": it has an alarm about its memory or its disk" if await _blocked(connection) else ""
            return [LostError(f"no confirmation came within {timeout_s:g} s{why}")] * len(messages)
        except (exceptions.AMQPError, *_LOST) as error:
            return [_meaning(error, message.name) for message in messages]
        ended = next((each for each in found if isinstance(each, exceptions.ConnectionClosed)), None)
        if ended is not None:  # what the others got is only that the channel went with it
            found = [ended if isinstance(each, exceptions.ChannelInvalidStateError) else each for each in found]
        return [
            _result(each, message.name) if isinstance(each, BaseException) else None
            for each, message in zip(found, messages, strict=True)
        ]

    async def describe(self, name: str) -> str:
        assert self._connection is not None
        try:
            behind = await self._behind(self._connection, name)
            await self._check_right(self._connection, name)
        except exceptions.ChannelNotFoundEntity:
            what = f"exchange {self._exchange}" if self._exchange else f"queue {name}"
            raise DeliveryError(f"there is no {what}: declare it, or correct deliver.to") from None
        except (exceptions.AMQPError, *_LOST) as error:
            raise DeliveryError(f"{name} cannot be looked at ({type(error).__name__})") from error
        return behind

    async def _behind(self, connection: AbstractConnection, name: str) -> str:
        async with await self._new_channel(connection) as channel:
            if self._exchange:
                await channel.get_exchange(self._exchange, ensure=True)
                return f"{name} goes to the exchange {self._exchange}; whether a queue takes it, only a message shows"
            queue = (await channel.get_queue(name, ensure=True)).declaration_result
        return f"{name} is a queue of {queue.message_count} messages, with {queue.consumer_count} consumers"

    async def _check_right(self, connection: AbstractConnection, name: str) -> None:
        """By a message that the broker looks at the right for, and then refuses, for its user and for its expiration.

        Raises DeliveryError where one would be refused.
        """
        try:
            async with deadline(CONNECT_S), await self._new_channel(connection) as channel:
                under = await channel.get_underlay_channel()
                await under.basic_publish(b"", exchange=self._exchange, routing_key=name, properties=_REFUSED)
        except exceptions.ChannelPreconditionFailed:
            return
        except exceptions.ChannelAccessRefused:
            raise _no_right() from None

    async def close(self) -> None:
        connection, self._connection, self._channel = self._connection, None, None
        if connection is not None:
            await _closed(connection)


async def _closed(connection: AbstractConnection) -> None:
    """One that is not, also where it never came about, starts closing when its memory is taken back, on any thread."""
    with contextlib.suppress(exceptions.AMQPError, *_LOST):
        async with deadline(CONNECT_S):
            await connection.close()
    if not connection.is_closed:
        await connection.close()  # without its transport, which was given up: waits for nothing


async def _blocked(connection: AbstractConnection) -> bool:
    """Whether the broker has said that it reads nothing for now."""
    if connection.transport is None:
        return False
    try:
        async with deadline(0.0):  # it waits only where it is so
            await connection.transport.ready()
    except TimeoutError:
        return True
    return False


def _frame_max(connection: AbstractConnection) -> int:
    """Bytes. 0: no limit."""
    return connection.transport.connection.connection_tune.frame_max if connection.transport else 0


async def _publish(exchange: AbstractExchange, message: Message, frame_max: int) -> None:
    """Raises RejectedError for one whose header the client cannot write, or that would end the connection."""
    made = _made(message)
    try:
        if sum(len(text) for pair in message.headers.items() for text in pair) > _SURELY_FITS:
            size = len(ContentHeader(body_size=len(message.body), properties=made.properties).marshal()) + _FRAME_ENDS
            if 0 < frame_max < size:
                raise RejectedError(f"its headers are too large: {size} bytes, and the broker takes {frame_max}")
        await exchange.publish(made, message.name)
    except (TypeError, ValueError) as error:  # such as an id of more than 255 bytes
        raise RejectedError(f"its id or a header cannot be written ({type(error).__name__})") from error


def _made(message: Message) -> aio_pika.Message:
    headers: dict[str, FieldValue] = {**message.headers}
    return aio_pika.Message(
        message.body,
        content_type=str(headers.pop(CONTENT_TYPE)),
        headers=headers,
        message_id=message.id,
        delivery_mode=DeliveryMode.PERSISTENT,
    )


def _result(error: BaseException, name: str) -> Result:
    return error if isinstance(error, RejectedError) else _meaning(error, name)


def _meaning(error: BaseException, name: str) -> Result:
    """What became of a message whose publishing raised ``error``. The exchange's words are not quoted."""
    match error:
        case exceptions.PublishError():
            return DeliveryError(f"no queue takes the routing key {name}: bind one, or correct deliver.to")
        case exceptions.DeliveryError():
            return AwayError("a queue takes nothing: the broker refused the message")
        case exceptions.ChannelNotFoundEntity():
            return DeliveryError("the exchange is not there: declare it, or correct deliver.to")
        case exceptions.ChannelAccessRefused():
            return _no_right()
        case exceptions.ChannelClosed():
            return RejectedError(f"the broker closes the channel for it ({type(error).__name__})")
    return LostError(f"the connection to the broker broke before a confirmation came ({_word(error)})")


def _no_right() -> DeliveryError:
    hint = (
        "rabbitmqctl set_permissions -p VHOST USER '' '^EXCHANGE$' '', where its right to write is the second;"
        " for some routing keys only, set_topic_permissions"
    )
    return DeliveryError("the login has no right to write to the exchange, or with this routing key", hint=hint)


def _word(error: BaseException) -> str:
    """The name of the broker's reason to end the connection, CONNECTION_FORCED, where it gave one."""
    word = str(error.args[-1]).partition(" ")[0] if isinstance(error, exceptions.AMQPError) and error.args else ""
    return word if word.isupper() and word.replace("_", "").isalpha() else type(error).__name__
