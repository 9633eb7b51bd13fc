"""``deliver.to`` -> what delivers: to an application over HTTP, or to a broker. Their libraries are extras."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

from cdc.app.config import DeliverSection, Settings
from cdc.core import broker_url
from cdc.core.broker_url import BrokerTarget
from cdc.core.deliveries import AwayError, DeliveryError, RejectedError, UnreachedError
from cdc.core.errors import CdcError, Failed, UsageError
from cdc.core.model import Change, Operation
from cdc.core.name_template import NameFunction
from cdc.diagnostics.findings import Finding, fail, ok
from cdc.http import endpoint_url

if TYPE_CHECKING:
    from cdc.brokers.delivery import BrokerDelivery
    from cdc.brokers.publisher import Publisher
    from cdc.brokers.sender import BrokerSender
    from cdc.http.delivery import Delivery

_REACHABLE = "start the broker, or correct deliver.to, deliver.user and deliver.password"
SMOKE = "cdc-smoke"
"""Type, key and table of a test event, unless a type is given."""


def make(settings: Settings, name_of: NameFunction | None = None) -> Delivery | BrokerDelivery | None:
    """On the event loop; None without deliver.to. ``name_of``: before the template of a broker's URL.

    Raises UsageError where the library of the extra is not installed, or there is no broker for ``name_of``.
    """
    to = settings.deliver.to
    if to is not None and broker_url.is_broker(to):
        return _to_broker(settings, broker_url.parse(to), name_of)
    if name_of is not None:
        raise UsageError("deliver_name names what a broker has", hint="deliver_to=URL of a broker, or no deliver_name")
    return None if to is None else _over_http(settings, to)


def _over_http(settings: Settings, to: str) -> Delivery:
    try:
        from cdc.http.delivery import Delivery  # noqa: PLC0415 - its library is an extra
    except ModuleNotFoundError as missing:
        if missing.name != "aiohttp":
            raise
        raise UsageError("delivering over HTTP needs aiohttp", hint="pip install 'cdc-consumer[http]'") from None
    deliver = settings.deliver
    return Delivery(
        endpoint_url.parse(to),
        types=deliver.types or (),
        batch=deliver.batch or 1,
        linger_s=deliver.linger,
        source=deliver.source,
        keys=deliver.keys,
        timeout_s=settings.timeout_s,
    )


def _to_broker(settings: Settings, target: BrokerTarget, name_of: NameFunction | None) -> BrokerDelivery:
    from cdc.brokers import clients  # noqa: PLC0415 - only what delivers to a broker loads it
    from cdc.brokers.delivery import BrokerDelivery  # noqa: PLC0415 - see above

    deliver = settings.deliver
    return BrokerDelivery(
        _sender(target, deliver),
        target.names(name_of),
        clients.encoding(target, deliver.format, deliver.source),
        target=str(target),
        types=deliver.types or (),
        batch=deliver.batch,
        linger_s=deliver.linger,
        timeout_s=settings.timeout_s,
    )


def _publisher(settings: Settings, target: BrokerTarget) -> Publisher:
    from cdc.brokers.publisher import Publisher  # noqa: PLC0415 - see above

    return Publisher(_sender(target, settings.deliver), target=str(target), timeout_s=settings.timeout_s)


def _sender(target: BrokerTarget, deliver: DeliverSection) -> BrokerSender:
    from cdc.brokers import clients  # noqa: PLC0415 - see above
    from cdc.brokers.sender import Login  # noqa: PLC0415 - see above

    return clients.sender(target, Login(deliver.user, deliver.current_password))


def examine(settings: Settings) -> Finding | None:
    """What ``cdc doctor`` finds out about the broker; None where nothing is delivered to one."""
    to = settings.deliver.to
    if to is None or not broker_url.is_broker(to):
        return None
    target, types = broker_url.parse(to), settings.deliver.types or ()
    names = target.names().all_known(types)
    try:
        said = asyncio.run(_look(_publisher(settings, target), names))
    except UsageError as error:
        return fail(str(error), error.hint)
    except UnreachedError as error:
        return fail(error.summary, _REACHABLE)
    except DeliveryError as error:
        return fail(error.summary, error.hint or "correct deliver.to, or the broker")
    if not names:
        more = "cdc smoke tries one" if types else "name types with --type"
        said = [f"its {target.protocol.rules.kind} depends on the change, and was not looked at: {more}"]
    return ok("; ".join((f"{target} is reached", *said)))


async def _look(publisher: Publisher, names: list[str]) -> list[str]:
    try:
        return await publisher.look(names)
    finally:
        await publisher.close()


@dataclass(frozen=True, slots=True)
class TestEvent:
    """A test event that a broker has acknowledged. ``behind``: what stands behind the ``name`` that it went to."""

    target: str
    kind: str
    name: str
    behind: str
    id: UUID
    took_s: float


def smoke(settings: Settings) -> TestEvent:
    """Send one test event, without a database, as an INSERT of the first of deliver.types would be sent.

    Raises UsageError where deliver.to names no broker, CdcError where the event is not acknowledged.
    """
    to = settings.deliver.to
    if to is None or not broker_url.is_broker(to):
        raise UsageError("no broker is named", hint="--deliver-to URL, such as nats://127.0.0.1:4222/cdc.{type}")
    target = broker_url.parse(to)
    try:
        return asyncio.run(_smoke(settings, target, _publisher(settings, target)))
    except UnreachedError as error:
        raise CdcError(error.summary, hint=_REACHABLE) from None
    except (AwayError, DeliveryError, RejectedError) as error:
        raise CdcError(error.summary, hint="correct deliver.to, or the broker; cdc doctor says more") from None


async def _smoke(settings: Settings, target: BrokerTarget, publisher: Publisher) -> TestEvent:
    from cdc.brokers import clients  # noqa: PLC0415 - see above

    change = _test_change((settings.deliver.types or (SMOKE,))[0])
    name = target.names().name(change)
    encoding = clients.encoding(target, settings.deliver.format, settings.deliver.source)
    try:
        [behind] = await publisher.look([name])
        began = time.monotonic()
        await publisher.publish([change], lambda _: encoding.message(change, name))
        took_s = time.monotonic() - began
    except Failed as failed:
        [error] = failed.errors.values()
        raise error from None
    finally:
        await publisher.close()
    return TestEvent(str(target), target.protocol.rules.kind, name, behind, change.id, took_s)


def _test_change(entity_type: str) -> Change:
    return Change(
        id=uuid4(), seq=0, shard=0, entity_type=entity_type, entity_id=SMOKE, table_schema="public", table=SMOKE,
        operation=Operation.INSERT, old=None, new={"id": SMOKE}, metadata={"test": True}, changed_at=datetime.now(UTC),
    )  # fmt: skip
