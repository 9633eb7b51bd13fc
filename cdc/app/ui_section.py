"""The settings of ``cdc ui``, and what they have to be to one another."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr

from cdc.app.secret_file import SecretFile
from cdc.app.setting_values import at_commas
from cdc.core.errors import UsageError

_SECRET_MIN = 16
"""Characters of a password or token: it is guessed over the network."""


def logins(text: str) -> Mapping[str, str]:
    """Name to secret, of lines ``NAME:SECRET``. Raises ValueError, which quotes no secret."""
    found: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, _, secret = line.strip().partition(":")
        if not name or len(secret) < _SECRET_MIN or not (name + secret).isprintable():
            raise ValueError(f"line {number} is not NAME:SECRET, with a secret of {_SECRET_MIN} characters or more")
        if name in found:
            raise ValueError(f"line {number} has the name of another one")
        found[name] = secret
    if not found:
        raise ValueError("it names nobody: a line is NAME:SECRET")
    return found


def _are_logins(secret: SecretStr | None) -> SecretStr | None:
    if secret is not None:
        logins(secret.get_secret_value())
    if isinstance(secret, SecretFile):
        secret.check = logins
    return secret


def _is_a_network(text: str) -> str:
    return str(ipaddress.ip_network(text))


_Text = Annotated[str, Field(min_length=1)]
_Networks = tuple[Annotated[str, AfterValidator(_is_a_network)], ...] | None


class UiSection(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True, allow_inf_nan=False)

    host: str = Field("127.0.0.1", min_length=1, description="Address of cdc ui; beyond loopback it needs a login.")
    port: int = Field(9480, ge=0, le=65535, description="Its port; 0 is any that is free.")
    hosts: Annotated[tuple[_Text, ...] | None, BeforeValidator(at_commas)] = Field(
        None, description="A name to ask for it by, besides addresses and localhost."
    )
    logins: Annotated[SecretStr | None, AfterValidator(_are_logins)] = Field(
        None, description="Who may log in to cdc ui: lines NAME:SECRET. A password for HTTP Basic, or a bearer token."
    )
    proxy_header: str | None = Field(
        None, pattern=r"^[A-Za-z0-9-]+$", description="Header in which a proxy says who has logged in there."
    )
    proxy_networks: Annotated[_Networks, BeforeValidator(at_commas)] = Field(
        None, description="A network of proxies whose header is believed, such as 10.1.2.0/24."
    )

    def check(self) -> None:
        """Raises UsageError for a header of nobody, or for somebody without one."""
        if (self.proxy_header is None) != (self.proxy_networks is None):
            raise UsageError(
                "ui.proxy_header and ui.proxy_networks go together",
                hint="which header is believed, and of which proxies",
            )

    def current_logins(self) -> Mapping[str, str]:
        """Those of the moment. Secrets."""
        return logins(self.logins.get_secret_value()) if self.logins else {}

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def knows_people(self) -> bool:
        return self.logins is not None or self.proxy_header is not None
