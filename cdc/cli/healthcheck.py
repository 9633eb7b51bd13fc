"""cdc healthcheck: what a container's health check runs, where there is no curl."""

from __future__ import annotations

import http.client

import click

from cdc.app.config import Settings
from cdc.cli.options import settings_options
from cdc.cli.output import put

_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - addresses to bind, which cannot be requested


@click.command()
@settings_options("http.host", "http.port")
@click.option("--wait", type=click.FloatRange(min=0.1), default=4.0, show_default=True, metavar="SECONDS",
              help="For the answer; less than the time limit of the caller.")  # fmt: skip
@click.pass_context
def healthcheck(ctx: click.Context, *, settings: Settings, wait: float) -> None:
    """Ask the consumer on this host whether it is alive: GET /livez.

    Prints one line, and ends with 0 if it is, else with 1. With --http-port 0 there is nothing to ask, which is fine.
    Takes its settings as cdc run does, so that both mean the same port.
    """
    if settings.http.port == 0:
        put("not asked: http.port is 0")
        return
    alive, line = _ask(_EVERYWHERE.get(settings.http.host, settings.http.host), settings.http.port, wait)
    put(line)
    ctx.exit(0 if alive else 1)


def _ask(host: str, port: int, wait_s: float) -> tuple[bool, str]:
    link = http.client.HTTPConnection(host, port, timeout=wait_s)
    try:
        link.request("GET", "/livez")
        answer = link.getresponse()
        checks = answer.read(10_000).decode("utf-8", "replace").splitlines()
    except (OSError, http.client.HTTPException) as error:
        return False, f"no answer from {host} port {port}: {getattr(error, 'strerror', None) or type(error).__name__}"
    finally:
        link.close()
    alive = answer.status == http.client.OK
    failed = [check for check in checks if not check.startswith("ok ")]
    return alive, f"alive: {'; '.join(checks)}" if alive else f"status {answer.status}: {'; '.join(failed)}"
