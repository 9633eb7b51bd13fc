"""NATS: messages to a stream of JetStream, each acknowledged by it.

Theory
------
A message has a reply subject below an inbox of our own; the stream that stored it answers there. The client's own
``publish_async`` never ends for a message that the stream refuses, so the answers are read here. Its reconnecting is
switched off: it would send again what it has in its buffer, behind the order that the consumer keeps.

    answer of the stream        stored, or a double within its window   acknowledged
                                it is full, has no leader, no room      away
                                too large for it                        dead
                                any other error                         again later
    no responders               no stream has the subject               again later
    permissions violation       an asynchronous error that names it     again later
    the connection is lost      for all that is under way               away
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

import nats
import nats.errors
import nats.js.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js.api import DiscardPolicy, StreamConfig

from cdc.brokers import tls
from cdc.brokers.acks import Acks, Result
from cdc.brokers.sender import CONNECT_S, Login, first_reached
from cdc.core.broker_messages import Message
from cdc.core.broker_url import BrokerTarget
from cdc.core.deliveries import AwayError, DeliveryError, LostError, RejectedError, UnreachedError
from cdc.runtime.deadline import deadline

_CLOSE_S = 1.0
_PING_S = 5
"""A link that is silent for three of these is lost."""
_HEADERS_LINE = len(b"NATS/1.0\r\n\r\n")
_NO_RESPONDERS = "503"
_FULL = {10_023, 10_028, 10_047, 10_077}
"""Error codes of JetStream: no resources, no memory or storage left for the account, and a stream at its limits."""
_TOO_LARGE = 10_054
_VIOLATION = 'permissions violation for publish to "'
_DENIED = "authorization violation"
"""All that the protocol says about a refused message or login: it has no codes."""


class NatsSender:
    def __init__(self, target: BrokerTarget, login: Login) -> None:
        self._target = target
        self._login = login
        self._client: Client | None = None
        self._failure: Exception | None = None
        self._inbox = ""
        self._tokens = count()
        self._open: dict[str, tuple[Acks, int, str]] = {}
        """By the last token of the reply subject: where the answer goes, and the message's subject."""
        self._publishing: set[asyncio.Timeout] = set()
        """Of what is being handed to the client: ended with the connection."""

    @property
    def connected(self) -> bool:
        return self._client is not None and self._client.is_connected

    async def connect(self) -> None:
        await self.close()
        self._client = await first_reached(self._target.servers, self._connection)
        self._inbox = self._client.new_inbox()
        await self._client.subscribe(f"{self._inbox}.*", cb=self._answered)

    async def _connection(self, server: str) -> Client:
        options: dict[str, Any] = {}
        if (context := tls.context(self._target)) is not None:
            options["tls"] = context
        if (creds := self._target.options.get("creds")) is not None:
            options["user_credentials"] = creds
        password = self._login.password()
        if self._login.user is not None:
            options |= {"user": self._login.user, "password": password}
        elif password is not None:
            options["token"] = password
        client = Client()
        async with contextlib.AsyncExitStack() as unless_connected:
            unless_connected.push_async_callback(_closed, client)  # its own failed attempt leaves the socket open
            try:
                await client.connect(
                    f"{'tls' if self._target.tls else 'nats'}://{server}", name="cdc", allow_reconnect=False,
                    connect_timeout=int(CONNECT_S), max_reconnect_attempts=1, reconnect_time_wait=0,
                    ping_interval=_PING_S, error_cb=self._failed, disconnected_cb=self._disconnected, **options,
                )  # fmt: skip
            except (OSError, nats.errors.Error, ValueError) as error:
                raise self._unreached(error) from error
            unless_connected.pop_all()
        return client

    def _unreached(self, error: Exception) -> UnreachedError:
        if isinstance(error, nats.errors.AuthorizationError) or _DENIED in str(error).lower():
            return UnreachedError(f"{self._target} refuses the login")
        # No servers left is what it ends with; the callback got the reason.
        cause = self._failure if isinstance(error, nats.errors.NoServersError) and self._failure else error
        return UnreachedError(f"the broker at {self._target} cannot be reached ({tls.why(cause)})")

    async def send(self, messages: Sequence[Message], timeout_s: float) -> list[Result]:
        acks = Acks(len(messages))
        tokens = [str(next(self._tokens)) for _ in messages]
        client = self._client
        assert client is not None
        try:
            # The client waits where it holds much that is not sent yet: for ever, once its connection is closed.
            async with deadline(timeout_s) as limit:
                self._publishing.add(limit)
                try:
                    for place, message in enumerate(messages):
                        await self._publish(client, message, acks, place, tokens[place])
                finally:
                    self._publishing.discard(limit)
            results = await acks.results(timeout_s)
        except (OSError, nats.errors.Error) as error:
            acks.lost(_broken(error))
            results = await acks.results(timeout_s)
        finally:
            for token in tokens:
                self._open.pop(token, None)
        if any(isinstance(result, LostError) for result in results) and client is self._client:
            await self.close()
        return results

    async def _publish(self, client: Client, message: Message, acks: Acks, place: int, token: str) -> None:
        headers = {**message.headers, "Nats-Msg-Id": message.id}
        body = message.body
        if (size := _size(body, headers, client.max_payload)) > client.max_payload:  # it would close the connection
            why = f"it is too large: {size} bytes, and the server takes {client.max_payload}"
            acks.ended(place, RejectedError(why))
            return
        self._open[token] = acks, place, message.name
        await client.publish(message.name, body, f"{self._inbox}.{token}", headers)

    async def describe(self, name: str) -> str:
        assert self._client is not None
        stream = self._client.jetstream(timeout=CONNECT_S)
        try:
            found = await stream.stream_info(await stream.find_stream_name_by_subject(name))
        except nats.js.errors.NotFoundError:
            raise _no_stream(name) from None
        except nats.errors.NoRespondersError:
            raise DeliveryError("the server has no JetStream: start it with it (-js), and create a stream") from None
        except (OSError, nats.errors.Error) as error:
            raise DeliveryError(f"the stream cannot be looked at ({type(error).__name__})") from error
        config = found.config
        window = f"{config.duplicate_window:g} s" if config.duplicate_window else "none"
        return (
            f"{name} goes into the stream {config.name} of {found.state.messages} messages, replicas:"
            f" {config.num_replicas}, window for doubles: {window}, keeps: {_kept(config)}"
        )

    async def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await _closed(client)
        self._lost(LostError("the connection to the broker was closed before an acknowledgement came"))

    async def _answered(self, answer: Msg) -> None:
        acks, place, subject = self._open.pop(answer.subject.rpartition(".")[2], (None, 0, ""))
        if acks is not None:
            acks.ended(place, _meaning(answer, subject))

    async def _failed(self, error: Exception) -> None:
        self._failure = error
        _, found, rest = str(error).lower().partition(_VIOLATION)
        denied = rest.partition('"')[0]
        for acks, place, subject in list(self._open.values()) if found else []:
            if subject.lower() == denied:
                acks.ended(place, DeliveryError(f"the login has no right to publish to the subject {subject}"))

    async def _disconnected(self) -> None:
        self._lost(_broken(nats.errors.ConnectionClosedError()))

    def _lost(self, error: LostError) -> None:
        for limit in self._publishing:
            if not limit.expired():
                limit.reschedule(0.0)
        lost, self._open = self._open, {}
        for acks, _, _ in lost.values():
            acks.lost(error)


async def _closed(client: Client) -> None:
    """Within a limit: where no TLS came about, the client waits for ever for the end of it."""
    with contextlib.suppress(OSError, nats.errors.Error):
        async with deadline(_CLOSE_S):
            await client.close()


def _broken(error: Exception) -> LostError:
    return LostError(f"the connection to the broker broke before an acknowledgement came ({type(error).__name__})")


def _size(body: bytes, headers: Mapping[str, str], limit: int) -> int:
    """Bytes that count for the server's limit. Far below it characters are counted, which have 4 bytes at most."""
    count = len(body) + sum(map(len, headers)) + sum(map(len, headers.values())) + 4 * len(headers) + _HEADERS_LINE
    if 4 * count <= limit:
        return count
    return len(body) + _HEADERS_LINE + sum(len(f"{name}{value}".encode()) + 4 for name, value in headers.items())


def _kept(config: StreamConfig) -> str:
    """What becomes of messages that nobody has read."""
    limits = {"messages": config.max_msgs, "bytes": config.max_bytes, "seconds": config.max_age}
    found = [f"{value:.0f} {unit}" for unit, value in limits.items() if value and value > 0]
    if not found:
        return "all"
    full = "refuses more" if config.discard == DiscardPolicy.NEW else "drops the oldest"
    return f"{', '.join(found)}, and then {full}"


def _no_stream(subject: str) -> DeliveryError:
    return DeliveryError(f"no stream of JetStream takes the subject {subject}: create one, or correct deliver.to")


def _meaning(answer: Msg, subject: str) -> Result:
    """What a stream's answer says about the message."""
    if answer.headers and answer.headers.get("Status") == _NO_RESPONDERS:
        return _no_stream(subject)
    try:
        error = json.loads(answer.data).get("error")
        if error is None:
            return None
        status, code = int(error["code"]), int(error.get("err_code", 0))
    except (ValueError, AttributeError, TypeError, KeyError):
        return DeliveryError("the stream gave an answer that cannot be read")
    words = str(error.get("description", ""))[:200]
    if code == _TOO_LARGE:
        return RejectedError(f"it is too large for the stream: {words}")
    if code in _FULL or status == int(_NO_RESPONDERS):
        return AwayError(f"the stream takes nothing: {words}")
    return DeliveryError(f"the stream refuses it, error {code}: {words}")
