"""Who is let in over the network, and what each answer says to a browser."""

from __future__ import annotations

import base64
from pathlib import Path

import psycopg
import pytest

from cdc.contrib.ui.access import Doors
from tests.commands import refused
from tests.fix_ui import ask, failed, serving

SECRET = "a-secret-of-some-length"
LOGIN = {"Authorization": "Basic " + base64.b64encode(f"anna:{SECRET}".encode()).decode()}
FORM = {"Content-Type": "application/x-www-form-urlencoded"}


def test_nobody_gets_anything_without_a_login(outbox: str, outbox_db: psycopg.Connection) -> None:
    failed(outbox_db, 1)
    with serving(outbox, Doors(logins=lambda: {"anna": SECRET})) as address:
        for path in ("/", "/changes", "/style.css", "/api/changes", "/api/openapi.json", "/nothing"):
            status, said, headers = ask(address, path)
            assert (status, headers["www-authenticate"].partition(" ")[0]) == (401, "Basic"), path
            assert "mail" not in str(said)
            assert ask(address, path, headers=LOGIN)[0] == (404 if path == "/nothing" else 200)
        wrong = {"Authorization": "Bearer wrong"}
        assert ask(address, "/api/changes", headers=wrong)[0] == 401
        assert ask(address, "/api/changes", headers={"Authorization": f"Bearer {SECRET}"})[0] == 200


def test_a_write_of_another_site_or_without_the_token_of_the_form_is_not_done(
    outbox: str, outbox_db: psycopg.Connection, interface: str
) -> None:
    failed(outbox_db, 1)
    form = b"deed=discard&change=1&because=x&at_most=1"
    body = {"changes": [1], "because": "x"}
    for foreign in ({"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}, {"Origin": "null"},
                    {"Sec-Fetch-Site": "same-site"}):  # fmt: skip
        assert ask(interface, "/decide", raw=form, headers={**FORM, **foreign})[0] == 403
        assert ask(interface, "/api/changes/discard", body, headers=foreign)[0] == 403
    assert ask(interface, "/decide", raw=form, headers=FORM)[0] == 400, "no token"
    assert ask(interface, "/api/changes/discard", raw=b"{}", headers={"Content-Type": "text/plain"})[0] == 422
    assert outbox_db.execute("SELECT dead_at IS NOT NULL FROM entity_changes").fetchone() == (True,)


def test_only_names_that_are_ours_are_answered_to(outbox: str) -> None:
    with serving(outbox, Doors(alone="me", hosts=("ops.example.org",))) as address:
        for name, status in (("evil.example", 421), ("ops.example.org", 200), ("OPS.example.org:9465", 200),
                             ("localhost", 200), ("127.0.0.1:1", 200)):  # fmt: skip
            assert ask(address, "/", headers={"Host": name})[0] == status, name


def test_every_answer_forbids_scripts_frames_and_caches(interface: str) -> None:
    for path in ("/", "/style.css", "/api/changes", "/nothing", "/changes/none"):
        headers = {name.lower(): value for name, value in ask(interface, path)[2].items()}
        assert "script-src" not in headers["content-security-policy"]
        assert headers["content-security-policy"].startswith("default-src 'none'")
        assert (headers["cache-control"], headers["x-content-type-options"]) == ("no-store", "nosniff")


def test_what_no_page_of_ours_sends_is_refused_without_a_fault(interface: str) -> None:
    for body in (
        b"x" * 300_000,
        b"&".join(b"a=%d" % n for n in range(5_000)),
        b"\xff\xfe=%00",
        b"change=" + b"1" * 2_000,
    ):
        assert ask(interface, "/confirm", raw=body, headers=FORM)[0] == 400
    for path in ("/changes?state=no", "/changes?after=x", "/changes?since=soon", "/changes/%00", "/actions?before=x"):
        assert ask(interface, path)[0] == 400, path


def test_what_is_no_page_is_said_in_the_form_that_was_asked_for(interface: str) -> None:
    for path in ("/api/changes/a%0Ab", "/api/%0A", "/api/nothing", "/api/changes/1/2"):
        status, said, _ = ask(interface, path)
        assert (status, said["error"]) == (404, "Not Found"), path
    for path in ("/nothing", "/changes/1/2", "/style.css/x"):
        status, said, _ = ask(interface, path)
        assert status == 404
        assert "there is no such page" in said, path
    assert ask(interface, "/decide")[0] == 405


@pytest.mark.parametrize("options", [("--ui-host", "0.0.0.0"), ("--ui-host", "::")])
def test_it_listens_beyond_this_machine_with_a_login_only(outbox: str, options: tuple[str, str]) -> None:
    said = refused(outbox, "ui", "--ui-port", "0", *options)
    assert "without a login" in said
    assert "CDC_UI_LOGINS_FILE" in said


def test_a_secret_is_never_said(outbox: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "logins"
    file.write_text(f"anna:{SECRET}\nben:short")
    monkeypatch.setenv("CDC_UI_LOGINS_FILE", str(file))
    said = refused(outbox, "ui")
    assert "line 2 is not NAME:SECRET" in said
    assert SECRET not in said
