"""What is said about a broker before a change comes: by ``cdc smoke``, and when ``cdc run`` starts."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import nats
import psycopg
import pytest
from click.testing import CliRunner, Result
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # it has them, and does not say so
    AclBinding,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
)
from redis.asyncio import Redis

import cdc
from cdc import sinks
from cdc.app import config, delivery
from cdc.cli import cdc as command
from cdc.diagnostics.findings import Finding, Severity
from cdc.testing import change as make_change
from tests.eventually import eventually_async
from tests.fix_brokers import BrokerServer, KafkaServer, NatsServer, RabbitServer, RedisServer
from tests.fix_consumer import consuming, settled, states


def _smoke(*arguments: str) -> Result:
    return CliRunner().invoke(command, ["smoke", *arguments])


def test_a_smoke_test_sends_one_event_and_says_where_it_went(broker: BrokerServer) -> None:
    asyncio.run(broker.prepare())
    name = broker.url().rpartition("/")[2].format(type="order")
    said = _smoke("--deliver-to", broker.url(), "--type", "order")
    assert said.exit_code == 0, said.output
    assert f" {name}\n" in said.output
    assert "is reached: " in said.output
    sent = _smoke("--deliver-to", broker.url(), "--type", "order", "--json")
    assert sent.exit_code == 0, sent.output
    assert json.loads(sent.output)["name"] == name
    first, second = asyncio.run(broker.received())
    assert second.event["id"] == json.loads(sent.output)["event_id"]
    assert (first.event["type"], first.event["subject"]) == ("cdc.order.insert", "cdc-smoke")
    assert first.event["data"]["metadata"] == {"test": True}


def test_a_smoke_test_that_does_not_reach_the_broker_fails_with_the_reason(broker: BrokerServer) -> None:
    asyncio.run(broker.prepare())
    broker.kill()
    said = _smoke("--deliver-to", broker.url(), "--type", "order")
    assert said.exit_code == 1
    assert f"cannot be reached ({broker.refused})" in said.output


def test_a_smoke_test_to_what_is_not_there_fails_with_the_reason(broker: BrokerServer) -> None:
    asyncio.run(broker.prepare())
    if broker.scheme == "redis":
        pytest.skip("its first entry makes a stream")
    asyncio.run(broker.remove())
    said = _smoke("--deliver-to", broker.url(), "--type", "order")
    assert said.exit_code == 1
    assert "create" in said.output or "declare" in said.output, said.output


async def test_the_doctor_looks_at_what_an_insert_would_go_to_and_says_where_the_name_is_not_known(
    nats_server: NatsServer,
) -> None:
    found = await asyncio.to_thread(_found, nats_server.url("cdc.{type}.{operation}"))
    assert (found.severity, found.detail.partition(": ")[0]) == (
        Severity.FAIL, "no stream of JetStream takes the subject cdc.x.insert",
    )  # fmt: skip
    found = await asyncio.to_thread(_found, nats_server.url("cdc.{schema}.{type}"))
    assert found.severity is Severity.OK
    assert found.detail.endswith("its subject depends on the change, and was not looked at: cdc smoke tries one")
    found = await asyncio.to_thread(partial(_found, nats_server.url(), deliver_types=None))
    assert found.detail.endswith("its subject depends on the change, and was not looked at: name types with --type")


@pytest.mark.parametrize("arguments", [(), ("--deliver-to", "http://127.0.0.1:1/")], ids=["nothing", "http"])
def test_a_smoke_test_without_a_broker_is_a_usage_error(arguments: tuple[str, ...]) -> None:
    said = _smoke(*arguments)
    assert said.exit_code == 2
    assert "no broker is named" in said.output


async def test_what_is_missing_in_a_broker_is_said_at_the_start_before_a_change_comes(
    broker: BrokerServer, outbox: str, caplog: pytest.LogCaptureFixture
) -> None:
    await broker.prepare()
    if broker.scheme == "redis":
        pytest.skip("its first entry makes a stream")
    await broker.remove()

    async def said() -> bool:
        return any(each.levelname == "WARNING" and "or correct deliver.to" in each.message for each in caplog.records)

    async with consuming(outbox, None, deliver_to=broker.url(), deliver_types=("order",)):
        await eventually_async(said, what="what is missing is said")


async def test_a_broker_that_is_away_at_the_start_is_waited_for_and_then_looked_at(
    nats_server: NatsServer, outbox: str, caplog: pytest.LogCaptureFixture
) -> None:
    await nats_server.prepare()
    nats_server.kill()

    async def says(text: str) -> None:
        async def check() -> bool:
            return text in caplog.text

        await eventually_async(check, what=text)

    with caplog.at_level("INFO"):
        async with consuming(outbox, None, deliver_to=nats_server.url(), deliver_types=("order",)):
            await says("cannot be reached (Connection refused); it is waited for")
            await asyncio.to_thread(nats_server.start)
            await says("cdc.order goes into the stream CDC of 0 messages")
    assert caplog.text.count("it is waited for") == 1


_APP: dict[str, Any] = {"deliver_user": "app", "deliver_password": "hunter"}


def _found(url: str, **settings: Any) -> Finding:
    found = delivery.examine(config.from_options({"deliver_to": url, "deliver_types": ("x",), **settings}))
    assert found is not None
    return found


@pytest.fixture
def kafka_with_rights(kafka: KafkaServer, tmp_path: Path) -> Iterator[KafkaServer]:
    """``kafka`` skips where there is none. In this one ``app`` has no rights until it is given some."""
    server = KafkaServer(tmp_path, {
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "super.users": "User:ANONYMOUS",
    })  # fmt: skip
    server.start()
    try:
        yield server
    finally:
        server.end()


async def _allow(server: KafkaServer, operation: AclOperation) -> None:
    topic = server.url().rpartition("/")[2].format(type="x")
    right = AclBinding(
        ResourceType.TOPIC, topic, ResourcePatternType.LITERAL, "User:app", "*", operation, AclPermissionType.ALLOW
    )
    admin = AdminClient({"bootstrap.servers": server.address})
    [given] = admin.create_acls([right]).values()
    await asyncio.to_thread(given.result, 30)


async def test_the_doctor_says_what_a_topic_keeps_and_whether_the_login_may_write(
    kafka_with_rights: KafkaServer,
) -> None:
    await kafka_with_rights.prepare(["x"], **{"retention.ms": "86400000"})
    found = await asyncio.to_thread(_found, kafka_with_rights.url())
    assert found.severity is Severity.OK
    assert found.detail.endswith("replicas: 1, in sync at least: 1, delete after: 1 days")
    await _allow(kafka_with_rights, AclOperation.READ)
    url = kafka_with_rights.url(port=kafka_with_rights.login_port)
    found = await asyncio.to_thread(partial(_found, url, **_APP))
    assert found.severity is Severity.FAIL
    assert found.detail.startswith("the login has no right to write to the topic ")
    assert found.remedy.startswith("kafka-acls.sh --add")


async def test_a_login_of_kafka_without_rights_has_changes_wait_until_it_is_given_them(
    kafka_with_rights: KafkaServer, outbox: str, outbox_db: psycopg.Connection
) -> None:
    """It may not even begin as an idempotent producer, which ends it before anything is sent."""
    await kafka_with_rights.prepare(["x"])
    await _allow(kafka_with_rights, AclOperation.DESCRIBE)
    outbox_db.execute("SELECT publish_change('x', 'k' || n, 'INSERT', '{}') FROM generate_series(1, 3) AS n")
    url = kafka_with_rights.url(port=kafka_with_rights.login_port)

    async def rests() -> bool:
        return app.status.breakers["deliver"].rests

    async def done() -> bool:
        return settled(outbox_db)

    async with consuming(outbox, None, deliver_to=url, max_attempts=1, **_APP) as app:
        await eventually_async(rests, what="it rests", within_s=60.0)
        assert "the producer has ended (CLUSTER_AUTHORIZATION_FAILED)" in app.status.breakers["deliver"].why
        await _allow(kafka_with_rights, AclOperation.WRITE)
        await eventually_async(done, what="every change is processed or dead", within_s=60.0)
    assert states(outbox_db) == {"processed": 3}


async def test_the_doctor_says_what_a_stream_of_nats_keeps(nats_server: NatsServer) -> None:
    await nats_server.prepare(max_msgs=500, max_age=3600)
    assert (await asyncio.to_thread(_found, nats_server.url())).detail.endswith(
        "keeps: 500 messages, 3600 seconds, and then drops the oldest"
    )
    await nats_server.change(max_msgs=500, discard="new")
    assert (await asyncio.to_thread(_found, nats_server.url())).detail.endswith(
        "keeps: 500 messages, and then refuses more"
    )


_USERS_OF_NATS = """
authorization { users = [
  {user: all, password: hunter},
  {user: writer, password: hunter, permissions: {publish: ["cdc.>"], subscribe: "_INBOX.>"}},
  {user: names, password: hunter, permissions: {publish: ["cdc.>", "$JS.API.STREAM.NAMES"], subscribe: "_INBOX.>"}},
  {user: other, password: hunter, permissions: {publish: {allow: [">"], deny: ["cdc.x"]}}},
  {user: stranger, password: hunter, permissions: {publish: ["elsewhere.>"]}},
  {user: unanswered, password: hunter, permissions: {publish: [">"], subscribe: "cdc.>"}},
] }
"""


@pytest.fixture
def nats_with_rights(nats_server: NatsServer, tmp_path: Path) -> NatsServer:
    """Who says nothing is ``all``, the test itself."""
    users = tmp_path / "users.conf"
    users.write_text(f"{_USERS_OF_NATS}no_auth_user: all\n")
    nats_server.restart("--config", str(users))
    return nats_server


@pytest.mark.parametrize(
    ("user", "severity", "detail"),
    [
        ("all", Severity.OK, r"cdc\.x goes into the stream CDC of 0 messages, .* keeps: all$"),
        ("writer", Severity.OK, r"the login may publish to cdc\.x; its stream: not known, the login may not ask"),
        ("names", Severity.OK, r"cdc\.x goes into the stream CDC; what it keeps: not known, the login may not ask"),
        ("other", Severity.FAIL, r"^the login has no right to publish to the subject cdc\.x$"),
        (
            "unanswered",
            Severity.FAIL,
            r"^the login has no right to subscribe to _INBOX\.>, where acknowledgements come$",
        ),
    ],
)
async def test_the_doctor_says_whether_a_login_of_nats_may_publish_and_sends_nothing_to_anybody(
    user: str, severity: Severity, detail: str, nats_with_rights: NatsServer
) -> None:
    await nats_with_rights.prepare()
    async with await nats.connect(f"nats://{nats_with_rights.address}") as client:
        seen = await client.subscribe("cdc.>")
        await client.flush()
        login = {"deliver_user": user, "deliver_password": "hunter"}
        found = await asyncio.to_thread(partial(_found, nats_with_rights.url(), **login))
        await client.flush()
        assert seen.pending_msgs == 0
    assert (found.severity, bool(re.search(detail, found.detail))) == (severity, True), found.detail
    assert ("the permissions of the login" in found.remedy) == (severity is Severity.FAIL)
    assert await nats_with_rights.received() == []


async def test_a_login_of_nats_to_which_no_answer_comes_makes_dead_letters_that_say_so(
    nats_with_rights: NatsServer, outbox: str, outbox_db: psycopg.Connection
) -> None:
    await nats_with_rights.prepare()
    outbox_db.execute("SELECT publish_change('x', 'k' || n, 'INSERT', '{}') FROM generate_series(1, 3) AS n")
    login: dict[str, Any] = {"deliver_user": "unanswered", "deliver_password": "hunter"}

    async def done() -> bool:
        return settled(outbox_db)

    async with consuming(outbox, None, deliver_to=nats_with_rights.url(), max_attempts=1, **login):
        await eventually_async(done, what="every change is processed or dead")
    [[error]] = outbox_db.execute("SELECT DISTINCT last_error FROM entity_changes").fetchall()
    assert error == "the login has no right to subscribe to _INBOX.>, where acknowledgements come"


@pytest.mark.parametrize(
    "entity_type",
    ["plain", 'q"uote', "back\\slash", "a\\u0041", "\u200djoined", "\u00ad", "\U000e0001", "\ufeffX", "İ"],
)
async def test_a_subject_that_the_server_of_nats_writes_in_its_own_way_is_refused_as_others_are(
    entity_type: str, nats_with_rights: NatsServer
) -> None:
    """It quotes the subject as Go does, and its client makes small letters of that."""
    async with sinks.nats(nats_with_rights.url(), user="stranger", password="hunter", timeout=5) as sink:
        with pytest.raises(cdc.Retry, match=r"the login has no right to publish to the subject cdc\."):
            await sink.send(make_change(entity_type))
    named = {"deliver_types": (entity_type,), "deliver_user": "stranger", "deliver_password": "hunter"}
    settings = config.from_options({"deliver_to": nats_with_rights.url(), **named})
    found = await asyncio.to_thread(delivery.examine, settings)
    assert found is not None
    assert (found.severity, "has no right to publish" in found.detail) == (Severity.FAIL, True)


@pytest.mark.parametrize(
    ("limits", "severity", "detail"),
    [
        ({"no_ack": True}, Severity.FAIL, "the stream CDC acknowledges nothing (no_ack)"),
        ({"retention": "interest"}, Severity.OK, "keeps: what a consumer of it waits for, and nothing where there is"),
        (
            {"retention": "workqueue", "max_msgs": 9, "discard": "new"},
            Severity.OK,
            "keeps: 9 messages, until a consumer",
        ),
    ],
)
async def test_the_doctor_says_what_a_stream_of_nats_does_with_what_it_gets(
    limits: dict[str, Any], severity: Severity, detail: str, nats_server: NatsServer
) -> None:
    await nats_server.prepare(**limits)
    found = await asyncio.to_thread(_found, nats_server.url())
    assert found.severity is severity
    assert detail in found.detail


@pytest.mark.parametrize(
    ("rights", "severity"),
    [
        ([("set_permissions", "{user}", "", "^{exchange}$", "")], Severity.OK),
        ([("set_permissions", "{user}", ".*", "", ".*")], Severity.FAIL),
        (
            [
                ("set_permissions", "{user}", "", ".*", ""),
                ("set_topic_permissions", "{user}", "{exchange}", "^other$", ".*"),
            ],
            Severity.FAIL,
        ),
        (
            [("set_permissions", "{user}", "", ".*", ""), ("set_user_tags", "{user}", "impersonator")],
            Severity.OK,
        ),
    ],
    ids=["may write", "may not write", "may not write with this key", "may be anybody else"],
)
async def test_the_doctor_says_whether_a_login_of_rabbitmq_may_write_and_no_queue_gets_anything(
    rights: list[tuple[str, ...]], severity: Severity, rabbit_server: RabbitServer
) -> None:
    await rabbit_server.prepare()
    exchange = rabbit_server.url().split("/")[-2]
    given = {"user": f"u-{exchange}", "exchange": exchange}
    await asyncio.to_thread(rabbit_server.control, "add_user", given["user"], "hunter")
    for right in rights:
        await asyncio.to_thread(rabbit_server.control, *(part.format(**given) for part in right))
    login = {"deliver_user": given["user"], "deliver_password": "hunter"}
    found = await asyncio.to_thread(partial(_found, rabbit_server.url(), **login))
    assert found.severity is severity, found.detail
    if severity is Severity.FAIL:
        assert found.detail == "the login has no right to write to the exchange, or with this routing key"
        assert found.remedy.startswith("rabbitmqctl set_permissions")
    else:
        assert "whether a queue takes it, only a message shows" in found.detail
    assert await rabbit_server.received() == []


async def test_the_doctor_looks_at_a_queue_of_rabbitmq_by_its_name(rabbit_server: RabbitServer) -> None:
    await rabbit_server.prepare()
    queue = rabbit_server.url().split("/")[-2]
    found = await asyncio.to_thread(_found, f"amqp://{rabbit_server.address}/%2F//{queue}")
    assert found.severity is Severity.OK
    assert found.detail.endswith(f"{queue} is a queue of 0 messages, with 0 consumers")


_APPENDS = "+xadd +client|setname"
"""What a login of Redis needs."""


@pytest.mark.parametrize(
    ("rights", "options", "severity", "detail"),
    [
        (f"{_APPENDS} +ping +type +xlen", "", Severity.OK, "cdc:x is a stream of 0 entries"),
        (_APPENDS, "", Severity.OK, "the login may append to cdc:x; what is there: not known, the login may not ask"),
        (f"{_APPENDS} +wait", "?wait=1", Severity.OK, "the login may append to cdc:x; what is there: not known"),
        (_APPENDS, "?wait=1", Severity.FAIL, "the login has no right to wait for replicas"),
        ("+xadd", "", Severity.FAIL, "the login lacks a right to begin with: +client|setname"),
    ],
)
async def test_a_login_of_redis_that_may_append_and_no_more_is_enough(
    rights: str, options: str, severity: Severity, detail: str, redis_server: RedisServer
) -> None:
    async with Redis(port=redis_server.port) as client:
        await client.execute_command("ACL", "SETUSER", "writer", "on", ">hunter", "~cdc:*", *rights.split())
    login: dict[str, Any] = {"user": "writer", "password": "hunter"}
    url = f"{redis_server.url()}{options}"
    found = await asyncio.to_thread(partial(_found, url, **{f"deliver_{name}": each for name, each in login.items()}))
    assert (found.severity, detail in found.detail) == (severity, True), found.detail
    assert (found.remedy == "ACL SETUSER NAME +wait") == ("wait" in found.detail)
    async with sinks.redis(url, **login) as sink:
        if options:  # there is no replica, which is an outage, and no fault of the login
            with pytest.raises(cdc.Unavailable if severity is Severity.OK else cdc.Retry):
                await sink.send(make_change("x"))
        elif severity is Severity.OK:
            await sink.send(make_change("x"))


async def test_the_doctor_says_whether_redis_would_take_an_entry_and_writes_none(redis_server: RedisServer) -> None:
    assert (await asyncio.to_thread(_found, redis_server.url())).severity is Severity.OK
    async with Redis(port=redis_server.port) as client:
        await client.execute_command("ACL", "SETUSER", "reader", "on", ">hunter", "~*", "+@read", "+@connection")
    login = {"deliver_user": "reader", "deliver_password": "hunter"}
    found = await asyncio.to_thread(partial(_found, redis_server.url(), **login))
    assert (found.severity, found.detail) == (Severity.FAIL, "the login has no right to append to the stream")
    assert found.remedy == "ACL SETUSER NAME +xadd ~STREAM"
    async with Redis(port=redis_server.port) as client:
        await client.execute_command(*found.remedy.replace("NAME", "reader").replace("~STREAM", "~*").split())
    found = await asyncio.to_thread(partial(_found, redis_server.url(), **login))
    assert found.severity is Severity.OK
    await redis_server.fill()
    found = await asyncio.to_thread(_found, redis_server.url())
    assert (found.severity, found.detail) == (Severity.FAIL, "the server takes nothing (OutOfMemoryError)")
    await redis_server.make_room()
    assert await redis_server.received() == []
