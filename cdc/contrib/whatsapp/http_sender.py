"""A messenger behind HTTP: each message is a POST of ``{"chat_id": ..., "text": ...}`` with an ``Idempotency-Key``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from urllib.parse import urlsplit

import aiohttp

import cdc
from cdc.contrib.whatsapp.sender import Outgoing

_TIMEOUT_S = 20.0
_RETRY_AFTER_MAX_S = 3600.0
_LATER = (408, 425, 429)
"""Answers below 500 that are about the moment. With any other the same request would get the same answer again."""

_open: dict[aiohttp.ClientSession, AsyncGenerator[aiohttp.ClientSession]] = {}
"""The generator that closes each session. A loop holds its generators weakly, and cannot close a collected one."""


class SendError(Exception):
    """The message was not accepted. The text contains neither the message nor the URL."""


class HttpSender:
    """``token`` is sent as a bearer token. One pool of connections, closed when the event loop is.

    Raises CdcError for an invalid URL, or one with a password in it.
    """

    def __init__(self, url: str, token: str | None = None, *, timeout_s: float = _TIMEOUT_S) -> None:
        _check(url)
        self._url = url
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._session: aiohttp.ClientSession | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def send(self, message: Outgoing, key: str) -> None:
        """Raises SendError; Retry where the messenger names a time; Reject where it never accepts the message."""
        session = await self._open()
        headers = {**self._headers, "Idempotency-Key": key}
        try:
            # A redirect may turn a POST into a GET, and would send the token to another host.
            async with session.post(
                self._url, json=message.model_dump(), headers=headers, allow_redirects=False
            ) as response:
                status, wait = response.status, response.headers.get("Retry-After", "")
        except TimeoutError:
            raise SendError("the messenger did not answer in time") from None
        except aiohttp.ClientError as error:
            raise SendError(f"the messenger cannot be reached: {type(error).__name__}") from None
        if 200 <= status < 300:
            return
        if status in (429, 503) and wait.isdecimal():
            after = min(float(wait), _RETRY_AFTER_MAX_S)
            raise cdc.Retry(after, f"the messenger answered {status} and asks to wait {wait} s")
        if status < 500 and status not in _LATER:
            raise cdc.Reject(f"the messenger will not have the message: it answered {status}")
        raise SendError(f"the messenger answered {status}")

    async def _open(self) -> aiohttp.ClientSession:
        loop = asyncio.get_running_loop()
        if self._session is None or self._loop is not loop:
            # The first step of the generator does not suspend, so no other task can run in between.
            self._loop, sessions = loop, _until_the_loop_ends(self._timeout)
            self._session = await anext(sessions)
            _open[self._session] = sessions
        return self._session


async def _until_the_loop_ends(time_limit: aiohttp.ClientTimeout) -> AsyncGenerator[aiohttp.ClientSession]:
    """One session; a loop closes the generators that were started on it, and this one closes the session."""
    async with aiohttp.ClientSession(timeout=time_limit) as session:
        try:
            yield session
        finally:
            del _open[session]


def _check(url: str) -> None:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), 0
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise cdc.CdcError("the messenger's URL is not valid", hint="sender_url: http://host:port/path, or https")
    if parts.username is not None:
        raise cdc.CdcError("the messenger's URL has a user in it", hint="a secret belongs into sender_token")
