"""`cdc limits`: who has limited what, and why, for people and programs; recorded, and refused where it says nothing."""

from __future__ import annotations

import psycopg
import pytest

from tests.commands import answer, done, invoke, refused

_SET = ["limits", "set", "send", "--because", "what the provider allows"]


def test_a_limit_is_set_listed_replaced_and_cleared(outbox: str, outbox_db: psycopg.Connection) -> None:
    made = answer(invoke(outbox, *_SET, "--rate", "14/s", "--burst", "20", "--concurrency", "50", "--json"))["limit"]
    assert (made["handler"], made["rate"], made["burst"], made["at_once"], made["by"]) == ("send", "14/s", 20, 50, None)
    assert "14/s, burst 20, 50 at once" in done(outbox, "limits", "list")
    done(outbox, *_SET, "--rate", "2/s", "--by", "new.tenant")
    [only] = answer(invoke(outbox, "limits", "list", "--json"))["limits"]
    assert (only["rate"], only["burst"], only["at_once"], only["by"]) == ("2/s", None, None, "new.tenant")
    shown = done(outbox, "controls")
    assert "nothing is paused" in shown
    assert "2/s, for each new.tenant" in shown
    assert "what the provider allows" in shown
    assert "limited no more to 2/s" in done(outbox, "limits", "clear", "send")
    assert "no limit is set" in done(outbox, "limits", "list")
    actions = outbox_db.execute("SELECT action, because FROM cdc_actions ORDER BY id").fetchall()
    assert [action for action, _ in actions] == ["limit", "limit", "clear limit"]
    assert actions[0][1] == "what the provider allows"


def test_a_limit_is_no_pause_and_a_pause_no_limit(outbox: str) -> None:
    done(outbox, *_SET, "--rate", "14/s")
    done(outbox, "pause", "--handler", "send", "--because", "it is down")
    assert len(answer(invoke(outbox, "limits", "list", "--json"))["limits"]) == 1
    assert len(answer(invoke(outbox, "controls", "--json"))["controls"]) == 1
    done(outbox, "resume", "--all")
    assert len(answer(invoke(outbox, "limits", "list", "--json"))["limits"]) == 1
    done(outbox, "pause", "--handler", "send", "--because", "it is down")
    done(outbox, "limits", "clear", "--all")
    assert len(answer(invoke(outbox, "controls", "--json"))["controls"]) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "a rate, at_once"),
        (["--rate", "fast"], "rate='fast'"),
        (["--rate", "1/s", "--burst", "0"], "burst=0"),
        (["--burst", "3", "--concurrency", "3"], "a burst has a rate"),
        (["--rate", "1/s", "--by", "tenant"], "no path"),
        (["--rate", "1/s", "--subscription", "nobody"], "nobody"),
    ],
)
def test_what_says_nothing_is_refused(options: list[str], said: str, outbox: str) -> None:
    assert said in refused(outbox, *_SET, *options)


def test_what_is_not_set_cannot_be_cleared(outbox: str) -> None:
    assert "no limit of send is set" in refused(outbox, "limits", "clear", "send")
    assert "which limit" in refused(outbox, "limits", "clear")
    assert "no limit was set" in done(outbox, "limits", "clear", "--all")
