"""The address of a broker that changes are delivered to. Pure: the text of a setting in, its parts out.

    SCHEME://HOST[:PORT][,HOST[:PORT]...]/[PLACE/...]TEMPLATE[?OPTION=VALUE&...]

A scheme ends in ``+tls`` for TLS; ``rediss`` and ``amqps`` mean the same. Options name files and numbers, never a
secret: these have settings of their own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv6Address
from string import ascii_letters, digits, hexdigits
from urllib.parse import parse_qsl, quote, unquote_to_bytes

from cdc.core.name_template import ChosenNames, NameFunction, NameRules, Names, NameTemplate

STRUCTURED, BINARY, DEBEZIUM = "structured", "binary", "debezium"
_IN_HOSTS = frozenset(ascii_letters + digits + "._-")
_IN_ADDRESSES = frozenset(hexdigits + ":.")
_HOST_MAX, _LABEL_MAX = 253, 63
_BROKEN_PERCENT = re.compile("%(?![0-9A-Fa-f]{2})")
_TLS_FILES = ("ca", "cert", "key")
_DATABASE_MAX = 2**31 - 1


@dataclass(frozen=True, slots=True)
class BrokerProtocol:
    """What the URLs of one protocol have. ``places``: the parts of the path before the template. ``library``: what is
    imported, of the ``extra`` to install.

    ``texts``: the options that are text, such as files; ``choices``: those with a few values; ``numbers``: those that
    are whole numbers from 1 on, with their greatest.
    """

    port: int
    library: str
    extra: str
    rules: NameRules
    example: str
    formats: tuple[str, ...] = (STRUCTURED, BINARY)
    places: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    numbers: Mapping[str, int] = field(default_factory=dict)


_CONTROL = r"\x00-\x1f\x7f"

PROTOCOLS: Mapping[str, BrokerProtocol] = {
    "kafka": BrokerProtocol(
        port=9092,
        library="confluent_kafka",
        extra="kafka",
        rules=NameRules(
            "topic",
            249,
            re.compile(r"[^A-Za-z0-9._-]"),
            re.compile(r"[^A-Za-z0-9._-]|^\.{1,2}$"),
        ),
        example="kafka://127.0.0.1:9092/cdc.{type}",
        formats=(STRUCTURED, BINARY, DEBEZIUM),
        choices={
            "sasl": ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER"),
            "compression": ("none", "gzip", "snappy", "lz4", "zstd"),
            "tombstones": ("true", "false"),
        },
    ),
    "nats": BrokerProtocol(
        port=4222,
        library="nats",
        extra="nats",
        # A value is one token of a subject. What begins with $ is the server's own.
        rules=NameRules(
            "subject", 1_024, re.compile(rf"[\s.*>{_CONTROL}]"), re.compile(rf"[\s*>{_CONTROL}]|^\.|\.\.|\.$|^\$")
        ),
        example="nats://127.0.0.1:4222/cdc.{schema}.{table}.{operation}",
        texts=("creds",),
    ),
    "redis": BrokerProtocol(
        port=6379,
        library="redis",
        extra="redis",
        rules=NameRules("stream", 1_024, re.compile(rf"[{_CONTROL}]"), re.compile(rf"[{_CONTROL}]")),
        example="redis://127.0.0.1:6379/0/cdc:{type}",
        formats=(STRUCTURED,),
        places=("database",),
        numbers={"maxlen": 10**15, "partitions": 10_000, "wait": 1_000},
    ),
    "amqp": BrokerProtocol(
        port=5672,
        library="aio_pika",
        extra="amqp",
        # A value is one word of a routing key.
        rules=NameRules("routing key", 255, re.compile(rf"[.{_CONTROL}]"), re.compile(rf"[{_CONTROL}]")),
        example="amqp://127.0.0.1:5672/%2F/changes/{type}.{operation}",
        places=("virtual host", "exchange"),
    ),
}
"""By the scheme of their URLs."""
_SYNONYMS = {"rediss": "redis+tls", "amqps": "amqp+tls"}


@dataclass(frozen=True, slots=True)
class BrokerTarget:
    """``servers`` are HOST:PORT; ``places`` the parts of the path before the template, decoded."""

    scheme: str
    tls: bool
    servers: tuple[str, ...]
    places: tuple[str, ...]
    template: str
    options: Mapping[str, str]

    def __str__(self) -> str:
        """For messages: without the options."""
        scheme = self.scheme + ("+tls" if self.tls else "")
        places = "".join(f"{quote(place, safe='')}/" for place in self.places)
        return f"{scheme}://{','.join(self.servers)}/{places}{self.template}"

    @property
    def protocol(self) -> BrokerProtocol:
        return PROTOCOLS[self.scheme]

    def names(self, function: NameFunction | None = None) -> Names:
        """Of the template, and before it of the function."""
        template = NameTemplate(self.template, self.protocol.rules)
        return template if function is None else ChosenNames(function, template)

    def check_login(self, user: str | None, *, has_password: bool) -> None:
        """Raises ValueError for what Kafka and RabbitMQ can do nothing with. Others take a password without a user."""
        sasl = self.options.get("sasl")
        if self.scheme not in ("kafka", "amqp"):
            return
        if has_password and user is None and sasl != "OAUTHBEARER":
            token = "; a token needs sasl=OAUTHBEARER in the URL" if self.scheme == "kafka" else ""
            raise ValueError(f"a password for {self.scheme} needs a user, deliver.user{token}")
        if (user or sasl) and not has_password:
            raise ValueError(f"{'a user' if user else 'sasl='} needs a password: set deliver.password")

    def number(self, option: str) -> int | None:
        return int(self.options[option]) if option in self.options else None


def is_broker(text: str) -> bool:
    """Whether the URL has the scheme of a broker."""
    return _scheme(text)[0] in PROTOCOLS


def parse(text: str) -> BrokerTarget:
    """Raises ValueError that quotes nothing of it."""
    if not text.isprintable() or " " in text:
        raise ValueError("a URL has no blanks and no control characters; percent-encode them")
    scheme, tls = _scheme(text)
    protocol = PROTOCOLS[scheme]
    address, question, query = text.partition("://")[2].partition("?")
    hosts, slash, path = address.partition("/")
    if "@" in hosts:
        raise ValueError("a URL with a user or a password in it shows up in logs: set deliver.user, deliver.password")
    *places, template = path.split("/", len(protocol.places))
    if not slash or len(places) != len(protocol.places):
        raise ValueError(f"input should be a URL such as {protocol.example}")
    if _BROKEN_PERCENT.search(text):
        raise ValueError("a % in a URL is followed by two hexadecimal digits; %25 is the % itself")
    if "#" in text:
        raise ValueError("a fragment (#...) means nothing here; write %23 for a # in a name")
    target = BrokerTarget(
        scheme,
        tls,
        tuple(_servers(hosts, protocol)),
        tuple(map(_decoded, places)),
        _decoded(template),
        dict(_options(query, protocol, tls=tls)) if question else {},
    )
    target.names()
    if scheme == "amqp":
        _check_virtual_host(target.places[0])
    if scheme == "redis" and _number(target.places[0], _DATABASE_MAX) is None:
        raise ValueError(f"the database is a number up to {_DATABASE_MAX}, as in {protocol.example}")
    return target


def _check_virtual_host(name: str) -> None:
    """The client writes it as the path of a URL, which would be another one for these."""
    if not name:
        raise ValueError("the virtual host of this URL is empty; / is %2F")
    if "%2F" in name or {".", ".."} & set(name.split("/")):
        raise ValueError("the virtual host of this URL has a part that the client cannot write: %2F, . or ..")


def _decoded(part: str) -> str:
    try:
        found = unquote_to_bytes(part).decode()
    except UnicodeDecodeError:  # its text quotes the URL
        raise ValueError("what is percent-encoded in this URL is no text in UTF-8") from None
    if not found.isprintable():
        raise ValueError("a part of this URL has control characters in it")
    return found


def _scheme(text: str) -> tuple[str, bool]:
    scheme = text.partition("://")[0]
    name, plus, security = _SYNONYMS.get(scheme, scheme).partition("+")
    return (name, bool(plus)) if security in ("", "tls") else ("", False)


def _servers(hosts: str, protocol: BrokerProtocol) -> Iterator[str]:
    for each in hosts.split(","):
        bracket = each.rfind("]") + 1
        colon = each.find(":", bracket)
        host, port = (each, str(protocol.port)) if colon < 0 else (each[:colon], each[colon + 1 :])
        is_host = _is_address(host[1:-1]) if bracket and host.startswith("[") else _is_host(host)
        number = int(port[:6]) if port.isascii() and port.isdecimal() else 0
        if not is_host or not 0 < number < 65_536:
            raise ValueError("the host or the port of this URL cannot be read")
        yield f"{host}:{port}"


def _is_host(text: str) -> bool:
    """A name, as a resolver takes it, or an address."""
    labels = text.removesuffix(".").split(".")
    return not set(text) - _IN_HOSTS and len(text) <= _HOST_MAX and all(0 < len(each) <= _LABEL_MAX for each in labels)


def _is_address(text: str) -> bool:
    """Of IPv6, without a zone."""
    try:
        return not set(text) - _IN_ADDRESSES and bool(IPv6Address(text))
    except ValueError:
        return False


def _options(query: str, protocol: BrokerProtocol, *, tls: bool) -> Iterator[tuple[str, str]]:
    files = _TLS_FILES if tls else ()
    known = (*files, *protocol.texts, *protocol.choices, *protocol.numbers)
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True, errors="strict")
    except ValueError:
        raise ValueError("the options of this URL cannot be read; write ?NAME=VALUE&NAME=VALUE") from None
    if len(pairs) > len(dict(pairs)):
        raise ValueError("an option of this URL is given twice")
    if "key" in dict(pairs) and "cert" not in dict(pairs) and tls:
        raise ValueError("the option key is that of a certificate, the option cert")
    for name, value in pairs:
        if name not in known:
            without = "" if tls or name not in _TLS_FILES else "; ca, cert and key are for TLS, a scheme with +tls"
            raise ValueError(f"an option of this URL does not exist; there are {', '.join(known) or 'none'}{without}")
        if name in protocol.choices and value not in protocol.choices[name]:
            raise ValueError(f"the option {name} is one of {', '.join(protocol.choices[name])}")
        if name in protocol.numbers and not _number(value, protocol.numbers[name]):
            raise ValueError(f"the option {name} is a whole number from 1 to {protocol.numbers[name]}")
        if not value or not value.isprintable():
            raise ValueError(f"the option {name} is empty, or has control characters in it")
        yield name, value


def _number(text: str, most: int) -> int | None:
    """None for what is no decimal number, or a greater one."""
    if not (text.isascii() and text.isdecimal() and len(text) <= len(str(most))):
        return None
    found = int(text)
    return found if found <= most else None
