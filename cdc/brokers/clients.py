"""What sends to the broker of a URL, and how its messages are written. The libraries are extras, loaded when used."""

from __future__ import annotations

from cdc.brokers.sender import BrokerSender, Login
from cdc.core.broker_messages import Encoding
from cdc.core.broker_url import DEBEZIUM, BrokerTarget
from cdc.core.debezium import DebeziumEncoding
from cdc.core.errors import UsageError


def sender(target: BrokerTarget, login: Login) -> BrokerSender:
    """Raises UsageError where the library of the extra is not installed."""
    try:
        if target.scheme == "nats":
            from cdc.brokers.nats import NatsSender  # noqa: PLC0415 - its library is an extra

            return NatsSender(target, login)
        if target.scheme == "amqp":
            from cdc.brokers.amqp import AmqpSender  # noqa: PLC0415 - its library is an extra

            return AmqpSender(target, login)
        if target.scheme == "kafka":
            from cdc.brokers.kafka import KafkaSender  # noqa: PLC0415 - its library is an extra

            return KafkaSender(target, login)
        from cdc.brokers.redis import RedisSender  # noqa: PLC0415 - its library is an extra

        return RedisSender(target, login)
    except ModuleNotFoundError as missing:
        protocol = target.protocol
        if (missing.name or "").partition(".")[0] != protocol.library:
            raise
        raise UsageError(
            f"delivering to {target.scheme} needs {protocol.library}",
            hint=f"pip install 'cdc-consumer[{protocol.extra}]'",
        ) from None


def encoding(target: BrokerTarget, mode: str, source: str | None) -> Encoding | DebeziumEncoding:
    """``mode`` is one of the formats of the target's protocol. ``source``: of the events; of Debezium's, a name."""
    if mode == DEBEZIUM:
        return DebeziumEncoding(source)
    separator = "_" if target.scheme == "kafka" else "-"
    return Encoding(mode, source, separator=separator, percent=target.scheme == "nats")
