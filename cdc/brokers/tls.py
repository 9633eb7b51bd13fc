"""TLS to a broker: whom to trust, and who we are, from the files that its URL names."""

from __future__ import annotations

import os
import socket
import ssl

from cdc.core.broker_url import BrokerTarget
from cdc.core.deliveries import UnreachedError


class _PassphraseError(Exception):
    pass


def _passphrase() -> str:
    """Asked for where the key has one, in place of the terminal, which would keep the event loop waiting."""
    raise _PassphraseError


def context(target: BrokerTarget) -> ssl.SSLContext | None:
    """None without TLS. The files are read at each connection, as certificates are replaced while a consumer runs.

    Raises UnreachedError for a file that cannot be read.
    """
    if not target.tls:
        return None
    options = target.options
    try:
        made = ssl.create_default_context(cafile=options.get("ca"))
        if "cert" in options:
            made.load_cert_chain(options["cert"], options.get("key"), _passphrase)
    except _PassphraseError:
        raise UnreachedError(f"a certificate for {target} cannot be read (its key has a passphrase)") from None
    except (OSError, ssl.SSLError) as error:
        raise UnreachedError(f"a certificate for {target} cannot be read ({_reason(error)})") from error
    return made


def _reason(error: OSError) -> str:
    """By its number, where it has one: the event loop's text quotes the address."""
    if isinstance(error, ssl.SSLError):
        return error.reason or type(error).__name__
    if isinstance(error, socket.gaierror):
        return error.strerror or type(error).__name__
    return os.strerror(error.errno) if error.errno else type(error).__name__


def why(error: BaseException) -> str:
    """Why a connection was not made, without the address or anything that the error's text may quote."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate: {error.verify_message}"
    if isinstance(error, TimeoutError):
        return "no answer to the attempt to connect"
    if isinstance(error, OSError):
        return _reason(error)
    return type(error).__name__
