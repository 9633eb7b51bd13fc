"""Who is let in."""

from __future__ import annotations

import base64

import pytest
from starlette.datastructures import Headers

from cdc.app import config
from cdc.app.ui_section import logins
from cdc.contrib.ui.access import Doors
from cdc.core.errors import UsageError

SECRET = "a-secret-of-some-length"
TWO = Doors(logins=lambda: {"anna": SECRET, "ben": SECRET + "2"})
PROXY = Doors(header="X-User", networks=("10.1.0.0/16", "fd00::/8"))


def basic(name: str, secret: str) -> str:
    return "Basic " + base64.b64encode(f"{name}:{secret}".encode()).decode()


@pytest.mark.parametrize(("doors", "headers", "client", "person"), [
    (Doors(alone="me"), {}, "127.0.0.1", "me"), (TWO, {}, "127.0.0.1", None),
    (TWO, {"Authorization": basic("anna", SECRET)}, "9.9.9.9", "anna"),
    (TWO, {"Authorization": basic("anna", SECRET + "2")}, "9.9.9.9", None),
    (TWO, {"Authorization": basic("nobody", "\0")}, "9.9.9.9", None),
    (TWO, {"Authorization": basic("", "")}, "9.9.9.9", None), (TWO, {"Authorization": "Basic !!!"}, "9.9.9.9", None),
    (TWO, {"Authorization": f"Bearer {SECRET}2"}, "9.9.9.9", "ben"),
    (TWO, {"Authorization": "Bearer "}, "9.9.9.9", None),
    (TWO, {"X-User": "anna"}, "10.1.2.3", None), (PROXY, {"X-User": "anna"}, "10.1.2.3", "anna"),
    (PROXY, {"X-User": "anna"}, "10.2.2.3", None), (PROXY, {"X-User": "anna"}, "fd00::1", "anna"),
    (PROXY, {"X-User": ""}, "10.1.2.3", None), (PROXY, {"X-User": "anna"}, None, None), (PROXY, {}, "10.1.2.3", None),
])  # fmt: skip
def test_who_it_is(doors: Doors, headers: dict[str, str], client: str | None, person: str | None) -> None:
    assert doors.person(Headers(headers), client) == person


def test_a_token_is_of_one_process_and_one_person() -> None:
    token = TWO.token("anna")
    assert TWO.is_token("anna", token)
    assert not TWO.is_token("ben", token)
    assert not Doors().is_token("anna", token)
    assert not TWO.is_token("anna", "")


def test_logins_are_lines_and_a_wrong_one_is_refused_without_its_secret() -> None:
    assert logins(f"# ours\nanna:{SECRET}\n\nben:a:{SECRET}\n") == {"anna": SECRET, "ben": f"a:{SECRET}"}
    for wrong in ("", "# nobody", f":{SECRET}", "anna:tooshort", f"anna:{SECRET}\nanna:{SECRET}", f"anna:{SECRET}\a"):
        with pytest.raises(ValueError, match=r"line|nobody") as refused:
            logins(wrong)
        assert SECRET not in str(refused.value)


def test_a_header_is_believed_of_somebody_only() -> None:
    whole = config.from_options({"ui_proxy_header": "X-User", "ui_proxy_networks": ("10.0.0.0/8",)}).ui
    whole.check()
    assert whole.knows_people
    for half in ({"ui_proxy_header": "X-User"}, {"ui_proxy_networks": ("10.0.0.0/8",)}):
        with pytest.raises(UsageError, match="go together"):
            config.from_options(half).ui.check()
    with pytest.raises(UsageError, match="network"):
        config.from_options({"ui_proxy_networks": ("here",)})


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("127.0.0.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("ops.example", False),
    ],
)
def test_what_only_this_machine_reaches(host: str, local: bool) -> None:
    assert config.from_options({"ui_host": host}).ui.is_local is local
