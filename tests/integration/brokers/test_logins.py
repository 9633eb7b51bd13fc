"""Logins that a broker itself checks: SCRAM and tokens by Kafka, a file of credentials by NATS."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from pathlib import Path
from typing import Any

import nats
import psycopg
import pytest
from prometheus_client import generate_latest

from cdc.app import config, delivery
from cdc.app.secret_file import SecretFile
from tests import nats_credentials
from tests.eventually import eventually_async
from tests.fix_brokers import BrokerServer, KafkaServer, NatsServer
from tests.fix_consumer import consuming, settled, states


def _publish(db: psycopg.Connection) -> None:
    db.execute("SELECT publish_change('x', 'k' || n, 'INSERT', '{}') FROM generate_series(1, 20) AS n")


async def _true(condition: Any, what: str) -> None:
    async def check() -> bool:
        return bool(condition())

    await eventually_async(check, what=what)


def _token(lives_s: float) -> str:
    """Without a signature, which this server takes."""
    claims = {"sub": "app", "iat": time.time(), "exp": time.time() + lives_s}
    parts = [
        base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode() for part in ({"alg": "none"}, claims)
    ]
    return f"{'.'.join(parts)}."


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"])
async def test_kafka_logs_in_by_each_mechanism_and_a_replaced_password_is_used(
    mechanism: str, kafka_server: KafkaServer, outbox: str, outbox_db: psycopg.Connection, tmp_path: Path
) -> None:
    await kafka_server.prepare()
    _publish(outbox_db)
    password = tmp_path / "password"
    password.write_text("wrong")
    url = f"{kafka_server.url(port=kafka_server.login_port)}?sasl={mechanism}"
    login: dict[str, Any] = {"deliver_user": "app", "deliver_password": SecretFile(str(password), "X")}
    async with consuming(outbox, None, deliver_to=url, max_attempts=1, **login) as app:
        await _true(lambda: "refuses the login" in app.status.breakers["deliver"].why, "the login is refused")
        password.write_text("hunter")
        await _true(lambda: settled(outbox_db), "all are delivered")
    assert states(outbox_db) == {"processed": 20}
    assert len(await kafka_server.received()) == 20


async def test_kafka_takes_a_token_and_refuses_one_that_is_over(
    kafka_server: KafkaServer, outbox: str, outbox_db: psycopg.Connection, tmp_path: Path
) -> None:
    await kafka_server.prepare()
    _publish(outbox_db)
    token = tmp_path / "token"
    token.write_text(_token(-60))
    url = f"{kafka_server.url(port=kafka_server.login_port)}?sasl=OAUTHBEARER"
    password = SecretFile(str(token), "X")
    async with consuming(outbox, None, deliver_to=url, max_attempts=1, deliver_password=password) as app:
        await _true(lambda: "refuses the login" in app.status.breakers["deliver"].why, "the token is refused")
        token.write_text(_token(600))
        await _true(lambda: settled(outbox_db), "all are delivered")
    assert states(outbox_db) == {"processed": 20}


async def test_nats_takes_a_file_of_credentials_and_refuses_others(
    nats_server: NatsServer, outbox: str, outbox_db: psycopg.Connection, tmp_path: Path
) -> None:
    (tmp_path / "others").mkdir()
    settings, ours = nats_credentials.write(tmp_path)
    _, theirs = nats_credentials.write(tmp_path / "others")
    await asyncio.to_thread(nats_server.restart, "--config", str(settings))
    async with await nats.connect(f"nats://{nats_server.address}", user_credentials=str(ours)) as client:
        await client.jetstream().add_stream(name="CDC", subjects=["cdc.>"])
    _publish(outbox_db)
    async with consuming(outbox, None, deliver_to=f"{nats_server.url()}?creds={theirs}", max_attempts=1) as app:
        await _true(lambda: "refuses the login" in app.status.breakers["deliver"].why, "the login is refused")
    missing = f"{nats_server.url()}?creds={tmp_path}/missing"
    async with consuming(outbox, None, deliver_to=missing, max_attempts=1) as app:
        await _true(lambda: "cannot be reached (No such file" in app.status.breakers["deliver"].why, "no file")
    async with consuming(outbox, None, deliver_to=f"{nats_server.url()}?creds={ours}", max_attempts=1):
        await _true(lambda: settled(outbox_db), "all are delivered")
    assert states(outbox_db) == {"processed": 20}


async def test_no_output_has_the_password_that_a_broker_refuses(
    broker: BrokerServer, outbox: str, outbox_db: psycopg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    secret = "hunter-a-secret"
    await broker.prepare()
    await broker.let_in("careful", "another")
    login: dict[str, Any] = {"deliver_user": "careful", "deliver_password": secret}
    url = broker.login_url()
    _publish(outbox_db)
    with caplog.at_level("DEBUG", logger="cdc"):
        async with consuming(outbox, None, deliver_to=url, max_attempts=1, **login) as app:
            await _true(lambda: "refuses the login" in app.status.breakers["deliver"].why, "the login is refused")
            said = [app.status.breakers["deliver"].why, generate_latest(app.metrics.registry).decode()]
        settings = config.from_options({"deliver_to": url, "deliver_types": ("x",), **login})
        said.append(str(await asyncio.to_thread(delivery.examine, settings)))
    errors = outbox_db.execute("SELECT last_error FROM entity_changes WHERE last_error IS NOT NULL").fetchall()
    said += [caplog.text, str(errors), repr(settings)]
    assert [text for text in said if secret in text] == []
    assert states(outbox_db) == {"fresh": 20}
