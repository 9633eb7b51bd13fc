"""What a message of NATS weighs, and how it is written."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nats.aio.client import Client

from cdc.brokers.nats import _headers
from cdc.core.broker_messages import Message

_HEAD = b"NATS/1.0\r\n"


def _message(headers: dict[str, str], id_: str = "an-id") -> Message:
    return Message("cdc.x", id_, "key", b"", headers)


_TEXTS = st.text(st.sampled_from("a-Z 0%\r\n\u00e9\u20ac\U0001f600"), max_size=20)


@given(st.dictionaries(_TEXTS, _TEXTS, max_size=5), _TEXTS)
def test_the_headers_of_a_message_weigh_what_their_bytes_on_the_wire_do(headers: dict[str, str], id_: str) -> None:
    whole = {**headers, "Nats-Msg-Id": id_}
    wire = _HEAD + b"".join(f"{name}: {value}\r\n".encode() for name, value in whole.items()) + b"\r\n"
    assert _headers(_message(headers, id_))[1] == len(wire)


def _written(client: Client, headers: dict[str, str]) -> bytes:
    sent: list[bytes] = []

    async def send(command: bytes, priority: bool = False) -> None:
        sent.append(command)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client, "_send_command", send)
        asyncio.run(client._send_publish("cdc.x", "", b"body", 4, headers))  # noqa: SLF001 - what writes it
    return sent[0]


@given(st.dictionaries(st.sampled_from(["cdc-id", "cdc-time", "x", "y-z"]), _TEXTS, max_size=4))
def test_what_is_left_out_of_the_clients_search_for_line_breaks_changes_nothing(headers: dict[str, str]) -> None:
    client = Client()
    assert _written(client, _headers(_message(headers))[0]) == _written(client, {**headers, "Nats-Msg-Id": "an-id"})
