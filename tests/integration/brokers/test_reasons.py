"""Why a delivery rests: the reason that the broker gave, whichever way its client tells of it."""

from __future__ import annotations

import asyncio
import gc
import json
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

import cdc
from cdc import sinks
from cdc.brokers import clients
from cdc.brokers.acks import Result
from cdc.brokers.amqp import AmqpSender
from cdc.brokers.nats import NatsSender
from cdc.brokers.sender import Login
from cdc.contrib.demo.temp_server import free_port
from cdc.core import broker_url
from cdc.core.broker_messages import Message
from cdc.core.broker_url import PROTOCOLS
from cdc.core.deliveries import LostError, UnreachedError
from cdc.testing import change as make_change
from tests.eventually import eventually_async
from tests.fix_brokers import NatsServer, RabbitServer
from tests.fix_consumer import consuming, settled, states

_PATHS = {"kafka": "x", "nats": "cdc.x", "redis": "0/cdc:x", "amqp": "%2F/changes/x"}
_INFO = json.dumps({"server_id": "S", "version": "2.9.0", "max_payload": 1_048_576, "headers": True}).encode()


def _messages(count: int, size: int) -> list[Message]:
    return [Message("cdc.x", str(n), "k", b"x" * size, {"content-type": "t"}) for n in range(count)]


async def _true(condition: Any, what: str, within_s: float = 30.0) -> None:
    async def check() -> bool:
        return bool(condition())

    await eventually_async(check, what=what, within_s=within_s)


async def _a_step_of_the_loop() -> None:
    done = asyncio.Event()
    asyncio.get_running_loop().call_soon(done.set)
    await done.wait()


_Played = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def _server_of_nats(played: _Played) -> AsyncIterator[NatsSender]:
    """A server that lets in who comes, and then does as it is told."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"INFO " + _INFO + b"\r\n")
        while await reader.readline() != b"PING\r\n":
            pass
        writer.write(b"PONG\r\n")
        await played(reader, writer)
        writer.transport.abort()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        sender = NatsSender(broker_url.parse(f"nats://127.0.0.1:{port}/cdc.x"), Login())
        await sender.connect()
        try:
            yield sender
        finally:
            await sender.close()


async def test_what_the_server_of_nats_says_before_it_ends_a_connection_is_the_reason() -> None:
    async def refuses(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while not (await reader.readline()).startswith(b"HPUB"):
            pass
        writer.write(b"-ERR 'User Authentication Expired'\r\n")
        await reader.read()

    async with _server_of_nats(refuses) as sender:
        found = await sender.send(_messages(3, 10), 60.0)
    assert {str(each) for each in found} == {
        "the connection to the broker broke before an acknowledgement came (user authentication expired)"
    }


async def test_a_server_of_nats_that_goes_while_the_client_has_something_to_send_is_noticed_and_not_waited_for() -> (
    None
):
    """The client's own end fails there, and calls nobody."""
    gone = asyncio.Event()

    async def waits(_reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await gone.wait()

    async with _server_of_nats(waits) as sender:

        async def one() -> list[Result]:
            return await sender.send(_messages(1, 10), 20.0) if sender.connected else []

        sent = [asyncio.create_task(one())]
        await _a_step_of_the_loop()
        gone.set()
        while sender.connected:  # each step of the loop has something to send
            sent.append(asyncio.create_task(one()))
            await _a_step_of_the_loop()
        results = [each for task in sent for each in await task]
    assert {str(each).partition("(")[0] for each in results} == {
        "the connection to the broker broke before an acknowledgement came "
    }


@pytest.mark.parametrize("offers", [False, True])
async def test_a_server_of_nats_is_told_nothing_without_tls_where_its_url_asks_for_it(offers: bool) -> None:
    """Whoever is on the way could say that there is none."""
    heard = asyncio.get_running_loop().create_future()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"INFO " + json.dumps({**json.loads(_INFO), "tls_available": offers}).encode() + b"\r\n")
        heard.set_result(await reader.read(1))
        writer.transport.abort()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        target = broker_url.parse(f"nats+tls://127.0.0.1:{port}/cdc.x")
        with pytest.raises(UnreachedError) as unreached:
            await NatsSender(target, Login("app", lambda: "hunter")).connect()
        first = await asyncio.wait_for(heard, 30.0)
    handshake = b"\x16"
    assert first == (handshake if offers else b"")
    assert ("it has no TLS" in unreached.value.summary) != offers


@pytest.mark.parametrize("scheme", ["nats", "nats+tls"])
@pytest.mark.parametrize("information", ["[]", "null", "3", "{", "hello"])
async def test_a_server_of_nats_that_says_what_is_no_information_cannot_be_reached(
    information: str, scheme: str
) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(f"INFO {information}\r\n".encode())
        await reader.read()
        writer.transport.abort()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        target = broker_url.parse(f"{scheme}://127.0.0.1:{port}/cdc.x")
        with pytest.raises(UnreachedError, match="cannot be reached"):
            await NatsSender(target, Login()).connect()


@pytest.mark.parametrize("scheme", PROTOCOLS)
async def test_a_key_with_a_passphrase_is_the_reason_and_nobody_is_asked_for_it(
    scheme: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The terminal of the process would be, while the event loop stands still."""
    request = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-days", "1", "-passout", "pass:hunter", "-subj"]
    files = ["/CN=x", "-keyout", str(tmp_path / "key.pem"), "-out", str(tmp_path / "cert.pem")]
    await asyncio.to_thread(subprocess.run, [*request, *files], check=True, capture_output=True)
    options = f"cert={tmp_path}/cert.pem&key={tmp_path}/key.pem"
    target = broker_url.parse(f"{scheme}+tls://127.0.0.1:1/{_PATHS[scheme]}?{options}")
    capfd.readouterr()
    with pytest.raises(UnreachedError, match=r"a certificate for .* cannot be read \(its key has a passphrase\)$"):
        await clients.sender(target, Login()).connect()
    assert "".join(capfd.readouterr()) == ""


async def test_a_message_that_the_client_of_nats_cannot_write_is_rejected_and_is_no_outage(
    nats_server: NatsServer,
) -> None:
    await nats_server.prepare()
    async with sinks.nats(nats_server.url()) as sink:
        with pytest.raises(cdc.Reject, match="its subject or a header cannot be one"):
            await sink.send(make_change("x"), sinks.Payload("x", headers={"a name": "x"}))
        await sink.send(make_change("x"))
    assert len(await nats_server.received()) == 1


@pytest.mark.parametrize(
    "payload",
    [
        sinks.Payload("x", id="i" * 300),
        sinks.Payload("x", content_type="t" * 300),
        sinks.Payload("x", headers={"a": "x" * 200_000}),
        sinks.Payload("x", headers={f"h{n}": "" for n in range(30_000)}),
        sinks.Payload("x", key="k" * 200_000),
    ],
    ids=["id", "content type", "header", "headers", "key"],
)
async def test_a_message_whose_header_rabbitmq_cannot_have_is_rejected_and_takes_no_other_with_it(
    payload: sinks.Payload, rabbit_server: RabbitServer
) -> None:
    await rabbit_server.prepare()
    first, second, third = (make_change("x", entity_id=f"k{n}") for n in range(3))
    async with sinks.amqp(rabbit_server.url("x")) as sink:
        made = {second: payload}
        with pytest.raises(cdc.Failed) as failed:
            await sink.send_batch([first, second, third], lambda each: made.get(each, sinks.Payload("fits")))
        [error] = failed.value.errors.values()
        assert isinstance(error, cdc.Reject)
        await sink.send(third, sinks.Payload("x", headers={"a": "x" * 100_000}))
    assert [each.body for each in await rabbit_server.received()] == [b"fits", b"fits", b"x"]


@pytest.mark.parametrize("host", ["missing", "forbidden"])
async def test_a_virtual_host_of_rabbitmq_that_is_not_there_or_not_ours_is_the_reason(
    host: str, rabbit_server: RabbitServer
) -> None:
    if host == "forbidden":
        await asyncio.to_thread(rabbit_server.control, "add_vhost", host)
    async with sinks.amqp(f"amqp://{rabbit_server.address}/{host}/x/k") as sink:
        with pytest.raises(cdc.Unavailable, match=f"refuses the virtual host {host}$"):
            await sink.send(make_change("x"))


async def test_an_operator_who_closes_the_connections_of_rabbitmq_is_the_reason(rabbit_server: RabbitServer) -> None:
    await rabbit_server.prepare(limits={"x-max-length": 100})
    sender = AmqpSender(broker_url.parse(rabbit_server.url("x")), Login())
    await sender.connect()
    lost: list[str] = []

    async def send_until_lost() -> None:
        messages = [each._replace(name="x") for each in _messages(1_000, 10)]
        while not lost:
            results = await sender.send(messages, 60.0)
            lost.extend(str(each) for each in results if isinstance(each, LostError))

    sending = [asyncio.create_task(send_until_lost()) for _ in range(2)]  # so that something is always under way
    await asyncio.to_thread(rabbit_server.control, "close_all_connections", "maintenance")
    await asyncio.wait_for(asyncio.gather(*sending), 120.0)
    await sender.close()
    assert "the connection to the broker broke before a confirmation came (CONNECTION_FORCED)" in lost


async def test_an_alarm_of_rabbitmq_is_the_reason_why_no_confirmation_comes(
    rabbit_server: RabbitServer, outbox: str, outbox_db: psycopg.Connection
) -> None:
    await rabbit_server.prepare()
    async with consuming(outbox, None, deliver_to=rabbit_server.url(), max_attempts=1, timeout=1) as app:
        await rabbit_server.fill()
        try:
            outbox_db.execute("SELECT publish_change('x', 'k' || n, 'INSERT', '{}') FROM generate_series(1, 100) AS n")
            await _true(lambda: "an alarm" in app.status.breakers["deliver"].why, "it rests, and says why", 120.0)
        finally:
            await rabbit_server.make_room()
        await _true(lambda: settled(outbox_db), "they are delivered", within_s=120.0)
    assert states(outbox_db) == {"processed": 100}


@pytest.mark.parametrize("scheme", sorted(PROTOCOLS))
async def test_a_connection_that_did_not_come_about_leaves_nothing_that_begins_when_its_memory_is_taken_back(
    scheme: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("CRITICAL", logger="aiormq")  # a record would keep it
    sender = clients.sender(broker_url.parse(f"{scheme}://127.0.0.1:{free_port()}/{_PATHS[scheme]}"), Login())
    errors: list[UnreachedError] = []
    try:
        await sender.connect()
    except UnreachedError as error:
        errors.append(error)
    await sender.close()
    assert len(errors) == 1
    errors.clear()
    await asyncio.to_thread(gc.collect)  # on a thread without a loop, as it may be
