"""cdc ui: the web interface for operators."""

from __future__ import annotations

from dataclasses import replace

import click

from cdc.app.config import Resolved
from cdc.cli.acting import user
from cdc.cli.doctor import subject_of
from cdc.cli.options import resolved_options
from cdc.cli.wanted import named_router
from cdc.core.errors import UsageError


@click.command()
@resolved_options(
    "dsn", "schema", "handlers", "slot.name", "ui.host", "ui.port", "ui.hosts", "ui.logins", "ui.proxy_header",
    "ui.proxy_networks", "log.level", "log.format",
)  # fmt: skip
def ui(resolved: Resolved) -> None:
    """Show what is going on, and let operators act: on pages, and by an API under /api/.

    A process of its own, on a role of its own: what that role is granted is what everybody may who is let in, see "cdc
    db grant --operator" and --readonly. Beyond a loopback address it needs a login, from CDC_UI_LOGINS_FILE, or a proxy
    that says who it is. Runs until SIGTERM or Ctrl-C. Put something that speaks TLS before it.
    """
    try:
        from cdc.contrib.ui.access import Doors  # noqa: PLC0415 - its libraries are an extra
        from cdc.contrib.ui.operations import Source  # noqa: PLC0415 - see above
        from cdc.contrib.ui.serve import serve  # noqa: PLC0415 - see above
    except ModuleNotFoundError as missing:
        library = (missing.name or "").partition(".")[0]
        if library not in ("fastapi", "jinja2", "starlette", "uvicorn"):
            raise
        raise UsageError(f"the interface needs {library}", hint="pip install 'cdc-consumer[ui]'") from None
    from cdc.observability import logs  # noqa: PLC0415 - see above

    settings = resolved.settings
    section = settings.ui
    section.check()
    router = named_router(resolved) if settings.handlers and not resolved.found else None
    logs.setup(settings.log.level, settings.log.format)
    source = Source(
        settings.current_dsn, settings.schema_, slot=settings.slot.name, router=router,
        subject=replace(subject_of(resolved), streams=False),
    )  # fmt: skip
    doors = Doors(
        logins=section.current_logins, header=section.proxy_header, networks=section.proxy_networks or (),
        hosts=section.hosts or (), alone=None if section.knows_people else user(),
    )  # fmt: skip
    serve(source, doors, host=section.host, port=section.port, local=section.is_local)
