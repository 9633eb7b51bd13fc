"""The channel ``entity_change``: wake-ups for consumers that do not stream. Any role may notify.

A payload of ours is the outbox's message prefix and then pairs ``seq,shard``:

    entity_change:public 49,27 50,3

A payload for another outbox of the database is ignored. The JSON that the documented trigger sends for each row says
that one row was captured and nothing else has changed: look for it soon. Any other payload (a function's after it has
requeued changes, an empty one) names no changes: it means "sweep now". Any role that can connect may notify, so only a
payload that fits exactly is trusted to name a change.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import re
from collections.abc import Callable, Iterable, Sequence

import psycopg

from cdc.core.errors import CdcError
from cdc.core.model import PAIR, WakeUp, message_prefix, pair
from cdc.core.reconnect import ReconnectState
from cdc.postgres.connect import Dsn, connect_async
from cdc.postgres.link import unlimited
from cdc.runtime.deadline import deadline

log = logging.getLogger("cdc.listener")

CHANNEL = "entity_change"
PAYLOAD_BYTES_MAX = 7999
"""PostgreSQL refuses a NOTIFY payload of 8000 bytes."""

_PAIRS = re.compile(f"(?: {PAIR})+")
_ONE = re.compile(PAIR)
_SOME_OUTBOX = re.compile(rf"entity_change:[A-Za-z0-9_%]+{_PAIRS.pattern}")
_POLL_S = 15.0
"""Between two queries to the server: a listener receives nothing on a quiet database, and nothing on a dead link."""
_ANSWER_LIMIT_S = 10.0
_RELAY_MAX = 20_000


def encode(prefix: str, wakeups: Iterable[WakeUp]) -> list[str]:
    """The fewest payloads that hold them, in order."""
    payloads: list[str] = []
    payload = prefix
    for seq, shard in wakeups:
        piece = f" {seq},{shard}"
        # All of it is ASCII: characters are bytes.
        if len(payload) + len(piece) > PAYLOAD_BYTES_MAX:
            payloads.append(payload)
            payload = prefix
        payload += piece
    return [*payloads, payload] if payload != prefix else payloads


def decode(prefix: str, payload: str) -> list[WakeUp] | None:
    """The wake-ups of a payload; [] if it is for another outbox; None: it names no change, sweep now."""
    name, _, _ = payload.partition(" ")
    if name != prefix:
        return [] if _SOME_OUTBOX.fullmatch(payload) else None
    if not _PAIRS.fullmatch(payload, len(name)):
        return None
    found = [pair(seq, shard) for seq, shard in _ONE.findall(payload, len(name))]
    wakeups = [wakeup for wakeup in found if wakeup is not None]
    return wakeups if len(wakeups) == len(found) else None


def is_documented(payload: str) -> bool:
    """Whether it is the documented trigger's payload: table, operation and entity type of one captured row."""
    if not payload.startswith("{"):
        return False
    try:
        decoded = json.loads(payload)
    except (ValueError, RecursionError):
        return False
    return isinstance(decoded, dict) and decoded.keys() == {"table", "operation", "entity_type"}


class Listener:
    """LISTEN on a connection of its own. ``await run()`` until it is cancelled; it recovers by itself and never raises.

    ``received`` is called in the event loop with the wake-ups of a payload, or with None: sweep now. None
    follows each (re)connection, because earlier notifications are lost. ``captured`` is called for what the documented
    trigger sends.
    """

    def __init__(
        self,
        dsn: Dsn,
        schema: str,
        received: Callable[[list[WakeUp] | None], None],
        *,
        captured: Callable[[], None] | None = None,
        application_name: str = "cdc: listener",
        poll_s: float = _POLL_S,
    ) -> None:
        self._dsn = dsn
        self._prefix = message_prefix(schema)
        self._received = received
        self._captured = captured or (lambda: received(None))
        self._application_name = application_name
        self._poll_s = poll_s
        self._attempts = ReconnectState(stall_limit_base_s=poll_s)
        self._again = asyncio.Event()
        self._said: str | None = None
        self.connected = False

    def retry_now(self) -> None:
        """End a pause between two attempts: another connection has just reached the server."""
        self._again.set()

    async def run(self) -> None:
        while True:
            began = asyncio.get_running_loop().time()
            try:
                await self._listen()
            except (CdcError, psycopg.Error, TimeoutError, UnicodeError) as error:
                self._say(error)
            finally:
                self.connected = False
            talked_s = asyncio.get_running_loop().time() - began
            self._attempts = self._attempts.after(stalled=False, advanced=False, talked_s=talked_s)
            await self._pause()

    async def _pause(self) -> None:
        self._again.clear()
        pause_s = self._attempts.pause_s(random.random(), permanent=False, standby=False)  # noqa: S311 - jitter
        with contextlib.suppress(TimeoutError):
            async with deadline(pause_s):
                await self._again.wait()

    async def _listen(self) -> None:
        connection = await connect_async(
            self._dsn, application_name=self._application_name, answer_limit_s=_ANSWER_LIMIT_S
        )
        try:
            await connection.execute("LISTEN entity_change")
            log.info("listening on %s", CHANNEL)
            self.connected, self._said = True, None
            self._received(None)
            while True:
                with unlimited(connection):
                    async for notify in connection.notifies(timeout=self._poll_s):
                        self._hear(notify.payload)
                await connection.execute("SELECT")
        finally:
            await connection.close()

    def _hear(self, payload: str) -> None:
        if is_documented(payload):
            self._captured()
            return
        wakeups = decode(self._prefix, payload)
        if wakeups is None or wakeups:
            self._received(wakeups)

    def _say(self, error: Exception) -> None:
        """Log each kind of failure once, not each attempt. A driver's text may quote anything, so it is left out."""
        kind = type(error).__name__
        if kind != self._said:
            what = str(error) if isinstance(error, CdcError) else f"the connection ended ({kind})"
            hint = getattr(error, "hint", "") or "it is tried again"
            log.warning("not listening on %s: %s; %s", CHANNEL, what, hint)
        self._said = kind


class Relay:
    """Sends wake-ups to the consumers that do not stream.

    ``offer`` on the event loop, ``await run()`` until it is cancelled.

    One NOTIFY carries all that has gathered, in a transaction that does nothing else: it is not flushed, so it holds
    NOTIFY's lock of the whole cluster only briefly. Wake-ups that could not be sent become one "sweep now".
    """

    def __init__(self, dsn: Dsn, schema: str, sent: Callable[[int], None]) -> None:
        self._dsn = dsn
        self._prefix = message_prefix(schema)
        self._sent = sent
        self._waiting: list[WakeUp] = []
        self._lost = False
        self._due = asyncio.Event()
        self._attempts = ReconnectState(stall_limit_base_s=_POLL_S)

    def offer(self, wakeups: Sequence[WakeUp]) -> None:
        if not wakeups:
            return
        if len(self._waiting) + len(wakeups) > _RELAY_MAX:
            self._waiting.clear()
            self.missed()
        else:
            self._waiting += wakeups
        self._due.set()

    def missed(self) -> None:
        """Wake-ups were lost before they came here: notify the others to sweep."""
        self._lost = True
        self._due.set()

    async def run(self) -> None:
        while True:
            began = asyncio.get_running_loop().time()
            await self._due.wait()  # a connection is opened only when there is a wake-up to relay
            try:
                await self._send_all()
            except (CdcError, psycopg.Error, UnicodeError) as error:
                log.warning("cannot relay wake-ups: %s; other consumers find their changes by sweeping",
                            error if isinstance(error, CdcError) else type(error).__name__)  # fmt: skip
                self._lost = True
            except Exception:
                self._lost = True
                raise
            talked_s = asyncio.get_running_loop().time() - began
            self._attempts = self._attempts.after(stalled=False, advanced=False, talked_s=talked_s)
            pause_s = self._attempts.pause_s(random.random(), permanent=False, standby=False)  # noqa: S311 - jitter
            with contextlib.suppress(TimeoutError):
                async with deadline(pause_s):
                    await asyncio.Event().wait()

    async def _send_all(self) -> None:
        connection = await connect_async(self._dsn, application_name="cdc: relay", answer_limit_s=_ANSWER_LIMIT_S)
        try:
            while True:
                await self._due.wait()
                self._due.clear()
                waiting, self._waiting = self._waiting, []
                payloads = encode(self._prefix, waiting) + ([""] if self._lost else [])
                # An array as text: payloads need no escaping in it. The driver would examine each for its type.
                texts = f"""{{{",".join(f'"{payload}"' for payload in payloads)}}}"""
                await connection.execute("SELECT pg_notify(%s, p) FROM unnest(%s::text[]) AS p", [CHANNEL, texts])
                self._lost = False
                self._sent(len(payloads))
        finally:
            await connection.close()
