"""What commands and the API say of a thing, under the same names: values for JSON. Pure."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from cdc.replication.slot_health import Outlook, assess

if TYPE_CHECKING:
    from cdc.diagnostics.findings import Finding
    from cdc.diagnostics.status import Status
    from cdc.postgres.actions import Action
    from cdc.postgres.admin import ChangeSummary
    from cdc.postgres.backfill import Backfill
    from cdc.postgres.controls import Control
    from cdc.postgres.limit_admin import SetLimit
    from cdc.postgres.subscriptions import SubscriptionProgress


def status_document(seen: Status, schema: str, expected: Outlook | None = None) -> dict[str, Any]:
    """``expected``: what becomes of the slot, by an earlier reading."""
    figures = {**asdict(seen), "members": [each._asdict() for each in seen.members],
               "observers": [each._asdict() for each in seen.observers]}  # fmt: skip
    health = assess(seen.slot, expected) if seen.slot else None
    return {**figures, "schema_name": schema, "health": asdict(health) if health else None}


def change_document(entry: ChangeSummary) -> dict[str, Any]:
    return {**asdict(entry), "blocked": entry.blocked}


def control_document(control: Control) -> dict[str, Any]:
    return {**asdict(control.pause), "scope": control.pause.scope, "role": control.role, "set_at": control.set_at,
            "until": control.until}  # fmt: skip


def limit_document(each: SetLimit) -> dict[str, Any]:
    setting, limit = each.setting, each.setting.limit
    return {
        "id": setting.id, "handler": setting.handler, "subscription": setting.subscription, "rate": limit.rate,
        "burst": limit.burst, "at_once": limit.at_once, "by": limit.by, "because": setting.because,
        "set_by": setting.set_by, "role": each.role, "set_at": each.set_at,
    }  # fmt: skip


def subscription_document(each: SubscriptionProgress) -> dict[str, Any]:
    figures = asdict(each)
    pauses = [control_document(one) for one in each.pauses]
    return {**figures.pop("subscription"), "state": subscription_state(each), **figures, "pauses": pauses}


def subscription_state(each: SubscriptionProgress) -> str:
    return "paused" if each.paused else "running" if each.consumers else "no consumer"


def backfill_document(each: Backfill) -> dict[str, Any]:
    return {**asdict(each), "state": backfill_state(each)}


def backfill_state(each: Backfill) -> str:
    return "interrupted" if each.state == "running" and not each.at_work else each.state


def action_document(each: Action) -> dict[str, Any]:
    return asdict(each)


def finding_document(found: Finding) -> dict[str, Any]:
    return {"id": found.check, "severity": found.severity, "detail": found.detail, "remedies": found.remedies}
