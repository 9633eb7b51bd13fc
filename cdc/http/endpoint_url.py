"""The address that changes are delivered to. Pure: the text of a setting in, its parts out."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

_UNIX = "unix://"


@dataclass(frozen=True, slots=True)
class Target:
    """``url`` is the URL requested; ``socket`` the path of the Unix socket to connect to, or None."""

    url: str
    socket: str | None = None

    def __str__(self) -> str:
        """For messages: without the query, which may hold a token."""
        parts = urlsplit(self.url)
        return f"{_UNIX}{self.socket}:{parts.path}" if self.socket else f"{parts.scheme}://{parts.netloc}{parts.path}"


def parse(text: str) -> Target:
    """``http://HOST:PORT/PATH``, https, or ``unix:///SOCKET:/PATH``. Raises ValueError that quotes nothing of it."""
    if not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError("a URL has no blanks, no control characters and ASCII only; percent-encode all others")
    if "#" in text:
        raise ValueError("a fragment (#...) never reaches a server; leave it out")
    return _on_a_socket(text) if text.startswith(_UNIX) else _on_a_host(text)


def _on_a_socket(text: str) -> Target:
    socket, _, path = text.removeprefix(_UNIX).partition(":/")
    if not socket.startswith("/") or socket == "/":
        raise ValueError("a Unix socket is written unix:///run/app.sock:/changes, its path from the root on")
    return Target(f"http://localhost/{path}", socket)


def _on_a_host(text: str) -> Target:
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError:  # its text quotes the URL
        raise ValueError("the host or the port of this URL cannot be read") from None
    if "%" in parts.netloc and not parts.netloc.startswith("["):  # there it is before the zone of an address
        raise ValueError("the host or the port of this URL cannot be read")
    if parts.scheme not in ("http", "https") or not host or port == 0 or parts.netloc.endswith(":"):
        raise ValueError("input should be a URL such as http://127.0.0.1:3000/changes or unix:///run/app.sock:/changes")
    if "@" in parts.netloc:
        raise ValueError("a URL with a user or a password in it shows up in logs; requests are signed with a secret")
    return Target(text)
