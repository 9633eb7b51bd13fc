"""Checks of the subscriptions beside the default one: their index, who consumes them, and what they keep. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from cdc.core.units import format_duration
from cdc.diagnostics.facts import IndexFacts, SubscriptionFacts, SubscriptionsFacts
from cdc.diagnostics.findings import Checks, Finding, fail, ok, warn

_LONG_S = 86_400.0
_SHOWN = 5


def subscriptions(seen: SubscriptionsFacts) -> Finding:
    there = [index for index in seen.indexes if index.valid is not None]
    if not seen.each and not there:
        return ok("none beside the default one")
    if not seen.each:
        return warn(
            f"indexes that are for subscriptions, of which there are none, cost marks a write: {_names(there)}",
            "",
            *(f"DROP INDEX CONCURRENTLY {index.name};" for index in there),
        )
    broken = [index for index in seen.indexes if not index.valid]
    if broken:
        return fail(
            "indexes are missing, or not valid since what built them was interrupted, and reads of subscriptions walk"
            f" the whole table: {_names(broken)}",
            "",
            *(f"DROP INDEX CONCURRENTLY {index.name};" for index in broken if index.valid is not None),
            *(index.creation for index in broken),
        )
    alone = [each for each in seen.each if not each.consumers and not each.paused and (each.behind or each.held_back)]
    if alone:
        named = _named(alone, lambda each: f"{each.behind:,}" if each.behind else f"keeps {each.held_back:,}")
        return warn(
            f"changes wait for subscriptions of which nobody is a consumer: {named}",
            f"cdc run --subscription {alone[0].name}; or cdc subscription pause, or drop",
        )
    return ok(f"{len(seen.each)}: {_named(seen.each)}")


def held_back(seen: SubscriptionsFacts) -> Finding:
    late = [each for each in seen.each if each.held_back and (each.oldest_age_s or 0.0) > _LONG_S]
    if not late:
        return ok("no subscription is more than a day behind the default one")

    def far(each: SubscriptionFacts) -> str:
        return f"{each.held_back:,}, the oldest {format_duration(each.oldest_age_s or 0.0)} old"

    return warn(
        f"retention keeps what the others have done: for {_named(late, far)}",
        f"cdc subscription show {late[0].name}; what nobody needs is freed by cdc subscription drop",
    )


def types(seen: SubscriptionsFacts) -> Finding:
    lost = [each for each in seen.each if each.unknown_types]
    if lost:
        return warn(
            "types that subscriptions take, and that no trigger captures and no change of late has:"
            f" {_named(lost, lambda each: ', '.join(each.unknown_types))}",
            "is a name misspelt? cdc tracked lists what is captured; another choice of types is a drop and a create",
        )
    return ok("each type that a subscription names is captured, or published")


def _names(indexes: Iterable[IndexFacts]) -> str:
    return ", ".join(index.name for index in indexes)


def _named(those: Iterable[SubscriptionFacts], what: Callable[[SubscriptionFacts], str] | None = None) -> str:
    found = list(those)
    more = f", and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return ", ".join(f"{each.name} ({what(each)})" if what else each.name for each in found[:_SHOWN]) + more


SUBSCRIPTIONS: Checks[SubscriptionsFacts] = {
    "subscriptions": subscriptions,
    "subscriptions-behind": held_back,
    "subscription-types": types,
}
