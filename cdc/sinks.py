"""What handlers send to brokers with: the senders of ``cdc run --deliver-to``, for whoever transforms before.

    from cdc import sinks

    orders = sinks.kafka("kafka://kafka-1,kafka-2/orders.{type}", user="app", password="...")

    @router.on("order", batch=500)
    async def forward(changes: list[cdc.Change]) -> None:
        await orders.send_batch(changes, lambda change: sinks.Payload({"total": change.new["total"]}))

A sink connects when it sends, and again after an outage. It is for async handlers, on one event loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from cdc.brokers import clients
from cdc.brokers.publisher import Publisher
from cdc.brokers.sender import Login
from cdc.core import broker_url
from cdc.core.broker_messages import CONTENT_TYPE, Message
from cdc.core.broker_url import BrokerTarget
from cdc.core.cloudevents import DATA_TYPE, json_text
from cdc.core.deliveries import RejectedError
from cdc.core.errors import Failed, UsageError
from cdc.core.model import Change
from cdc.core.name_template import NameFunction

Password = str | Callable[[], str | None] | None


@dataclass(frozen=True, slots=True)
class Payload:
    """What is sent in place of the change's own event.

    ``body``: bytes or a text as they are, anything else as JSON. ``to``: another topic, subject, stream or routing key
    than the URL's. ``key``: another one to keep order by than the change's. ``headers`` come on top of those that name
    the change. ``id``: by which the broker or a reader drops doubles, the change's by default; of several messages of
    one change each needs its own, the same at each attempt. Both are in the headers, too, in place of the change's.
    """

    body: Any
    to: str | None = None
    key: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    id: str | None = None
    content_type: str = DATA_TYPE


class Sink:
    """One broker. Made by the functions below; connects at the first message."""

    def __init__(
        self,
        target: BrokerTarget,
        login: Login,
        mode: str,
        source: str | None,
        timeout: float,
        *,
        name: NameFunction | None = None,
    ) -> None:
        if mode not in target.protocol.formats:
            raise UsageError(f"the format is one of {', '.join(target.protocol.formats)} for {target.scheme}")
        self._names = target.names(name)
        self._encoding = clients.encoding(target, mode, source)
        self._publisher = Publisher(clients.sender(target, login), target=str(target), timeout_s=timeout)

    async def send(self, change: Change, payload: Payload | None = None) -> None:
        """Send the change's event, or the payload in its place, and return when the broker has acknowledged it.

        What it raises is for the consumer, so let it pass: ``cdc.Unavailable`` while the broker is away (no attempt is
        counted), ``cdc.Reject`` for what the broker will never take, ``cdc.Retry`` for what an operator can put right.
        """
        try:
            await self._publisher.publish([change], lambda _: self._message(change, payload))
        except Failed as failed:
            [error] = failed.errors.values()
            raise error from None

    async def send_batch(
        self, changes: Sequence[Change], make: Callable[[Change], Payload | None] | None = None
    ) -> None:
        """The same for the changes of a batch handler: all together, those of a key one after the other.

        ``make`` returns what is sent for a change, or None to send nothing for it; left out, its event is sent. Raises
        ``cdc.Failed`` with the error of each change that was not acknowledged, also where ``make`` has raised it.
        """
        await self._publisher.publish(changes, lambda change: self._made(change, make))

    async def close(self) -> None:
        """What is under way is lost. The next message connects again."""
        await self._publisher.close()

    async def __aenter__(self) -> Sink:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _made(self, change: Change, make: Callable[[Change], Payload | None] | None) -> Message | None:
        if make is None:
            return self._message(change, None)
        payload = make(change)
        return None if payload is None else self._message(change, payload)

    def _message(self, change: Change, payload: Payload | None) -> Message:
        if payload is None:
            return self._encoding.message(change, self._names.name(change))
        name = self._names.name(change) if payload.to is None else self._checked(payload.to)
        message = self._encoding.message(change, name)
        _check_texts(payload)
        if payload.id or payload.key is not None:
            key = message.key if payload.key is None else payload.key
            message = self._encoding.identified(message, payload.id or message.id, key)
        headers = {**message.headers, CONTENT_TYPE: payload.content_type, **payload.headers}
        return Message(name, message.id, message.key, _bytes(payload.body), headers)

    def _checked(self, name: str) -> str:
        if wrong := self._names.rules.fault(name):
            raise RejectedError(f"the handler's name for it cannot be one: {wrong}")
        return name


def _check_texts(payload: Payload) -> None:
    """Raises TypeError, or ValueError for control characters where a header would have them as they are."""
    written = [payload.content_type, *payload.headers, *payload.headers.values()]
    if payload.id is not None:
        written.append(payload.id)
    if not all(isinstance(text, str) for text in (*written, payload.key or "")):
        raise TypeError("the id, the key, the content type and the headers of a payload are texts")
    if not all(map(str.isprintable, written)):
        raise ValueError("a header of a payload, its content type or its id has control characters in it")


def _bytes(body: Any) -> bytes:
    if isinstance(body, bytes):
        return body
    return (body if type(body) is str else json_text(body)).encode()


def kafka(
    url: str,
    *,
    user: str | None = None,
    password: Password = None,
    format: str = "structured",  # noqa: A002 - as the setting is called
    source: str | None = None,
    timeout: float = 30.0,
    name: NameFunction | None = None,
) -> Sink:
    """Topics of Apache Kafka: ``kafka://HOST[:9092][,HOST...]/TOPIC``, with the options and placeholders of
    ``--deliver-to``.

    ``password`` may be a function, which is asked at each connection. ``format``: structured, binary or debezium, for
    the changes' own events. ``source``: the events' source. ``timeout``: seconds until an acknowledgement has come;
    less than a handler may take. ``name``: a function of a change that returns its topic, or None for that of
    the URL; a payload's own ``to`` comes first. Raises UsageError for a URL that cannot be one, or where the client is
    not installed.
    """
    return Sink(_target("kafka", url, user, password), _login(user, password), format, source, timeout, name=name)


def nats(
    url: str,
    *,
    user: str | None = None,
    password: Password = None,
    format: str = "structured",  # noqa: A002 - as the setting is called
    source: str | None = None,
    timeout: float = 30.0,
    name: NameFunction | None = None,
) -> Sink:
    """Streams of NATS JetStream: ``nats://HOST[:4222]/SUBJECT``. See ``kafka``.

    A password without a user is a token.
    """
    return Sink(_target("nats", url, user, password), _login(user, password), format, source, timeout, name=name)


def redis(
    url: str,
    *,
    user: str | None = None,
    password: Password = None,
    source: str | None = None,
    timeout: float = 30.0,
    name: NameFunction | None = None,
) -> Sink:
    """Streams of Redis: ``redis://HOST[:6379]/DATABASE/STREAM``. See ``kafka``. The body is the field ``event``."""
    return Sink(
        _target("redis", url, user, password), _login(user, password), broker_url.STRUCTURED, source, timeout, name=name
    )


def amqp(
    url: str,
    *,
    user: str | None = None,
    password: Password = None,
    format: str = "structured",  # noqa: A002 - as the setting is called
    source: str | None = None,
    timeout: float = 30.0,
    name: NameFunction | None = None,
) -> Sink:
    """An exchange of RabbitMQ: ``amqp://HOST[:5672]/VHOST/EXCHANGE/KEY``. See ``kafka``."""
    return Sink(_target("amqp", url, user, password), _login(user, password), format, source, timeout, name=name)


def _target(scheme: str, url: str, user: str | None, password: Password) -> BrokerTarget:
    hint = f"such as {broker_url.PROTOCOLS[scheme].example}"
    if not broker_url.is_broker(url):
        raise UsageError(f"a URL for {scheme} is expected", hint=hint)
    try:
        target = broker_url.parse(url)
        target.check_login(user, has_password=password is not None)
    except ValueError as error:
        raise UsageError(str(error), hint=hint) from None
    if target.scheme != scheme:
        raise UsageError(f"a URL for {scheme} is expected, and this is one for {target.scheme}", hint=hint)
    return target


def _login(user: str | None, password: Password) -> Login:
    return Login(user, password if callable(password) else lambda: password)
