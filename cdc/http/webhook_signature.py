"""Signatures of Standard Webhooks 1.0: HMAC-SHA256, symmetric. Pure."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Iterable, Mapping

_BYTES_MIN, _BYTES_MAX = 24, 64  # the specification's


def key(secret: str) -> bytes:
    """The key in ``whsec_...``. Raises ValueError that quotes nothing of it."""
    prefix, _, text = secret.partition("_")
    try:
        found = base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error):
        found = b""
    if prefix != "whsec" or not _BYTES_MIN <= len(found) <= _BYTES_MAX:
        raise ValueError(
            f"a secret is whsec_ and then base64 of {_BYTES_MIN} to {_BYTES_MAX} bytes, as by openssl rand -base64 32"
        )
    return found


def headers(keys: Iterable[bytes], message_id: str, timestamp: int, body: bytes) -> Mapping[str, str]:
    """``webhook-id`` and ``webhook-timestamp`` (seconds of the epoch), and one signature for each key, if any.

    Two keys are used while a secret is replaced: a receiver accepts either signature.
    """
    signed = f"{message_id}.{timestamp}.".encode() + body
    signatures = [base64.b64encode(hmac.digest(each, signed, hashlib.sha256)).decode() for each in keys]
    found = {"webhook-id": message_id, "webhook-timestamp": str(timestamp)}
    return {**found, "webhook-signature": " ".join(f"v1,{each}" for each in signatures)} if signatures else found
