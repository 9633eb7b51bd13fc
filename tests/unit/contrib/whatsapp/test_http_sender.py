from __future__ import annotations

import asyncio
import gc
import socket
import sys
import warnings

import pytest

import cdc
from cdc.app.config import from_options
from cdc.contrib.whatsapp import router
from cdc.contrib.whatsapp.http_sender import HttpSender, SendError
from cdc.contrib.whatsapp.sender import Outgoing
from cdc.core.errors import UsageError
from tests.fix_messenger import Messenger, Received

HELLO = Outgoing(chat_id="c-1", text="Hello ✅")


async def test_a_message_is_posted_with_its_key_and_the_token(messenger: Messenger) -> None:
    await HttpSender(messenger.url, "token").send(HELLO, "key-1")
    assert messenger.received == [Received("key-1", "Bearer token", {"chat_id": "c-1", "text": "Hello ✅"})]


@pytest.mark.parametrize("status", [408, 425, 429, 500, 503])
async def test_an_answer_about_the_moment_is_an_error_that_names_the_status_only(
    messenger: Messenger, status: int
) -> None:
    messenger.answers.append((status, {}))
    with pytest.raises(SendError, match=f"^the messenger answered {status}$"):
        await HttpSender(messenger.url).send(HELLO, "key-1")
    assert messenger.received == []


@pytest.mark.parametrize("status", [301, 307, 400, 401, 404, 422])
async def test_any_other_answer_is_the_last_word_and_a_redirect_is_not_followed(
    messenger: Messenger, status: int
) -> None:
    messenger.answers.append((status, {"Location": messenger.url}))
    with pytest.raises(cdc.Reject, match=f"it answered {status}"):
        await HttpSender(messenger.url).send(HELLO, "key-1")
    assert messenger.received == []


@pytest.mark.parametrize(("asked", "waits"), [("7", 7.0), ("999999", 3600.0)])
async def test_a_messenger_that_names_a_time_is_given_it(messenger: Messenger, asked: str, waits: float) -> None:
    messenger.answers.append((429, {"Retry-After": asked}))
    with pytest.raises(cdc.Retry) as later:
        await HttpSender(messenger.url).send(HELLO, "key-1")
    assert later.value.after == waits


async def test_a_messenger_that_is_not_there_is_an_error_without_its_address() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}/x"
        with pytest.raises(SendError, match=r"^the messenger cannot be reached: \w+$"):
            await HttpSender(url).send(HELLO, "key-1")


async def test_a_messenger_that_does_not_answer_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/x"
        with pytest.raises(SendError, match="in time"):
            await HttpSender(url, timeout_s=0.05).send(HELLO, "key-1")


def test_it_lives_through_several_event_loops_and_leaves_no_connection_open(messenger: Messenger) -> None:
    """A session that is not closed would be a ResourceWarning, and those are errors here."""
    sender = HttpSender(messenger.url)
    for key in ("1", "2"):
        asyncio.run(sender.send(HELLO, key))
    assert [each.key for each in messenger.received] == ["1", "2"]


def test_a_sender_that_is_collected_as_its_loop_ends_leaves_no_connection_open(messenger: Messenger) -> None:
    with warnings.catch_warnings(record=True) as left:
        warnings.simplefilter("always")
        with asyncio.Runner() as runner:
            runner.run(HttpSender(messenger.url).send(HELLO, "key-1"))
            gc.collect()
        gc.collect()
    assert left == []


@pytest.mark.parametrize("url", ["", "x", "ftp://h/x", "http://", "http:///x", "http://h:99999/", "http://[::1/"])
def test_a_url_that_is_none_is_refused_at_once(url: str) -> None:
    with pytest.raises(cdc.CdcError, match="is not valid"):
        HttpSender(url)


def test_a_password_in_the_url_is_refused_without_quoting_it() -> None:
    with pytest.raises(cdc.CdcError, match="has a user in it") as refused:
        HttpSender("http://me:hunter@h/x")
    assert "hunter" not in f"{refused.value}{refused.value.hint}"


def test_without_its_library_the_application_does_not_start_and_names_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "cdc.contrib.whatsapp.http_sender")
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(UsageError, match="sent with aiohttp") as refused:
        router(from_options({"whatsapp_sender_url": "http://h/x"}))
    assert refused.value.hint == "pip install 'cdc-consumer[whatsapp]'"
