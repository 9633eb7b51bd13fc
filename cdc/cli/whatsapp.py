"""cdc whatsapp: the endpoint of the documented application. Its handlers are run by cdc run."""

from __future__ import annotations

import click

from cdc.app.config import Settings
from cdc.cli.commands import Commands
from cdc.cli.options import settings_options
from cdc.cli.whatsapp_smoke import smoke
from cdc.core.errors import UsageError

_SESSION = {
    "statement_timeout": "10s",  # a messenger does not wait long, and sends the event again
    "lock_timeout": "5s",
    "default_transaction_isolation": "read committed",  # after a wait for a lock the holder's writes must be visible
}


@click.group(cls=Commands)
def whatsapp() -> None:
    """The documented WhatsApp application: webhooks in, tasks and messages out.

    \b
        cdc db install --with whatsapp
        cdc whatsapp serve                          stores what webhooks bring
        cdc run --handlers cdc.contrib.whatsapp:router      does what is to be done about it
        cdc whatsapp smoke                          tries all of it once
    """


whatsapp.add_command(smoke)


@whatsapp.command()
@settings_options(
    "dsn", "schema", "whatsapp.host", "whatsapp.port", "whatsapp.app_secret", "whatsapp.verify_token",
    "whatsapp.body_max", "log.level", "log.format",
)  # fmt: skip
def serve(settings: Settings) -> None:
    """Receive webhooks, and store what they bring; nothing is done about it here.

    POST /webhook takes events, signed with the app secret; GET /webhook verifies a subscription; GET /healthz asks
    the database. Runs until SIGTERM or Ctrl-C. Put something that speaks TLS before it.
    """
    section = settings.whatsapp
    if section.app_secret is None:
        raise UsageError(
            "there is no app secret, so the sender of the webhooks cannot be verified",
            hint="CDC_WHATSAPP_APP_SECRET, or CDC_WHATSAPP_APP_SECRET_FILE: the one the messenger signs with",
        )
    try:
        from cdc.contrib.whatsapp.serve import serve as serve_webhooks  # noqa: PLC0415 - its libraries are an extra
        from cdc.contrib.whatsapp.web import Checks  # noqa: PLC0415 - see above
    except ModuleNotFoundError as missing:
        library = (missing.name or "").partition(".")[0]
        if library not in ("starlette", "uvicorn"):
            raise
        raise UsageError(f"the endpoint needs {library}", hint="pip install 'cdc-consumer[whatsapp]'") from None
    from cdc.observability import logs  # noqa: PLC0415 - see above
    from cdc.postgres.connect import pool_arguments  # noqa: PLC0415 - --help does not wait for the driver to load

    logs.setup(settings.log.level, settings.log.format)
    serve_webhooks(
        pool_arguments(settings.dsn_text, application_name="cdc whatsapp", session=_SESSION),
        schema=settings.schema_,
        checks=Checks(
            app_secret=section.app_secret.get_secret_value().encode(),
            verify_token=section.verify_token.get_secret_value() if section.verify_token else None,
            body_max=section.body_max,
        ),
        host=section.host,
        port=section.port,
    )
