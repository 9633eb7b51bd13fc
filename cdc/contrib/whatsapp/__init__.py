"""The documented application: ``cdc run --handlers cdc.contrib.whatsapp:router``, and ``cdc whatsapp``.

docs/explanation/documented-design.md says what is documented, and what of it is repaired.

All files but this one use only the public names of ``cdc``, as any application does.
"""

from __future__ import annotations

import cdc
from cdc.app.config import Settings
from cdc.contrib.whatsapp.handlers import make_router
from cdc.core.errors import UsageError

__all__ = ["make_router", "router"]


def router(settings: Settings) -> cdc.Router:
    """The handlers, with the messenger of the settings. Raises UsageError where they name none."""
    section = settings.whatsapp
    if section.sender_url is None:
        raise UsageError(
            "no messenger is named, so the application could send nothing",
            hint="CDC_WHATSAPP_SENDER_URL, or sender_url in [whatsapp]: where messages are posted to",
        )
    try:
        from cdc.contrib.whatsapp.http_sender import HttpSender  # noqa: PLC0415 - its library is an extra
    except ModuleNotFoundError as missing:
        if missing.name != "aiohttp":
            raise
        raise UsageError("messages are sent with aiohttp", hint="pip install 'cdc-consumer[whatsapp]'") from None
    token = section.sender_token.get_secret_value() if section.sender_token else None
    try:
        sender = HttpSender(section.sender_url, token)
    except cdc.CdcError as wrong:
        raise UsageError(str(wrong), hint=wrong.hint) from None
    return make_router(sender, schema=settings.schema_, help_text=section.help_text)
