"""The Compose files of the brokers, with the broker of a test in the place of theirs."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import Any

import yaml

from tests.fix_brokers import BrokerServer, RabbitServer
from tests.fix_consumer import ROOT

DEPLOY = ROOT / "deploy"
BROKERS = {"kafka": "kafka", "nats": "nats", "redis": "redis", "amqp": "rabbitmq"}
"""The scheme of a URL, and what its file and its service are called."""

Service = Mapping[str, Any]


def services(broker: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DEPLOY / f"compose/{broker}.yaml").read_text())["services"]
    return found


def service(role: str, broker: BrokerServer) -> Service:
    """``role``: prepare, setup, to or from."""
    name = BROKERS[broker.scheme]
    found: Service = services(name)[f"{role}-{name}"]
    return found


def environment(of: Service, broker: BrokerServer) -> dict[str, str]:
    place = re.compile(rf"\b{BROKERS[broker.scheme]}:\d+")
    return {name: place.sub(broker.address, str(value)) for name, value in of.get("environment", {}).items()}


def command(reader: Service) -> list[str]:
    """Of one that runs Python, outside a container: its files are mounted into /app."""
    mounted = {there: DEPLOY / here for here, there, _ in (volume.split(":") for volume in reader["volumes"])}
    return [sys.executable, *(str(mounted.get(part, part)) for part in (*reader["entrypoint"][1:], *reader["command"]))]


async def add_user(broker: BrokerServer) -> None:
    """Whom RabbitMQ's image makes from its environment."""
    if isinstance(broker, RabbitServer):
        made = services("rabbitmq")["rabbitmq"]["environment"]
        await broker.let_in(made["RABBITMQ_DEFAULT_USER"], made["RABBITMQ_DEFAULT_PASS"])
