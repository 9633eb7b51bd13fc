"""Changes delivered over HTTP, to an application that is slow, broken, away, or somebody else's idea of a server."""

from __future__ import annotations

import asyncio
import base64
import json
import random
import shutil
import ssl
import subprocess
from collections import Counter, defaultdict
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest
from aiohttp import web
from standardwebhooks import Webhook, WebhookVerificationError

from cdc.app.application import App
from cdc.contrib.demo.temp_server import free_port
from cdc.postgres import tracking
from tests.eventually import eventually, eventually_async
from tests.fix_application import Application, Request, accept, answers, listening, never
from tests.fix_consumer import Process, consuming, metric, settled, states

_QUICK: dict[str, Any] = {"backoff_base": 0.01, "backoff_cap": 0.05}
_SECRET = "whsec_" + base64.b64encode(b"a" * 32).decode()
_OTHER_SECRET = "whsec_" + base64.b64encode(b"b" * 32).decode()


def _publish(db: psycopg.Connection, count: int, keys: int = 1, entity_type: str = "x") -> None:
    db.execute(
        "SELECT publish_change(%s, 'k' || n %% %s, 'INSERT', jsonb_build_object('n', n))"
        " FROM generate_series(1, %s) AS n",
        [entity_type, keys, count],
    )


async def _all_settled(db: psycopg.Connection) -> None:
    async def check() -> bool:
        return settled(db)

    await eventually_async(check, what="every change processed or dead")


async def _true(condition: Any, what: str = "") -> None:
    async def check() -> bool:
        return bool(condition())

    await eventually_async(check, what=what)


def _attempts(db: psycopg.Connection) -> dict[int, int]:
    return dict(db.execute("SELECT seq, error_count FROM entity_changes WHERE error_count > 0").fetchall())


def _last_error(db: psycopg.Connection) -> str:
    [(found,)] = db.execute("SELECT last_error FROM entity_changes WHERE last_error IS NOT NULL").fetchall()
    return str(found)


async def test_a_change_is_posted_as_a_cloudevent(outbox: str, outbox_db: psycopg.Connection) -> None:
    outbox_db.execute("CREATE TABLE orders (id int PRIMARY KEY, total numeric)")
    tracking.track(outbox_db, "public", "orders", entity_type="order")
    outbox_db.execute("INSERT INTO orders VALUES (1, 12.5)")
    outbox_db.execute("UPDATE orders SET total = 15")
    async with listening() as (application, url), consuming(outbox, None, deliver_to=url):
        await _all_settled(outbox_db)
    insert, update = application.requests
    assert insert.path == "/changes"
    assert insert.headers["Content-Type"] == "application/cloudevents+json"
    [event] = update.events
    identity, seq = outbox_db.execute("SELECT id, seq FROM entity_changes ORDER BY seq DESC LIMIT 1").fetchone() or ()
    assert event["specversion"] == "1.0"
    assert event["id"] == update.headers["webhook-id"] == str(identity)
    assert (event["source"], event["type"], event["subject"]) == (
        "/schemas/public/tables/orders",
        "cdc.order.update",
        "1",
    )
    assert (event["partitionkey"], int(event["sequence"]), event["attempt"]) == ("order/1", seq, 1)
    assert event["data"]["old"] == {"id": 1, "total": 12.5}
    assert event["data"]["new"] == {"id": 1, "total": 15}
    assert "webhook-signature" not in update.headers, "there is no secret"
    assert states(outbox_db) == {"processed": 2}


@pytest.mark.parametrize("batch", [1, 10])
async def test_what_is_sent_is_signed_and_anybody_elses_reading_of_the_specification_finds_it_genuine(
    batch: int, outbox: str, outbox_db: psycopg.Connection
) -> None:
    _publish(outbox_db, 20, 5)
    signed: dict[str, Any] = {"deliver_batch": batch, "deliver_secret": _SECRET}
    async with listening() as (application, url), consuming(outbox, None, deliver_to=url, **signed):
        await _all_settled(outbox_db)
    for request in application.requests:
        assert Webhook(_SECRET).verify(request.body, dict(request.headers)) == json.loads(request.body)
        with pytest.raises(WebhookVerificationError):
            Webhook(_SECRET).verify(request.body + b" ", dict(request.headers))


async def test_while_a_secret_is_replaced_both_are_good(outbox: str, outbox_db: psycopg.Connection) -> None:
    _publish(outbox_db, 1)
    secrets: dict[str, Any] = {"deliver_secret": _OTHER_SECRET, "deliver_previous_secret": _SECRET}
    async with listening() as (application, url), consuming(outbox, None, deliver_to=url, **secrets):
        await _all_settled(outbox_db)
    [request] = application.requests
    for secret in (_SECRET, _OTHER_SECRET):
        Webhook(secret).verify(request.body, dict(request.headers))


async def test_the_changes_of_a_key_arrive_one_at_a_time_in_their_order_on_connections_that_are_kept(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    running: Counter[str] = Counter()
    arrived: dict[str, list[str]] = defaultdict(list)
    dice = random.Random(7)

    async def answer(request: Request) -> web.StreamResponse:
        [event] = request.events
        key = event["subject"]
        running[key] += 1
        assert running[key] == 1
        arrived[key].append(event["sequence"])
        await asyncio.wait([asyncio.create_task(asyncio.Event().wait())], timeout=dice.random() / 200)
        running[key] -= 1
        return web.Response(status=204)

    _publish(outbox_db, 400, 20)
    async with listening(answer) as (application, url), consuming(outbox, None, deliver_to=url, concurrency=10):
        await _all_settled(outbox_db)
    assert _attempts(outbox_db) == {}
    assert {len(sequences) for sequences in arrived.values()} == {20}
    assert all(sequences == sorted(sequences) for sequences in arrived.values())
    assert application.connections <= 10


async def test_only_the_types_asked_for_are_delivered(outbox: str, outbox_db: psycopg.Connection) -> None:
    _publish(outbox_db, 3, entity_type="wanted")
    _publish(outbox_db, 3, entity_type="other")
    async with listening() as (application, url):
        async with consuming(outbox, None, deliver_to=url, deliver_types=("wanted", "wanted", "third")) as app:

            async def settled() -> bool:
                left = "SELECT entity_type, count(*) FROM entity_changes WHERE NOT processed GROUP BY 1"
                return outbox_db.execute(left).fetchall() == [("other", 3)]

            await eventually_async(settled, what="all of the type are delivered, and those of others left")
        assert metric(app.metrics.registry, "cdc_changes_handled_total", outcome="skipped") == 0
    assert {event["data"]["entity_type"] for event in application.events} == {"wanted"}


@pytest.mark.parametrize("status", [302, 307, 401, 403, 404, 408, 425, 429, 500, 501, 599])
async def test_an_answer_that_says_not_now_is_another_attempt(
    status: int, outbox: str, outbox_db: psycopg.Connection
) -> None:
    _publish(outbox_db, 1)
    async with listening(answers(status, 204)) as (application, url):
        async with consuming(outbox, None, deliver_to=url, **_QUICK) as app:
            await _all_settled(outbox_db)
        assert metric(app.metrics.registry, "cdc_handler_errors_total", kind="exception") == 1
    assert states(outbox_db) == {"processed": 1}
    first, second = application.requests
    assert first.headers["webhook-id"] == second.headers["webhook-id"], "what the application tells them apart by"
    assert [event["attempt"] for event in application.events] == [1, 2]


@pytest.mark.parametrize("batch", [1, 10])
@pytest.mark.parametrize("status", [502, 503, 504])
async def test_an_answer_in_place_of_the_application_is_no_attempt(
    status: int, batch: int, outbox: str, outbox_db: psycopg.Connection
) -> None:
    _publish(outbox_db, 40, 20)
    async with listening(answers(*[status] * 8, 204)) as (application, url):
        async with consuming(
            outbox, None, deliver_to=url, deliver_batch=batch, max_attempts=1, concurrency=5, **_QUICK
        ) as app:
            await _all_settled(outbox_db)
        assert metric(app.metrics.registry, "cdc_handler_errors_total") == 0
        assert metric(app.metrics.registry, "cdc_changes_handled_total", outcome="unavailable") >= 8
    assert states(outbox_db) == {"processed": 40}
    assert _attempts(outbox_db) == {}
    assert {event["attempt"] for event in application.events} == {1}
    taken = [event for request in application.requests[8:] for event in request.events]
    by_key = defaultdict(list)
    for event in taken:
        by_key[event["subject"]].append(event["sequence"])
    assert all(sequences == sorted(sequences) for sequences in by_key.values())


@pytest.mark.parametrize("batch", [1, 10])
@pytest.mark.parametrize("kind", ["seconds", "date"])
async def test_retry_after_is_honoured(batch: int, kind: str, outbox: str, outbox_db: psycopg.Connection) -> None:
    _publish(outbox_db, 5, 5)
    after = "1800" if kind == "seconds" else format_datetime(datetime.now(UTC) + timedelta(seconds=1800), usegmt=True)
    busy = listening(answers(503, Retry_After=after))
    async with busy as (application, url), consuming(outbox, None, deliver_to=url, deliver_batch=batch):
        await _true(lambda: states(outbox_db) == {"waiting": 5})
    assert len(application.requests) <= 5
    waits = outbox_db.execute(
        "SELECT extract(epoch FROM next_attempt_at - clock_timestamp())::float8, last_error FROM entity_changes"
    ).fetchall()
    assert all(1700 < wait <= 1800 for wait, _ in waits), waits
    assert {error for _, error in waits} == {"answered 503 Service Unavailable: said the application"}


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (410, "rejected: answered 410 Gone: said the application"),
        (400, "rejected: answered 400 Bad Request: said the application"),
        (413, "rejected: answered 413 "),
        (415, "rejected: answered 415 Unsupported Media Type: said the application"),
        (422, "rejected: answered 422 "),
    ],
)
async def test_an_answer_that_says_never_is_a_dead_letter_at_once(
    status: int, told: str, outbox: str, outbox_db: psycopg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    _publish(outbox_db, 1)
    async with listening(answers(status, Location="/elsewhere?token=hunter")) as (application, url):
        async with consuming(outbox, None, deliver_to=url) as app:
            await _all_settled(outbox_db)
        assert metric(app.metrics.registry, "cdc_handler_errors_total", kind="rejected") == 1
        assert metric(app.metrics.registry, "cdc_delivery_requests_total", result=f"{status // 100}xx") == 1
    assert len(application.requests) == 1
    assert states(outbox_db) == {"dead": 1}
    assert _attempts(outbox_db) == {1: 1}
    assert _last_error(outbox_db).startswith(told)
    assert f"answered {status}" in caplog.text
    assert "said the application" not in caplog.text, "what the application says may quote the row"
    assert "hunter" not in caplog.text + _last_error(outbox_db)


async def test_no_answer_in_time_is_another_attempt_and_counts_as_a_timeout(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    _publish(outbox_db, 1)
    async with (
        listening(never) as (_, url),
        consuming(outbox, None, deliver_to=url, timeout=0.3, max_attempts=1) as app,
    ):
        await _all_settled(outbox_db)
        assert metric(app.metrics.registry, "cdc_handler_errors_total", kind="timeout") == 1
    assert _last_error(outbox_db) == "took longer than 0.3 s"


async def _breaks_off(request: Request) -> web.StreamResponse:
    request.connection.transport.abort()  # type: ignore[attr-defined]  # aiohttp's protocol
    return web.Response()


async def test_a_connection_that_breaks_before_the_answer_is_no_attempt(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    _publish(outbox_db, 40, 20)
    async with (
        listening(_breaks_off) as (application, url),
        consuming(outbox, None, deliver_to=url, max_attempts=1, concurrency=5, **_QUICK),
    ):
        await _true(lambda: len(application.requests) > 7)
        application.answer = accept
        await _all_settled(outbox_db)
    assert states(outbox_db) == {"processed": 40}
    assert _attempts(outbox_db) == {}


@pytest.mark.parametrize("batch", [1, 10])
async def test_a_change_that_breaks_its_connection_while_others_are_answered_is_to_blame_in_the_end(
    batch: int, outbox: str, outbox_db: psycopg.Connection
) -> None:
    async def answer(request: Request) -> web.StreamResponse:
        if any(event["data"]["new"]["n"] == 7 for event in request.events):
            return await _breaks_off(request)
        return web.Response(status=204)

    _publish(outbox_db, 30, 30)

    async def given_up() -> bool:
        outbox_db.execute("SELECT publish_change('x', 'other', 'INSERT', '{\"n\": 0}')")
        return states(outbox_db).get("dead") == 1

    async with (
        listening(answer) as (_, url),
        consuming(outbox, None, deliver_to=url, deliver_batch=batch, max_attempts=1, **_QUICK),
    ):
        await eventually_async(given_up, what="it is given up")
        await _all_settled(outbox_db)
    assert _attempts(outbox_db) == {7: 1}
    [(text,)] = outbox_db.execute("SELECT last_error FROM entity_changes WHERE seq = 7").fetchall()
    assert text.startswith("the connection broke before an answer came (")


async def test_a_handshake_that_breaks_or_never_ends_is_an_application_that_cannot_be_reached(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    breaks = True

    async def shake(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not breaks:
            await reader.read()  # until the other end gives up
        writer.transport.abort()
        await asyncio.gather(writer.wait_closed(), return_exceptions=True)

    _publish(outbox_db, 1)
    server = await asyncio.start_server(shake, "127.0.0.1", 0)
    url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
    async with server, consuming(outbox, None, deliver_to=url, timeout=0.4, max_attempts=1) as app:
        await _true(lambda: _unreached(app) >= 3)
        breaks = False
        await _true(lambda: "no answer to the attempt to connect" in app.status.breakers["deliver"].why)
    assert states(outbox_db) == {"fresh": 1}


# --- the application is away ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_a_socket", [False, True])
async def test_an_application_that_is_still_starting_costs_patience_and_no_attempt(
    on_a_socket: bool, tmp_path: Path, outbox: str, outbox_db: psycopg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    port, path = free_port(), tmp_path / "app.sock"
    url = f"unix://{path}:/changes?a=b" if on_a_socket else f"http://127.0.0.1:{port}/changes?a=b"
    why = "No such file or directory" if on_a_socket else "Connection refused"
    application = Application()
    _publish(outbox_db, 30, 30)
    # The limits are for an attempt, and there is none: neither is reached.
    async with consuming(outbox, None, deliver_to=url, timeout=0.2, max_attempts=1, concurrency=5) as app:
        await _true(lambda: _unreached(app) > 8)
        assert states(outbox_db) == {"fresh": 30}
        assert metric(app.metrics.registry, "cdc_delivery_up") == 0
        away = f"the application at {url.removesuffix('?a=b')} cannot be reached ({why})"
        assert [str(check) for check in app.readiness() if not check.ok] == [f"fail application {away}"]
        await application.start(0 if on_a_socket else port, path if on_a_socket else None)
        await _all_settled(outbox_db)
        assert metric(app.metrics.registry, "cdc_delivery_up") == 1
        assert all(check.ok for check in app.readiness())
    await application.stop()
    assert _attempts(outbox_db) == {}
    assert states(outbox_db) == {"processed": 30}
    assert {request.path for request in application.requests} == {"/changes?a=b"}
    assert {event["attempt"] for event in application.events} == {1}
    told = [record.getMessage() for record in caplog.records if record.name == "cdc.handlers"]
    [rests] = [line for line in told if "cannot be reached" in line]
    assert rests.startswith(f"handler deliver rests: {away}; its changes wait as they are")
    assert len([line for line in told if line.startswith("handler deliver works again, after ")]) == 1


def _unreached(app: App) -> float:
    return metric(app.metrics.registry, "cdc_delivery_requests_total", result="unreached")


async def test_while_the_application_is_away_one_call_at_a_time_looks_for_it(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    _publish(outbox_db, 200, 200)
    url = f"http://127.0.0.1:{free_port()}/"
    async with consuming(outbox, None, deliver_to=url) as app:
        await _true(lambda: _unreached(app) >= 1)
        assert app.status.breakers["deliver"].rests
        before = _unreached(app)
        await _true(lambda: _unreached(app) >= before + 3)
        assert app.status.consumer.running <= 1
        assert metric(app.metrics.registry, "cdc_handler_breaker", handler="deliver", state="closed") == 0
    assert states(outbox_db) == {"fresh": 200}


async def test_all_go_on_as_soon_as_a_connection_is_made_and_not_only_when_one_is_answered(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    port, all_there = free_port(), asyncio.Event()

    async def together(_request: Request) -> web.StreamResponse:
        await all_there.wait()
        return web.Response(status=204)

    application = Application(together)
    _publish(outbox_db, 60, 60)
    async with consuming(outbox, None, deliver_to=f"http://127.0.0.1:{port}/") as app:
        await _true(lambda: _unreached(app) > 3)
        await application.start(port)
        await _true(lambda: len(application.requests) == 60, "no call waits for the answer to another")
        all_there.set()
        await _all_settled(outbox_db)
    await application.stop()
    assert _attempts(outbox_db) == {}


async def test_an_application_that_restarts_in_the_middle_gets_everything(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    port, application = free_port(), Application()
    await application.start(port)
    _publish(outbox_db, 600, 50)
    async with consuming(outbox, None, deliver_to=f"http://127.0.0.1:{port}/", max_attempts=9, concurrency=5, **_QUICK):
        for n in (50, 200, 400):
            await _true(lambda n=n: len(application.requests) >= n)
            await application.stop()
            await application.start(port)
        await _all_settled(outbox_db)
    await application.stop()
    assert states(outbox_db) == {"processed": 600}
    first: dict[str, str] = {}
    for event in application.events:
        first.setdefault(event["id"], event["sequence"])
    by_key = defaultdict(list)
    for event in application.events:
        by_key[event["subject"]].append(event["sequence"])
    assert len(first) == 600
    assert all(sequences == sorted(sequences) for sequences in by_key.values()), "again, but never out of order"


def test_a_stop_does_not_wait_for_an_application_that_is_away(
    tmp_path: Path, outbox: str, outbox_db: psycopg.Connection, processes: list[Process]
) -> None:
    _publish(outbox_db, 20, 20)
    url = f"http://127.0.0.1:{free_port()}/changes?token=hunter"
    process = Process(outbox, tmp_path / "log", deliver_to=url, drain_time=600)
    processes.append(process)
    process.wait_for("cannot be reached (Connection refused)")
    eventually(lambda: "cdc.listener listening" in process.log, what="at work")
    assert process.terminate() == 0
    assert states(outbox_db) == {"fresh": 20}
    assert _attempts(outbox_db) == {}
    assert "hunter" not in process.log


# --- answers that are somebody's idea of a joke --------------------------------------------------------------------


async def test_a_huge_answer_is_cut_and_one_without_an_end_is_not_waited_for(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    async def huge(request: Request) -> web.StreamResponse:
        status = 400 if request.events[0]["data"]["new"]["n"] == 1 else 200
        return web.Response(status=status, body=b"no \xff\x00 " * 1_000_000)

    _publish(outbox_db, 2, 2)
    async with listening(huge) as (_, url), consuming(outbox, None, deliver_to=url):
        await _all_settled(outbox_db)
    assert states(outbox_db) == {"processed": 1, "dead": 1}
    assert _last_error(outbox_db).startswith("rejected: answered 400 Bad Request: no \ufffd\\0 no")
    assert len(_last_error(outbox_db)) < 2_000


async def test_a_change_is_done_at_the_status_whatever_becomes_of_the_body(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    async def breaks(request: Request) -> web.StreamResponse:
        headers = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nthere is more"
        request.connection.transport.write(headers)  # type: ignore[attr-defined]  # aiohttp's protocol
        request.connection.transport.close()  # type: ignore[attr-defined]  # as above
        return web.Response()

    _publish(outbox_db, 1)
    async with listening(breaks) as (_, url), consuming(outbox, None, deliver_to=url):
        await _all_settled(outbox_db)
    assert states(outbox_db) == {"processed": 1}
    assert _attempts(outbox_db) == {}


# --- batches -------------------------------------------------------------------------------------------------------


async def test_a_batch_is_one_request(outbox: str, outbox_db: psycopg.Connection) -> None:
    _publish(outbox_db, 100, 10)
    async with listening() as (application, url), consuming(outbox, None, deliver_to=url, deliver_batch=25):
        await _all_settled(outbox_db)
    assert states(outbox_db) == {"processed": 100}
    assert max(len(request.events) for request in application.requests) == 25
    assert {request.headers["Content-Type"] for request in application.requests} == {
        "application/cloudevents-batch+json"
    }
    assert sorted(event["data"]["new"]["n"] for event in application.events) == list(range(1, 101))


@pytest.mark.parametrize("status", [400, 413, 500])
async def test_of_a_batch_that_is_refused_only_the_change_that_is_to_blame_is_dead(
    status: int, outbox: str, outbox_db: psycopg.Connection
) -> None:
    async def answer(request: Request) -> web.StreamResponse:
        return web.Response(status=status if any(e["data"]["new"]["n"] == 7 for e in request.events) else 204)

    _publish(outbox_db, 30, 30)
    async with (
        listening(answer) as (application, url),
        consuming(outbox, None, deliver_to=url, deliver_batch=30, max_attempts=3, **_QUICK),
    ):
        await _all_settled(outbox_db)
    assert states(outbox_db) == {"processed": 29, "dead": 1}
    assert _attempts(outbox_db) == {7: 3 if status == 500 else 1}
    assert all(isinstance(json.loads(request.body), list) for request in application.requests), "also of one"


async def test_a_batch_that_is_answered_not_now_is_sent_again_as_one(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    _publish(outbox_db, 20, 20)
    batches: dict[str, Any] = {"deliver_batch": 20, "deliver_linger": 0.3}
    busy = listening(answers(503, 204))
    async with busy as (application, url), consuming(outbox, None, deliver_to=url, **batches, **_QUICK):
        await _all_settled(outbox_db)
    assert states(outbox_db) == {"processed": 20}
    assert _attempts(outbox_db) == {}
    assert len(application.requests[0].events) == 20
    assert len(application.requests) < 20, "nobody was to blame, and nobody was asked alone"


# --- who may not be ------------------------------------------------------------------------------------------------


async def test_a_certificate_that_cannot_be_trusted_is_an_application_that_cannot_be_reached(
    tmp_path: Path, outbox: str, outbox_db: psycopg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("no program openssl to make a certificate with")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", tmp_path / "key", "-out", tmp_path / "crt"],
        check=True, capture_output=True,
    )  # fmt: skip
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(tmp_path / "crt", tmp_path / "key")
    application = Application()
    port = await application.start(tls=tls)
    _publish(outbox_db, 1)
    async with consuming(outbox, None, deliver_to=f"https://127.0.0.1:{port}/") as app:
        await _true(lambda: _unreached(app) > 2)
    await application.stop()
    assert "cannot be reached (its certificate: self-signed certificate)" in caplog.text
    assert states(outbox_db) == {"fresh": 1}
    assert application.requests == []
