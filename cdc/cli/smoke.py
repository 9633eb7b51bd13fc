"""cdc smoke: one test event to the broker that changes are delivered to."""

from __future__ import annotations

import click

from cdc.app.config import Settings
from cdc.cli.options import json_option, settings_options
from cdc.cli.output import paint, print_json, put


@click.command()
@settings_options(
    "deliver.to", "deliver.types", "deliver.format", "deliver.source", "deliver.user", "deliver.password", "timeout",
)  # fmt: skip
@json_option
def smoke(settings: Settings, as_json: bool) -> None:
    """Send one test event to a broker, and wait until it is acknowledged.

    Needs no database. The event is an INSERT of the key cdc-smoke, of the type that --type names, or of the type
    cdc-smoke: whoever reads there gets it. Says where it went; exit 1 if it was not acknowledged, with the reason.

    \b
        cdc smoke --deliver-to 'nats://nats.internal/cdc.{type}' --type order
    """
    from cdc.app.delivery import smoke as send  # noqa: PLC0415 - --help does not wait for the libraries

    sent = send(settings)
    if as_json:
        print_json({
            "ok": True, "target": sent.target, "kind": sent.kind, "name": sent.name, "behind": sent.behind,
            "event_id": sent.id, "took_s": sent.took_s,
        })  # fmt: skip
        return
    put(paint("✓", "green"), f" {sent.target} is reached: {sent.behind}")
    put(
        paint("✓", "green"),
        f" the event {sent.id} is acknowledged, {sent.took_s * 1_000:.0f} ms: {sent.kind} {sent.name}",
    )
