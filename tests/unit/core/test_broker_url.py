"""URLs of brokers, and the names of what changes go to."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc.core import broker_url
from cdc.core.deliveries import RejectedError
from cdc.testing import change as make_change


@pytest.mark.parametrize(
    ("text", "servers", "path", "tls", "options"),
    [
        ("nats://h/cdc.{type}", ("h:4222",), ("cdc.{type}",), False, {}),
        ("nats+tls://h:1,[::1]/a.{table}?ca=/ca.pem", ("h:1", "[::1]:4222"), ("a.{table}",), True, {"ca": "/ca.pem"}),
        (
            "kafka://h,i:9093/cdc.{type}?compression=zstd",
            ("h:9092", "i:9093"),
            ("cdc.{type}",),
            False,
            {"compression": "zstd"},
        ),
        ("redis://h/0/cdc:{type}?maxlen=5", ("h:6379",), ("0", "cdc:{type}"), False, {"maxlen": "5"}),
        ("amqp://h/%2F/ex/{type}.{operation}", ("h:5672",), ("/", "ex", "{type}.{operation}"), False, {}),
        ("amqps://h/shop//queue", ("h:5672",), ("shop", "", "queue"), True, {}),
        ("rediss://h/12/a/b", ("h:6379",), ("12", "a/b"), True, {}),
        ("redis://h/0/a%3Fb%20c", ("h:6379",), ("0", "a?b c"), False, {}),
    ],
)
def test_a_url_has_servers_places_a_template_and_options(
    text: str, servers: tuple[str, ...], path: tuple[str, ...], tls: bool, options: dict[str, str]
) -> None:
    found = broker_url.parse(text)
    assert (found.servers, (*found.places, found.template), found.tls) == (servers, path, tls)
    assert found.options == options


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("nats://hunter@h/x", "a URL with a user or a password in it"),
        ("nats://h", "input should be a URL such as nats://"),
        ("nats://h/", "the subject has characters that are not allowed there, is empty"),
        ("nats://h:0/x", "the host or the port of this URL cannot be read"),
        ("nats://h:99999/x", "the host or the port of this URL cannot be read"),
        ("nats://h,,i/x", "the host or the port of this URL cannot be read"),
        ("nats://h/x y", "a URL has no blanks"),
        ("nats://h/x#y", "a fragment"),
        ("nats://%zz/x", "a % in a URL is followed by two hexadecimal digits"),
        ("nats://h%41/x", "the host or the port of this URL cannot be read"),
        ("nats://h/x%zz", "a % in a URL is followed by two hexadecimal digits"),
        ("nats://h/x?creds=%", "a % in a URL is followed by two hexadecimal digits"),
        ("nats://h/x?creds=%00", "the option creds is empty, or has control characters in it"),
        ("nats://h/x?creds=%ff", "the options of this URL cannot be read"),
        ("amqp://h/%ff/ex/x", "what is percent-encoded in this URL is no text in UTF-8"),
        ("amqp://h/%00/ex/x", "a part of this URL has control characters in it"),
        ("nats://h/a..b", "the subject has characters that are not allowed"),
        ("nats://h/a.*", "the subject has characters that are not allowed"),
        ("nats://h/$JS.x", "the subject has characters that are not allowed"),
        ("nats://h/{typ}", "the subject has a placeholder that does not exist; there are {type} {schema} {table}"),
        ("nats://h/{type!r}", "the subject has a placeholder that does not exist"),
        ("nats://h/{}", "the subject has a placeholder that does not exist"),
        ("nats://h/{type", "the subject has a brace without its other half"),
        ("nats://h/x?ca=/f", "an option of this URL does not exist; there are creds; ca, cert and key are for TLS"),
        ("nats+tls://h/x?cafile=/f", "an option of this URL does not exist; there are ca, cert, key, creds"),
        ("nats+tls://h/x?ca=", "the option ca is empty"),
        ("nats://h/x?y", "the options of this URL cannot be read"),
        ("kafka://h/a:b", "the topic has characters that are not allowed there"),
        ("kafka://h/..", "the topic has characters that are not allowed there"),
        ("kafka://h/x?sasl=MD5", "the option sasl is one of PLAIN, SCRAM-SHA-256, SCRAM-SHA-512, OAUTHBEARER"),
        *(
            (f"nats://{host}/x", "the host or the port of this URL cannot be read")
            for host in ("a..b", ".a", ".", f"{'a' * 64}.b", "a." * 130, "[:]", "[::1::]", "[12345::]", "[127.0.0.1]")
        ),
        ("amqp://h//ex/x", "the virtual host of this URL is empty; / is %2F"),
        ("amqp://h/%252F/ex/x", "the virtual host of this URL has a part that"),
        ("amqp://h/%2E%2E/ex/x", "the virtual host of this URL has a part that"),
        ("amqp://h/a%2F../ex/x", "the virtual host of this URL has a part that"),
        ("kafka+tls://h/x?key=/f", "the option key is that of a certificate, the option cert"),
        ("amqp://h/exchange/key", "input should be a URL such as amqp://"),
        ("redis://h/cdc", "input should be a URL such as redis://"),
        ("redis://h/x/cdc", "the database is a number"),
        ("redis://h/-1/cdc", "the database is a number"),
        ("redis://h/\u0663/cdc", "the database is a number"),
        (f"redis://h/{'9' * 5_000}/cdc", "the database is a number up to 2147483647"),
        ("redis://h/0/cdc?partitions=0", "the option partitions is a whole number from 1 to 10000"),
        ("redis://h/0/cdc?partitions=1000000000", "the option partitions is a whole number from 1 to 10000"),
        ("redis://h/0/cdc?maxlen=a", "the option maxlen is a whole number from 1 to"),
        ("redis://h/0/cdc?maxlen=\u0663", "the option maxlen is a whole number from 1 to"),
        (f"redis://h/0/cdc?maxlen={'9' * 5_000}", "the option maxlen is a whole number from 1 to"),
        ("redis://h/0/cdc?wait=1&wait=2", "an option of this URL is given twice"),
    ],
)
def test_a_url_that_cannot_be_meant_is_refused_and_not_quoted(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(why)}") as refused:
        broker_url.parse(text)
    assert "hunter" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "user", "has_password", "why"),
    [
        ("kafka://h/x", None, True, "a password for kafka needs a user, deliver.user; a token needs sasl=OAUTHBEARER"),
        ("kafka://h/x?sasl=SCRAM-SHA-256", None, True, "a password for kafka needs a user"),
        ("kafka://h/x?sasl=PLAIN", None, False, "sasl= needs a password"),
        ("kafka://h/x", "app", False, "a user needs a password"),
        ("amqp://h/%2F/ex/x", None, True, "a password for amqp needs a user, deliver.user"),
    ],
)
def test_a_login_that_can_log_in_nowhere_is_refused(text: str, user: str | None, has_password: bool, why: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(why)}"):
        broker_url.parse(text).check_login(user, has_password=has_password)


@pytest.mark.parametrize(
    ("text", "user", "has_password"),
    [
        ("kafka://h/x?sasl=OAUTHBEARER", None, True),
        ("kafka://h/x", "app", True),
        ("kafka://h/x", None, False),
        ("nats://h/x", None, True),
        ("redis://h/0/x", None, True),
        ("redis://h/0/x", "app", False),
    ],
)
def test_a_login_that_a_broker_may_know_is_taken(text: str, user: str | None, has_password: bool) -> None:
    broker_url.parse(text).check_login(user, has_password=has_password)


@pytest.mark.parametrize("text", ["http://h/", "unix:///s:/", "pulsar://h/x", "nats+ssl://h/x", "", "://"])
def test_what_is_no_broker_is_left_to_http(text: str) -> None:
    assert not broker_url.is_broker(text)


def test_a_message_shows_no_option() -> None:
    assert str(broker_url.parse("nats+tls://h/x?cert=/c&key=/hunter")) == "nats+tls://h:4222/x"
    assert str(broker_url.parse("amqp://h/%2F//x")) == "amqp://h:5672/%2F//x"


@pytest.mark.parametrize(
    ("template", "entity_type", "schema", "name"),
    [
        ("cdc.{type}", "order", "public", "cdc.order"),
        ("{schema}.{table}.{operation}", "order", None, "_.orders.insert"),
        ("cdc.{type}", "a.b c*>", "public", "cdc.a_b_c__"),
        ("cdc.{type}", "größe", "public", "cdc.größe"),
    ],
)
def test_a_name_is_made_of_the_change_and_what_is_not_allowed_in_it_is_replaced(
    template: str, entity_type: str, schema: str | None, name: str
) -> None:
    change = make_change(entity_type, table_schema=schema, table="orders")
    assert broker_url.parse(f"nats://h/{template}").names().name(change) == name


def test_a_name_that_is_too_long_rejects_its_change() -> None:
    names = broker_url.parse("nats://h/cdc.{type}").names()
    with pytest.raises(RejectedError, match="longer than 1024 bytes"):
        names.name(make_change("x" * 1_100))


@pytest.mark.parametrize(
    ("template", "entity_type", "why"),
    [
        ("kafka://h/{type}", ".", "its topic has characters that are not allowed there"),
        ("kafka://h/{type}", "..", "its topic has characters that are not allowed there"),
        ("nats://h/{type}.{operation}", "$JS", "its subject has characters that are not allowed there"),
    ],
)
def test_a_name_that_is_none_as_a_whole_rejects_its_change_each_time(template: str, entity_type: str, why: str) -> None:
    names = broker_url.parse(template).names()
    for _ in range(2):
        with pytest.raises(RejectedError, match=f"^{why}"):
            names.name(make_change(entity_type))


@given(st.text(min_size=1, max_size=50))
def test_every_type_has_a_subject_that_is_one(entity_type: str) -> None:
    names = broker_url.parse("nats://h/cdc.{type}").names()
    assert not names.rules.wrong.search(names.name(make_change(entity_type)))
    assert names.name(make_change(entity_type)).count(".") == 1
