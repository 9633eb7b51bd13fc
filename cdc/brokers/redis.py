"""Redis Streams: entries that XADD appends, many in one pipeline.

Theory
------
The commands of a round are one write, and their replies one wait. A reply is the acknowledgement; with the option
``wait=N`` it counts once N replicas have it, by one WAIT at the end of the pipeline. Redis keeps no ids of messages: an
entry that was written while its reply was lost is written again, with the same ``id`` in it.

    a reply                               acknowledged
    OOM, MISCONF, READONLY, LOADING, ...  away: the server takes nothing at the moment
    NOPERM, WRONGTYPE, any other          again later
    fewer replicas than ``wait``          away, for all of the round
    the connection is lost, no reply      away, for all of the round
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any
from zlib import crc32

from redis import exceptions
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.credentials import CredentialProvider

from cdc.brokers import tls
from cdc.brokers.acks import Result
from cdc.brokers.sender import CONNECT_S, Login, first_reached
from cdc.core.broker_messages import Message
from cdc.core.broker_url import BrokerTarget
from cdc.core.deliveries import AwayError, DeliveryError, LostError, UnreachedError
from cdc.runtime.deadline import deadline

_SERVER = (
    exceptions.OutOfMemoryError, exceptions.ReadOnlyError, exceptions.MasterDownError, exceptions.ClusterDownError,
)  # fmt: skip
_SERVER_CODES = {"MISCONF", "NOREPLICAS", "BUSY"}
"""Errors that are about the server and not about a message; for these the client has no class but their code, which
is the first word."""
_WAIT_MS = 2_000
"""For replicas. What they have not confirmed by then is sent again."""


class _Credentials(CredentialProvider):
    """Asked at each connection."""

    def __init__(self, login: Login) -> None:
        self._login = login

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        password = self._login.password() or ""
        return (password,) if self._login.user is None else (self._login.user, password)

    async def get_credentials_async(self) -> tuple[str] | tuple[str, str]:
        return self.get_credentials()


class RedisSender:
    def __init__(self, target: BrokerTarget, login: Login) -> None:
        self._target = target
        self._login = login
        self._client: Redis | None = None
        self._partitions = target.number("partitions") or 1
        self._maxlen = target.number("maxlen")
        self._replicas = target.number("wait") or 0

    @property
    def connected(self) -> bool:
        return self._client is not None

    async def connect(self) -> None:
        await self.close()
        self._client = await first_reached(self._target.servers, self._connection)

    async def _connection(self, server: str) -> Redis:
        host, _, port = server.rpartition(":")
        tls.context(self._target)  # names the file that cannot be read
        options = self._target.options
        secure: dict[str, Any] = {"ssl": self._target.tls}
        if self._target.tls:
            secure |= {"ssl_ca_certs": options.get("ca"), "ssl_certfile": options.get("cert"),
                       "ssl_keyfile": options.get("key")}  # fmt: skip
        given = self._login.user is not None or self._login.password() is not None
        client = Redis(
            host=host.strip("[]"), port=int(port), db=int(self._target.places[0]), client_name="cdc",
            credential_provider=_Credentials(self._login) if given else None,
            socket_connect_timeout=CONNECT_S, socket_timeout=None, socket_keepalive=True,
            retry=Retry(NoBackoff(), 0), **secure,
        )  # fmt: skip
        async with contextlib.AsyncExitStack() as unless_connected:
            unless_connected.push_async_callback(_closed, client)
            try:
                async with deadline(CONNECT_S):
                    await _ping(client)
            except (exceptions.RedisError, OSError) as error:
                raise self._unreached(error) from error
            unless_connected.pop_all()
        return client

    def _unreached(self, error: BaseException) -> UnreachedError:
        if isinstance(error, exceptions.NoPermissionError):
            return UnreachedError(
                f"{self._target}: the login lacks a right to begin with: +client|setname, and +select for another"
                " database than 0"
            )
        if isinstance(error, exceptions.AuthenticationError):
            return UnreachedError(f"{self._target} refuses the login")
        cause = error if isinstance(error, OSError) else error.__cause__ or error.__context__ or error
        return UnreachedError(f"the broker at {self._target} cannot be reached ({tls.why(cause)})")

    async def send(self, messages: Sequence[Message], timeout_s: float) -> list[Result]:
        client = self._client
        assert client is not None
        try:
            async with deadline(timeout_s):
                replies = await self._replies(client, messages)
        except (exceptions.RedisError, OSError) as error:
            summary = f"the connection to the broker broke before its reply came ({type(error).__name__})"
            if isinstance(error, TimeoutError):
                summary = f"no reply came within {timeout_s:g} s"
            if client is self._client:
                self._client = None
            return [LostError(summary)] * len(messages)
        finally:
            if client is not self._client:  # one that was given up connects again for whoever still uses it
                await _closed(client)
        confirmed = replies.pop() if self._replicas else 0
        if isinstance(confirmed, exceptions.NoPermissionError):
            return [_no_wait()] * len(messages)
        if self._replicas and not _confirmed(confirmed, self._replicas):
            return [AwayError(f"fewer than {self._replicas} replicas have confirmed it")] * len(messages)
        return [_meaning(reply) if isinstance(reply, Exception) else None for reply in replies]

    async def _replies(self, client: Redis, messages: Sequence[Message]) -> list[Any]:
        """The client's ``xadd`` and its encoding of texts take longer than the rest of what it does for an entry."""
        pipeline: Any = client.pipeline(transaction=False)  # the library does not say what its execute_command takes
        limit = (b"MAXLEN", b"~", self._maxlen) if self._maxlen else ()
        for message in messages:
            fields = [text.encode() for pair in message.headers.items() for text in pair]
            stream = self._stream(message).encode()
            pipeline.execute_command(b"XADD", stream, *limit, b"*", *fields, b"event", message.body)
        if self._replicas:
            pipeline.execute_command("WAIT", self._replicas, _WAIT_MS)
        return list(await pipeline.execute(raise_on_error=False))

    def _stream(self, message: Message) -> str:
        if self._partitions == 1:
            return message.name
        return f"{message.name}:{crc32(message.key.encode()) % self._partitions}"

    async def describe(self, name: str) -> str:
        assert self._client is not None
        streams = [name] if self._partitions == 1 else [f"{name}:{each}" for each in range(self._partitions)]
        try:
            found = await self._looked(self._client, name, streams)
            if self._replicas:
                await self._client.wait(0, 1)
        except exceptions.NoPermissionError:
            raise _no_wait() from None
        except (exceptions.RedisError, OSError) as error:
            raise DeliveryError(f"the stream {name} cannot be looked at ({type(error).__name__})") from error
        for stream in streams:
            await self._check_right(self._client, stream)
        return found

    async def _looked(self, client: Redis, name: str, streams: Sequence[str]) -> str:
        try:
            kinds = {await client.type(stream) for stream in streams}
            if kinds - {b"stream", b"none"}:
                raise DeliveryError(f"{name} is there, and is no stream")
            lengths = [await client.xlen(stream) for stream in streams]
        except exceptions.NoPermissionError:
            return f"the login may append to {name}; what is there: not known, the login may not ask (TYPE, XLEN)"
        there = "" if b"stream" in kinds else ", which the first entry makes"
        limit = f"about the last {self._maxlen} stay" if self._maxlen else "nothing limits its length (maxlen)"
        return f"{name} is a stream of {sum(lengths)} entries{there}; {limit}"

    @staticmethod
    async def _check_right(client: Redis, stream: str) -> None:
        """By an entry that no stream takes, since its number is 0-0: the right and the memory are looked at before.

        Raises DeliveryError where an entry would be refused.
        """
        append: Any = client.execute_command  # the library does not say what it takes
        try:
            await append(b"XADD", stream.encode(), b"NOMKSTREAM", b"0-0", b"event", b"")
        except exceptions.ResponseError as error:
            meant = _meaning(error)
            if not isinstance(meant, DeliveryError) or isinstance(error, exceptions.NoPermissionError):
                raise DeliveryError(str(meant), hint=getattr(meant, "hint", "")) from None
        except (exceptions.RedisError, OSError) as error:
            raise DeliveryError(f"the stream {stream} cannot be looked at ({type(error).__name__})") from error

    async def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await _closed(client)


async def _ping(client: Redis) -> None:
    """Raises NoPermissionError where the login may not begin; the right to PING itself is not needed."""
    pool: Any = client.connection_pool  # the library does not say what it takes, nor what execute_command does
    await pool.release(await pool.get_connection())
    ping: Any = client.execute_command
    with contextlib.suppress(exceptions.NoPermissionError):
        await ping("PING")


async def _closed(client: Redis) -> None:
    with contextlib.suppress(exceptions.RedisError, OSError):
        await client.aclose()


def _no_wait() -> DeliveryError:
    hint = "ACL SETUSER NAME +wait"
    return DeliveryError("the login has no right to wait for replicas, as the option wait does", hint=hint)


def _confirmed(found: object, replicas: int) -> bool:
    return isinstance(found, int) and found >= replicas


def _meaning(reply: Exception) -> Exception:
    """What an error in place of a reply says about its message. A code has no content of the row."""
    code = str(reply).partition(" ")[0]
    if isinstance(reply, _SERVER) or code in _SERVER_CODES:
        why = type(reply).__name__ if isinstance(reply, _SERVER) else code
        return AwayError(f"the server takes nothing ({why})")
    if isinstance(reply, exceptions.NoPermissionError):
        return DeliveryError("the login has no right to append to the stream", hint="ACL SETUSER NAME +xadd ~STREAM")
    return DeliveryError(f"the server refuses it ({code if code.isupper() else type(reply).__name__})", str(reply))
