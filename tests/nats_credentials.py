"""An operator, accounts and a user of NATS, made up: what a server and a file of credentials need, without ``nsc``."""

from __future__ import annotations

import base64
import json
import os
import time
from pathlib import Path
from typing import Any

import nkeys  # type: ignore[import-untyped]

_UNLIMITED = {
    "subs": -1, "data": -1, "payload": -1, "imports": -1, "exports": -1, "wildcards": True, "conn": -1, "leaf": -1,
    "mem_storage": -1, "disk_storage": -1, "streams": -1, "consumer": -1,
}  # fmt: skip
_NO_STREAMS = {"mem_storage": 0, "disk_storage": 0, "streams": 0, "consumer": 0}
"""A server's own account has none."""


def write(folder: Path) -> tuple[Path, Path]:
    """The settings of a server that knows the account, and the credentials of its user."""
    prefixes = [nkeys.PREFIX_BYTE_OPERATOR, *[nkeys.PREFIX_BYTE_ACCOUNT] * 2, nkeys.PREFIX_BYTE_USER]
    keys = [nkeys.from_seed(bytearray(nkeys.encode_seed(os.urandom(32), prefix))) for prefix in prefixes]
    operator, account, _, user = keys
    named_operator, named_account, named_system, named_user = (each.public_key.decode() for each in keys)
    of_operator = _signed(operator, named_operator, named_operator, {"type": "operator", "version": 2})
    of_account, of_system = (
        _signed(operator, named_operator, each, {"type": "account", "version": 2, "limits": limits})
        for each, limits in ((named_account, _UNLIMITED), (named_system, {**_UNLIMITED, **_NO_STREAMS}))
    )
    limits = {"subs": -1, "data": -1, "payload": -1}
    of_user = _signed(account, named_account, named_user, {"type": "user", "version": 2, **limits})
    settings, credentials = folder / "operator.conf", folder / "user.creds"
    settings.write_text(
        f"operator: {of_operator}\nsystem_account: {named_system}\nresolver: MEMORY\n"
        f"resolver_preload: {{ {named_account}: {of_account}, {named_system}: {of_system} }}\n"
    )
    credentials.write_text(
        f"-----BEGIN NATS USER JWT-----\n{of_user}\n------END NATS USER JWT------\n\n"
        f"-----BEGIN USER NKEY SEED-----\n{user.seed.decode()}\n------END USER NKEY SEED------\n"
    )
    return settings, credentials


def _signed(by: nkeys.KeyPair, issuer: str, subject: str, about: dict[str, Any]) -> str:
    claims = {"jti": subject, "iat": int(time.time()), "iss": issuer, "name": "test", "sub": subject, "nats": about}
    text = f"{_part({'typ': 'JWT', 'alg': 'ed25519-nkey'})}.{_part(claims)}"
    return f"{text}.{_encoded(by.sign(text.encode()))}"


def _part(value: dict[str, Any]) -> str:
    return _encoded(json.dumps(value).encode())


def _encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
