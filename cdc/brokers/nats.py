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
                                or the inbox, where no answer comes     again later
    the connection is lost      for all that is under way               away
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import nats
import nats.errors
import nats.js.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js.api import DiscardPolicy, RetentionPolicy, StreamConfig, StreamInfo

from cdc.brokers import tls
from cdc.brokers.acks import Acks, Result
from cdc.brokers.sender import CONNECT_S, Login, first_reached
from cdc.core.broker_messages import Message
from cdc.core.broker_url import BrokerTarget
from cdc.core.deliveries import AwayError, DeliveryError, LostError, RejectedError, UnreachedError
from cdc.runtime.deadline import deadline

_CLOSE_S = 1.0
_LOOK_S = 0.25
_PING_S = 5
"""A link that is silent for three of these is lost."""
_HEADERS_LINE = len(b"NATS/1.0\r\n\r\n")
_MESSAGE_ID = "Nats-Msg-Id"
_NO_RESPONDERS = "503"
_FULL = {10_023, 10_028, 10_047, 10_077}
"""Error codes of JetStream: no resources, no memory or storage left for the account, and a stream at its limits."""
_TOO_LARGE = {10_054, 10_097}
"""The message, and its headers alone."""
_VIOLATION = 'permissions violation for publish to "'
_QUOTED = re.compile(r'\A((?:[^"\\]|\\.)*)"')
"""What follows, the subject: as Go quotes a text, and the client has made small letters of all."""
_ESCAPE = re.compile(r"\\(?:u(00(?:0[1-9a-f]|10)[0-9a-f]{4})|u([0-9a-f]{4})|(.))")
"""One of eight digits, whose ``U`` was large, begins as no other does: a control character has ``x``."""
_NOT_SUBSCRIBED = 'permissions violation for subscription to "'
_INBOXES = "_INBOX.>"
_RESERVED = "_R_.cdc"
"""A reply subject that a client may not name."""
_ASK_NAMES, _ASK_ABOUT = "$JS.API.STREAM.NAMES", "$JS.API.STREAM.INFO"
_UNTIL = {
    RetentionPolicy.INTEREST: "what a consumer of it waits for, and nothing where there is none",
    RetentionPolicy.WORK_QUEUE: "until a consumer has acknowledged it",
}
_STORED = b'{"stream":"'
_WORDS = 200
_CLOSED = "the connection to the broker was closed before an acknowledgement came"
_DENIED = "authorization violation"
"""All that the protocol says about a refused message or login: it has no codes."""


class _NoTlsError(nats.errors.Error):
    pass


class _TlsClient(Client):
    """One that says nothing without TLS: the library's goes on without where the server does not demand it (2.16), and
    whoever is on the way can take that out of what the server says.
    """

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        if initial_connection:
            if not (info.get("tls_required") or info.get("tls_available")):
                raise _NoTlsError
            info["tls_required"] = True
        await super()._process_info(info, initial_connection)


class NatsSender:
    def __init__(self, target: BrokerTarget, login: Login) -> None:
        self._target = target
        self._login = login
        self._connection: _Connection | None = None

    @property
    def connected(self) -> bool:
        return self._connection is not None and self._connection.client.is_connected

    async def connect(self) -> None:
        await self.close()
        self._connection = await first_reached(self._target.servers, self._connected_to)

    async def _connected_to(self, server: str) -> _Connection:
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
        connection = _Connection(_TlsClient() if self._target.tls else Client())
        async with contextlib.AsyncExitStack() as unless_connected:
            # Its failed attempt leaves the socket open.
            unless_connected.push_async_callback(connection.close, LostError(_CLOSED))
            try:
                await connection.open(f"{'tls' if self._target.tls else 'nats'}://{server}", options)
            # The last two: what should be the server's information is none.
            except (OSError, nats.errors.Error, ValueError, AttributeError, TypeError) as error:
                raise self._unreached(error, connection.failure) from error
            unless_connected.pop_all()
        return connection

    def _unreached(self, error: Exception, failure: Exception | None) -> UnreachedError:
        if isinstance(error, nats.errors.AuthorizationError) or _DENIED in str(error).lower():
            return UnreachedError(f"{self._target} refuses the login")
        # No servers left is what it ends with; the callback got the reason.
        cause = failure if isinstance(error, nats.errors.NoServersError) and failure else error
        why = "it has no TLS" if isinstance(cause, _NoTlsError) else tls.why(cause)
        return UnreachedError(f"the broker at {self._target} cannot be reached ({why})")

    async def send(self, messages: Sequence[Message], timeout_s: float) -> list[Result]:
        connection = self._connection
        assert connection is not None
        results = await connection.send(messages, timeout_s)
        lost = next((result for result in results if isinstance(result, LostError)), None)
        if lost is not None and connection is self._connection:
            await self._end(lost)
        return results

    async def describe(self, name: str) -> str:
        connection = self._connection
        assert connection is not None
        stream = connection.client.jetstream(timeout=CONNECT_S)
        try:
            if not await connection.may_publish(name):
                raise _denied(name)
            if not await connection.may_publish(_ASK_NAMES):
                return f"the login may publish to {name}; its stream: not known, the login may not ask ({_ASK_NAMES})"
            in_stream = await stream.find_stream_name_by_subject(name)
            if not await connection.may_publish(f"{_ASK_ABOUT}.{in_stream}"):
                return (
                    f"{name} goes into the stream {in_stream}; what it keeps: not known, the login may not ask"
                    f" ({_ASK_ABOUT}.{in_stream})"
                )
            found = await stream.stream_info(in_stream)
        except nats.js.errors.NotFoundError:
            raise _no_stream(name) from None
        except nats.errors.NoRespondersError:
            raise DeliveryError("the server has no JetStream: start it with it (-js), and create a stream") from None
        except (OSError, nats.errors.Error) as error:
            raise DeliveryError(f"the stream cannot be looked at ({type(error).__name__})") from error
        return _described(name, found)

    async def close(self) -> None:
        await self._end(LostError(_CLOSED))

    async def _end(self, why: LostError) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close(why)


class _Connection:
    """A client, and what is under way on it. Made on the event loop."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.failure: Exception | None = None
        """The last error that the client has reported."""
        self._inbox = ""
        self._tokens = count()
        self._open: dict[str, tuple[Acks, Sequence[Message]]] = {}
        """By the last but one token of the reply subject; the last one is the place."""
        self._publishing: set[asyncio.Timeout] = set()
        """Of what is being handed to the client: ended with the connection."""
        self._reader: asyncio.Task[Any] | None = None
        self._unanswered: DeliveryError | None = None
        """No answer can come."""
        self._asked: set[str] = set()
        """Subjects whose right is asked for and not denied, in small letters."""

    async def open(self, server: str, options: dict[str, Any]) -> None:
        await self.client.connect(
            server, name="cdc", allow_reconnect=False, connect_timeout=int(CONNECT_S), max_reconnect_attempts=1,
            reconnect_time_wait=0, ping_interval=_PING_S, error_cb=self._failed, disconnected_cb=self._disconnected,
            **options,
        )  # fmt: skip
        self._inbox = self.client.new_inbox()
        await self.client.subscribe(f"{self._inbox}.*.*", cb=self._answered)

    async def may_publish(self, subject: str) -> bool:
        """Whether the login has the right to, which the server looks at first. It then refuses the reply subject, which
        is of those that it keeps for itself, so that nothing is sent to anybody.

        Raises DeliveryError where no answer to anything can come.
        """
        asked = subject.lower()
        self._asked.add(asked)
        await self.client.publish(subject, b"", _RESERVED)
        # What is refused is said before the answer to a PING that came later. The client's PING overtakes what its own
        # task has yet to write (2.16); by the answer to the first one that is written.
        for _ in range(2):
            await self.client.flush(int(CONNECT_S))
        if self._unanswered is not None:
            raise self._unanswered
        allowed = asked in self._asked
        self._asked.discard(asked)
        return allowed

    async def send(self, messages: Sequence[Message], timeout_s: float) -> list[Result]:
        if self._unanswered is not None:
            return [self._unanswered] * len(messages)
        acks, token = Acks(len(messages)), str(next(self._tokens))
        self._open[token] = acks, messages
        try:
            with self._watched():
                # The client waits where it holds much that is not sent yet: for ever, once its connection is closed.
                async with deadline(timeout_s) as limit:
                    self._publishing.add(limit)
                    try:
                        await self._publish(messages, acks, token)
                    finally:
                        self._publishing.discard(limit)
                return await acks.results(timeout_s)
        except (OSError, nats.errors.Error) as error:
            acks.lost(self._why(error))
            return await acks.results(timeout_s)
        finally:
            self._open.pop(token, None)

    async def _publish(self, messages: Sequence[Message], acks: Acks, token: str) -> None:
        publish, limit, reply = self.client.publish, self.client.max_payload, f"{self._inbox}.{token}"
        for place, message in enumerate(messages):
            headers, size = _headers(message)
            if (size := size + len(message.body)) > limit:  # it would close the connection
                acks.ended(place, RejectedError(f"it is too large: {size} bytes, and the server takes {limit}"))
                continue
            try:
                await publish(message.name, message.body, f"{reply}.{place}", headers)
            except (nats.errors.BadSubjectError, nats.errors.BadHeaderError) as error:
                acks.ended(place, RejectedError(f"its subject or a header cannot be one ({type(error).__name__})"))

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """The client does not tell of each end: not of one with something left to send that cannot be sent (2.16)."""
        loop = asyncio.get_running_loop()
        again: asyncio.TimerHandle

        def look() -> None:
            nonlocal again
            if self.client.is_closed:
                self._lost(self._why(nats.errors.ConnectionClosedError()))
            again = loop.call_later(_LOOK_S, look)

        again = loop.call_later(_LOOK_S, look)
        try:
            yield
        finally:
            again.cancel()

    async def _answered(self, answer: Msg) -> None:
        if self._reader is None:
            self._reader = asyncio.current_task()
        _, token, place = answer.subject.rsplit(".", 2)
        if token in self._open:
            acks, messages = self._open[token]
            acks.ended(int(place), None if _stored(answer.data) else _meaning(answer, messages[int(place)].name))

    async def _failed(self, error: Exception) -> None:
        self.failure = error
        said = str(error).lower()
        if f"{_NOT_SUBSCRIBED}{self._inbox.lower()}." in said:
            self._unanswered = DeliveryError(
                f"the login has no right to subscribe to {_INBOXES}, where acknowledgements come",
                hint=f'add it to the permissions of the login: subscribe: ["{_INBOXES}"]',
            )
            for acks, _ in self._open.values():
                acks.lost(self._unanswered)
        _, _, rest = said.partition(_VIOLATION)
        if found := _QUOTED.match(rest):
            self._refuse(_ESCAPE.sub(_unescaped, found[1]))

    def _refuse(self, subject: str) -> None:
        """``subject``: in small letters, as the client gives it."""
        self._asked.discard(subject)
        for acks, messages in self._open.values():
            for place in [place for place in acks.open() if messages[place].name.lower() == subject]:
                acks.ended(place, _denied(messages[place].name))

    async def _disconnected(self) -> None:
        self._lost(self._why(nats.errors.ConnectionClosedError()))

    def _why(self, error: Exception) -> LostError:
        """What the server has said last, where it has ended the connection with a word."""
        said = self.client.last_error
        return _broken(error if said is None or said is self.failure else said)

    def _lost(self, error: LostError) -> None:
        for limit in self._publishing:
            if not limit.expired():
                limit.reschedule(0.0)
        lost, self._open = self._open, {}
        for acks, _ in lost.values():
            acks.lost(error)

    async def close(self, why: LostError) -> None:
        """``why``: of what is under way."""
        await _closed(self.client)
        if self._reader is not None:  # which the client leaves where its own end fails
            self._reader.cancel()
        self._lost(why)


async def _closed(client: Client) -> None:
    """Within a limit: where no TLS came about, the client waits for ever for the end of it."""
    with contextlib.suppress(OSError, nats.errors.Error):
        async with deadline(_CLOSE_S):
            await client.close()


def _broken(error: Exception) -> LostError:
    """Words that follow ``-ERR`` are the protocol's: "user authentication expired", and no content of a message."""
    words = str(error).removeprefix("nats: ").strip("'") if type(error) is nats.errors.Error else type(error).__name__
    return LostError(f"the connection to the broker broke before an acknowledgement came ({words[:_WORDS]})")


def _unescaped(escape: re.Match[str]) -> str:
    long, short, character = escape.groups()
    return character or chr(int(long or short, 16))


def _stored(answer: bytes) -> bool:
    """Whether it says no more than that: cheaper than to parse it. An error would come first."""
    return answer.startswith(_STORED) and b'"error"' not in answer


class _Clean(str):
    """Of printed characters without blanks. In others the client looks for blanks and line breaks, once for each value,
    which takes longer than the rest of what it does for a message.
    """

    __slots__ = ()

    def strip(self, *_: Any) -> str:
        return self

    def translate(self, *_: Any) -> str:
        return self


def _headers(message: Message) -> tuple[dict[str, str], int]:
    """What a message has before its body, and the bytes of that, which count for the server's limit."""
    given = message.headers
    text = "".join([*given, *given.values(), _MESSAGE_ID, message.id])
    size = (len(text) if text.isascii() else len(text.encode())) + 4 * (len(given) + 1) + _HEADERS_LINE
    if not text.isprintable() or " " in text:
        return {**given, _MESSAGE_ID: message.id}, size
    headers: dict[str, str] = {name: _Clean(value) for name, value in given.items()}
    headers[_MESSAGE_ID] = _Clean(message.id)
    return headers, size


def _described(name: str, stream: StreamInfo) -> str:
    config = stream.config
    if config.no_ack:
        raise DeliveryError(f"the stream {config.name} acknowledges nothing (no_ack), so no change would ever be done")
    if config.sealed:
        raise DeliveryError(f"the stream {config.name} is sealed, and takes no message any more")
    window = f"{config.duplicate_window:g} s" if config.duplicate_window else "none"
    return (
        f"{name} goes into the stream {config.name} of {stream.state.messages} messages, replicas:"
        f" {config.num_replicas}, window for doubles: {window}, keeps: {_kept(config)}"
    )


def _kept(config: StreamConfig) -> str:
    """What becomes of messages that nobody has read."""
    until = _UNTIL.get(config.retention or RetentionPolicy.LIMITS, "")
    limits = {"messages": config.max_msgs, "bytes": config.max_bytes, "seconds": config.max_age}
    found = [f"{value:.0f} {unit}" for unit, value in limits.items() if value and value > 0]
    if not found:
        return until or "all"
    full = "refuses more" if config.discard == DiscardPolicy.NEW else "drops the oldest"
    return f"{', '.join([*found, *filter(None, [until])])}, and then {full}"


def _denied(subject: str) -> DeliveryError:
    hint = f'add it to the permissions of the login: publish: ["{subject}"]'
    return DeliveryError(f"the login has no right to publish to the subject {subject}", hint=hint)


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
    words = str(error.get("description", ""))[:_WORDS]
    if code in _TOO_LARGE:
        return RejectedError(f"it is too large for the stream: {words}")
    if code in _FULL or status == int(_NO_RESPONDERS):
        return AwayError(f"the stream takes nothing: {words}")
    return DeliveryError(f"the stream refuses it, error {code}: {words}")
