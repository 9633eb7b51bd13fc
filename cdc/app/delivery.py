"""``deliver.to`` -> what delivers: to an application over HTTP, or to a broker. Their libraries are extras."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import TYPE_CHECKING

from cdc.app.config import DeliverSection, Settings
from cdc.core import broker_url
from cdc.core.broker_url import BrokerTarget
from cdc.core.deliveries import DeliveryError, UnreachedError
from cdc.core.errors import UsageError
from cdc.core.name_template import NameTemplate
from cdc.diagnostics.findings import Finding, fail, ok
from cdc.http import endpoint_url
from cdc.runtime.deadline import deadline

if TYPE_CHECKING:
    from cdc.brokers.delivery import BrokerDelivery
    from cdc.brokers.sender import BrokerSender
    from cdc.http.delivery import Delivery

_CHECK_S = 20.0


def make(settings: Settings) -> Delivery | BrokerDelivery:
    """On the event loop. Raises UsageError where the library of the extra is not installed."""
    to = settings.deliver.to
    assert to is not None
    return _to_broker(settings, broker_url.parse(to)) if broker_url.is_broker(to) else _over_http(settings, to)


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


def _to_broker(settings: Settings, target: BrokerTarget) -> BrokerDelivery:
    from cdc.brokers import clients  # noqa: PLC0415 - only what delivers to a broker loads it
    from cdc.brokers.delivery import BrokerDelivery  # noqa: PLC0415 - see above

    deliver = settings.deliver
    return BrokerDelivery(
        _sender(target, deliver),
        target.names(),
        clients.encoding(target, deliver.format, deliver.source),
        target=str(target),
        types=deliver.types or (),
        batch=deliver.batch,
        linger_s=deliver.linger,
        timeout_s=settings.timeout_s,
    )


def _sender(target: BrokerTarget, deliver: DeliverSection) -> BrokerSender:
    from cdc.brokers import clients  # noqa: PLC0415 - see above
    from cdc.brokers.sender import Login  # noqa: PLC0415 - see above

    return clients.sender(target, Login(deliver.user, deliver.current_password))


def examine(settings: Settings) -> Finding | None:
    """What ``cdc doctor`` finds out about the broker; None where nothing is delivered to one."""
    to = settings.deliver.to
    if to is None or not broker_url.is_broker(to):
        return None
    target = broker_url.parse(to)
    try:
        return asyncio.run(_look(_sender(target, settings.deliver), target, settings.deliver.types or ()))
    except UsageError as error:
        return fail(str(error), error.hint)
    except UnreachedError as error:
        return fail(error.summary, "start the broker, or correct deliver.to, deliver.user and deliver.password")
    except TimeoutError:
        return fail(f"{target} gave no answer within {_CHECK_S:g} s", "look at the broker's own log")


async def _look(sender: BrokerSender, target: BrokerTarget, types: tuple[str, ...]) -> Finding:
    async with deadline(_CHECK_S):
        await sender.connect()
        try:
            said = [await sender.describe(name) for name in _names(target.names(), types)]
        except DeliveryError as error:
            return fail(error.summary, "correct deliver.to, or the broker")
        finally:
            await sender.close()
    return ok("; ".join((f"{target} is reached", *said)))


def _names(template: NameTemplate, types: tuple[str, ...]) -> Iterator[str]:
    """Those that are known before a change comes."""
    yield from dict.fromkeys(filter(None, map(template.known, types or ("",))))
