"""Apache Kafka: records of an idempotent producer, each acknowledged by all replicas that are in sync.

Theory
------
The client is librdkafka: threads of its own send, retry and reconnect, and ``poll`` reports what became of a record.
One thread of ours polls, and hands the reports of one poll to the event loop together: a wake-up of the loop for each
record would cost more than the record.

    CONNECTED ── no broker answers any more, or the producer has ended: given up ──> CLOSED ── connect ──> CONNECTED

Idempotence covers the retries of one producer: none of them makes a double or turns the order round. A new producer, of
another process or after a lost connection, knows nothing of the one before: what that one had sent without hearing of
it is sent again, with the same id in its headers.

    a report without an error                         acknowledged
    no broker, no answer in time, a producer ended    away; the producer is given up, and what it holds is purged
    too large, alone in its batch                     dead
    any other error                                   again later
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from confluent_kafka import KafkaError, KafkaException, Producer, TopicCollection
from confluent_kafka import Message as Report
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # it has them, and does not say so
    AclOperation,
    AdminClient,
    ConfigResource,
)

from cdc.brokers import tls
from cdc.brokers.acks import Acks, Result
from cdc.brokers.sender import CONNECT_S, Login
from cdc.core.broker_messages import Message
from cdc.core.broker_url import BrokerTarget
from cdc.core.deliveries import AwayError, DeliveryError, LostError, RejectedError, UnreachedError

log = logging.getLogger("cdc.kafka")

_POLL_S = 0.1
_UNKNOWN_TOPIC_MS = 10_000
"""A topic that was just made is unknown to some brokers for a moment."""
_ASK_S = 3.0
"""For an answer to a question of an administrator: two of them, within what looking may take."""
_TOKEN_S = 300.0
"""A token is asked for again so often, from the file that holds it."""
_AWAY = {
    getattr(KafkaError, name)
    for name in (
        "_ALL_BROKERS_DOWN", "_MSG_TIMED_OUT", "_TRANSPORT", "_TIMED_OUT", "_TIMED_OUT_QUEUE", "_PURGE_QUEUE",
        "_PURGE_INFLIGHT", "_FATAL", "_FAIL", "_DESTROY", "_RESOLVE", "_STATE", "_AUTHENTICATION", "_SSL",
        "NOT_ENOUGH_REPLICAS", "NOT_ENOUGH_REPLICAS_AFTER_APPEND", "REQUEST_TIMED_OUT", "NETWORK_EXCEPTION",
        "LEADER_NOT_AVAILABLE", "NOT_LEADER_FOR_PARTITION", "BROKER_NOT_AVAILABLE",
    )
}  # fmt: skip
_WORDS = {
    KafkaError._TRANSPORT: "no connection",  # noqa: SLF001 - a public name
    KafkaError._RESOLVE: "the name is not known",  # noqa: SLF001 - a public name
    KafkaError._SSL: "no TLS, or a certificate that one side does not trust",  # noqa: SLF001 - a public name
}
_TOO_LARGE = {KafkaError.MSG_SIZE_TOO_LARGE, KafkaError.INVALID_MSG_SIZE}
_MISSING = {KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC, KafkaError._UNKNOWN_PARTITION}  # noqa: SLF001 - a public name
"""A name of the library that begins with an underscore is public: an error of the client, not of a broker."""
_CLOSED = "the connection to the broker was closed before an acknowledgement came"
_DENIED = {KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.CLUSTER_AUTHORIZATION_FAILED}


class KafkaSender:
    def __init__(self, target: BrokerTarget, login: Login) -> None:
        self._target = target
        self._login = login
        self._tombstones = target.options.get("tombstones") == "true"
        self._client: _Client | None = None
        self._lone: _Client | None = None

    @property
    def connected(self) -> bool:
        return self._client is not None and self._client.down is None

    async def connect(self) -> None:
        await self.close()
        failed: list[KafkaError] = []
        tls.context(self._target)  # names the file that cannot be read
        try:
            client = _Client(_settings(self._target, self._login), failed.append)
        except (KafkaException, ValueError) as error:
            raise UnreachedError(f"the settings for {self._target} do not fit ({_name(error)})") from error
        try:
            await asyncio.to_thread(client.producer.list_topics, timeout=CONNECT_S)
        except KafkaException as error:
            await client.close(LostError(_CLOSED))
            raise self._unreached(failed or [error.args[0]]) from error
        except BaseException:
            await client.close(LostError(_CLOSED))
            raise
        self._client = client

    def _unreached(self, failed: Sequence[KafkaError]) -> UnreachedError:
        codes = {error.code() for error in failed}
        if KafkaError._AUTHENTICATION in codes:  # noqa: SLF001 - a public name
            return UnreachedError(f"{self._target} refuses the login")
        why = sorted({_WORDS[code] for code in codes if code in _WORDS})
        return UnreachedError(f"the broker at {self._target} cannot be reached ({'; '.join(why) or 'no answer'})")

    async def send(self, messages: Sequence[Message], timeout_s: float) -> list[Result]:
        client = self._client
        assert client is not None
        results = await self._sent(client, messages, timeout_s)
        # The broker refuses a whole batch, and another record in it may be what is too large, also one of another call.
        places = [place for place, result in enumerate(results) if isinstance(result, RejectedError)]
        if places:
            lone = await self._sent(self._lone_client(), [messages[place] for place in places], timeout_s)
            for place, result in zip(places, lone, strict=True):
                results[place] = result
        lost = next((result for result in results if isinstance(result, LostError)), None)
        if lost is not None and client is self._client:
            await self._end(lost)
        return results

    def _lone_client(self) -> _Client:
        """A producer that puts no two records into a batch."""
        if self._lone is None:
            settings = {**_settings(self._target, self._login), "batch.num.messages": 1}
            self._lone = _Client(settings, lambda _: None)
        return self._lone

    async def _sent(self, client: _Client, messages: Sequence[Message], timeout_s: float) -> list[Result]:
        records: list[tuple[int, Message, bytes | None]] = [
            (place, message, message.body) for place, message in enumerate(messages)
        ]
        if self._tombstones:
            records += [(place, message, None) for place, message, _ in records if message.ends]
            records.sort(key=lambda record: record[0])
        acks = Acks(len(records))
        for number, (_, message, body) in enumerate(records):
            client.produce(message, body, acks, number)
        results: list[Result] = [None] * len(messages)
        for (place, _, _), result in zip(records, await acks.results(timeout_s), strict=True):
            results[place] = results[place] or result
        return results

    async def describe(self, name: str) -> str:
        assert self._client is not None
        try:
            # All of them: to ask about one topic may make it.
            found = await asyncio.to_thread(self._client.producer.list_topics, timeout=CONNECT_S)
        except KafkaException as error:
            raise DeliveryError(f"the topic {name} cannot be looked at ({_name(error)})") from error
        topic = found.topics.get(name)
        if topic is None or not topic.partitions:
            raise _no_topic(name)
        replicas = min((len(each.replicas) for each in topic.partitions.values()), default=0)
        more = await asyncio.to_thread(_asked, _connection(self._target, self._login), name)
        return f"{name} is a topic of {len(topic.partitions)} partitions, replicas: {replicas}{more}"

    async def close(self) -> None:
        await self._end(LostError(_CLOSED))

    async def _end(self, why: LostError) -> None:
        clients, self._client, self._lone = (self._client, self._lone), None, None
        for client in clients:
            if client is not None:
                await client.close(why)


class _Client:
    """A producer and the thread that polls it. Made on the event loop."""

    def __init__(self, settings: Mapping[str, Any], failed: Callable[[KafkaError], None]) -> None:
        self.down: LostError | None = None
        """Why nothing more is sent: the reason of whatever this producer held, too."""
        self._failed = failed
        self._reports: deque[tuple[Acks, int, Result]] = deque()
        self._untold: list[tuple[Acks, int]] = []
        """Refused as the producer has ended; the reason is on its way to the thread that polls."""
        self._loop = asyncio.get_running_loop()
        self._stopping = threading.Event()
        self.producer = Producer({**settings, "error_cb": self._broken}, logger=log)
        self._thread = threading.Thread(target=self._poll, name="cdc-kafka", daemon=True)
        self._thread.start()

    def produce(self, message: Message, body: bytes | None, acks: Acks, place: int) -> None:
        def reported(error: KafkaError | None, _: Report) -> None:  # in the thread that polls
            result = None if error is None else _meaning(error, message.name)
            if self.down is not None and isinstance(result, LostError):
                result = self.down  # why it was purged, which its own error does not say
            self._reports.append((acks, place, result))

        if self.down is not None:
            acks.ended(place, self.down)
            return
        try:
            headers: list[tuple[str, str | bytes | None]] = list(message.headers.items())
            self.producer.produce(message.name, body, message.key, on_delivery=reported, headers=headers)
        except BufferError:
            acks.ended(place, AwayError("the client's queue is full"))
        except KafkaException as error:
            self._refused(error.args[0], message, acks, place)

    def _refused(self, error: KafkaError, message: Message, acks: Acks, place: int) -> None:
        if error.code() != KafkaError._FATAL:  # noqa: SLF001 - a public name
            acks.ended(place, _meaning(error, message.name))
        elif self.down is not None:
            acks.ended(place, self.down)
        else:
            self._untold.append((acks, place))

    def _poll(self) -> None:
        while not self._stopping.is_set():
            try:
                self.producer.poll(_POLL_S)
            except KafkaException as fatal:  # of a producer that has ended; what it held is still reported
                self._ended(f"the producer has ended ({_name(fatal)})")
                self._stopping.wait(_POLL_S)
            if self._reports:
                self._on_loop(self._settle)

    def _on_loop(self, function: Callable[..., None], *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(function, *arguments)

    def _settle(self) -> None:
        while self._reports:
            acks, place, result = self._reports.popleft()
            acks.ended(place, result)

    def _broken(self, error: KafkaError) -> None:
        """In the thread that polls: about a connection, the login, or all brokers."""
        self._failed(error)
        if error.fatal():
            self._ended(f"the producer has ended ({error.name()})")
        elif error.code() == KafkaError._ALL_BROKERS_DOWN:  # noqa: SLF001 - a public name
            self._ended(f"no broker answers any more ({error.name()})")

    def _ended(self, why: str) -> None:
        """In the thread that polls. The reason stands before what the producer purges of itself is reported."""
        if self.down is None:
            self.down = LostError(why)
        self._on_loop(self._give_up, self.down)

    def _give_up(self, why: LostError) -> None:
        """What waits comes back as reports of what was purged."""
        self.down = self.down or why
        with contextlib.suppress(KafkaException):
            self.producer.purge()
        untold, self._untold = self._untold, []
        for acks, place in untold:
            acks.ended(place, self.down)

    async def close(self, why: LostError) -> None:
        """``why``: of what is under way, unless the producer itself had a reason to end."""
        self._give_up(why)
        await asyncio.to_thread(self.producer.flush, 1.0)  # reports what was purged
        self._stopping.set()
        await asyncio.to_thread(self._thread.join, 10 * _POLL_S)
        self._settle()


def _settings(target: BrokerTarget, login: Login) -> dict[str, Any]:
    return {
        **_connection(target, login),
        "acks": "all",
        "enable.idempotence": True,
        "partitioner": "murmur2_random",  # that of Java's clients: a key is in one partition, whoever writes
        "linger.ms": 1,
        "compression.type": target.options.get("compression", "none"),
        "message.max.bytes": 1_000_000_000,  # the broker's limit decides, and that of the topic
        "batch.size": 900_000,  # below the broker's limit for a request of records, 1 MiB by default
        "topic.metadata.propagation.max.ms": _UNKNOWN_TOPIC_MS,
    }


def _connection(target: BrokerTarget, login: Login) -> dict[str, Any]:
    options, password = target.options, login.password()
    sasl = options.get("sasl", "PLAIN") if password is not None else None
    settings: dict[str, Any] = {
        "bootstrap.servers": ",".join(target.servers),
        "client.id": "cdc",
        "security.protocol": ("SASL_" if sasl else "") + ("SSL" if target.tls else "PLAINTEXT"),
        "socket.connection.setup.timeout.ms": int(CONNECT_S * 1_000),
        "reconnect.backoff.max.ms": 1_000,
        "log_level": 2,
    }
    for option, name in (("ca", "ca"), ("cert", "certificate"), ("key", "key")):
        if option in options:
            settings[f"ssl.{name}.location"] = options[option]
    if sasl:
        settings["sasl.mechanisms"] = sasl
        if sasl == "OAUTHBEARER":
            settings["oauth_cb"] = lambda _: (login.password() or "", time.time() + _TOKEN_S)
        else:
            settings |= {"sasl.username": login.user or "", "sasl.password": password}
    return settings


def _asked(settings: Mapping[str, Any], topic: str) -> str:
    """What an administrator's requests say about a topic that is there: what it keeps, and our right to write.

    What may not be asked, or is no question of this broker, is left out with the reason.
    """
    if "oauth_cb" in settings:  # this client does not call it while it waits
        return ", rights and retention: not asked for with a token"
    admin = AdminClient(dict(settings), logger=log)
    try:
        looked = admin.describe_topics(
            TopicCollection([topic]), include_authorized_operations=True, request_timeout=_ASK_S
        )
        rights = looked[topic].result(_ASK_S).authorized_operations
    except (KafkaException, TimeoutError) as error:
        return f", rights: not known ({_name(error)})"
    if rights and not {AclOperation.WRITE, AclOperation.ALL} & set(rights):
        raise _denied(topic)
    resource = ConfigResource(ConfigResource.Type.TOPIC, topic)
    try:
        found = admin.describe_configs([resource], request_timeout=_ASK_S)[resource].result(_ASK_S)
    except (KafkaException, TimeoutError) as error:
        return f", retention: not known ({_name(error)})"
    kept = int(found["retention.ms"].value)
    days = "no limit" if kept < 0 else f"{kept / 86_400_000:g} days"
    return f", in sync at least: {found['min.insync.replicas'].value}, {found['cleanup.policy'].value} after: {days}"


def _name(error: BaseException) -> str:
    """Of the error, without its text, which may quote a setting."""
    found = error.args[0] if error.args else None
    return found.name() if isinstance(found, KafkaError) else type(error).__name__


def _denied(topic: str) -> DeliveryError:
    hint = f"kafka-acls.sh --add --allow-principal User:NAME --operation Write --operation Describe --topic {topic}"
    return DeliveryError(f"the login has no right to write to the topic {topic}", hint=hint)


def _no_topic(topic: str) -> DeliveryError:
    return DeliveryError(f"there is no topic {topic}: create it, or correct deliver.to")


def _meaning(error: KafkaError, topic: str) -> Result:
    code = error.code()
    if code in _AWAY or error.fatal():
        return LostError(f"no acknowledgement came ({error.name()})")
    if code in _TOO_LARGE:
        return RejectedError(f"it is too large for the topic {topic} or its broker ({error.name()})")
    if code in _MISSING:
        return _no_topic(topic)
    if code in _DENIED:
        return _denied(topic)
    return DeliveryError(f"the broker refuses it ({error.name()})")
