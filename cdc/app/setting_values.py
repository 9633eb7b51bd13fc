"""What the values of settings must be, for pydantic: each returns the value, or raises ValueError. Pure."""

from __future__ import annotations

from pydantic import SecretStr

from cdc.app.secret_file import SecretFile
from cdc.core import broker_url
from cdc.core.errors import UsageError
from cdc.core.subscription import DEFAULT, check_name
from cdc.core.units import parse_duration
from cdc.http import endpoint_url, webhook_signature


def is_a_target(url: str | None) -> str | None:
    if url is not None:
        broker_url.parse(url) if broker_url.is_broker(url) else endpoint_url.parse(url)
    return url


def is_a_secret(secret: SecretStr | None) -> SecretStr | None:
    if secret is not None:
        webhook_signature.key(secret.get_secret_value())
    if isinstance(secret, SecretFile):
        secret.check = webhook_signature.key
    return secret


def does_not_ask_for_help(text: str) -> str:
    if "help" in text.lower():
        # If a messenger reports its own messages, such an answer would be answered for ever.
        raise ValueError("it must not have the word help in it, or it would be answered itself")
    return text


def fits_a_name(schema: str) -> str:
    if "\0" in schema or len(schema.encode()) > 63:
        raise ValueError("a schema name has at most 63 bytes")  # PostgreSQL silently cuts longer ones
    return schema


def is_a_subscription(name: str) -> str:
    try:
        return name if name == DEFAULT else check_name(name)
    except UsageError as error:
        raise ValueError(f"{error}; {error.hint}") from None


def none_is_zero(value: object) -> object:
    return 0 if isinstance(value, str) and value.strip().lower() == "none" else value


def is_an_age(text: str) -> str:
    try:
        if text != "off":
            parse_duration(text)
    except UsageError:  # it quotes the value, and a misplaced value may be a secret
        raise ValueError("input should be a span of time, such as 30d, 12h, 90m, or off") from None
    return text


def at_commas(value: object) -> object:
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value
