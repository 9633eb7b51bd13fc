"""``[subscription.NAME]`` in cdc.toml: which consumers a process has, and with which settings."""

from pathlib import Path

import pytest

from cdc.app.config import Resolved, load
from cdc.app.sections import consumers
from cdc.core.errors import UsageError

_TWO = """
max_attempts = 5
threads = 3
[backoff]
cap = 60
[slot]
name = "shop"
[subscription.search]
handlers = "search:router"
max_attempts = 7
[subscription.search.backoff]
base = 2
[subscription.mail.deliver]
to = "http://127.0.0.1:3000/changes"
types = ["mail"]
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _consumers(text: str, environ: dict[str, str] | None = None, **options: object) -> list[Resolved]:
    Path("cdc.toml").write_text(text)
    return consumers(load(options, environ=environ or {}))


def test_without_sections_there_is_one() -> None:
    [one] = _consumers('handlers = "app:router"')
    assert (one.settings.subscription, one.settings.handlers) == ("default", "app:router")


def test_each_section_is_a_consumer_and_what_it_does_not_say_is_as_for_all() -> None:
    search, mail = (each.settings for each in _consumers(_TWO, {"CDC_THREADS": "4"}))
    assert (search.subscription, search.handlers, search.max_attempts) == ("search", "search:router", 7)
    assert (search.backoff.base, search.backoff.cap, search.slot.name, search.threads) == (2, 60, "shop", 4)
    assert (mail.subscription, mail.handlers, mail.max_attempts, mail.threads) == ("mail", None, 5, 4)
    assert (mail.deliver.to, mail.deliver.types) == ("http://127.0.0.1:3000/changes", ("mail",))
    assert search.deliver.to is None


@pytest.mark.parametrize(
    "text", ['handlers = "app:router"\n' + _TWO, _TWO + '[subscription.default]\nhandlers = "app:router"']
)
def test_handlers_above_the_sections_are_those_of_the_default_subscription(text: str) -> None:
    found = {each.settings.subscription: each.settings.handlers for each in _consumers(text)}
    assert found == {"default": "app:router", "search": "search:router", "mail": None}


def test_one_that_is_asked_for_runs_alone_with_its_section() -> None:
    text = 'handlers = "app:router"\n' + _TWO
    [one] = _consumers(text, subscription="search")
    assert (one.settings.handlers, one.settings.max_attempts) == ("search:router", 7)
    [one] = _consumers(text, {"CDC_SUBSCRIPTION": "search"}, handlers="another:router")
    assert (one.settings.handlers, one.settings.max_attempts) == ("another:router", 7)
    [one] = _consumers(text, subscription="default")
    assert (one.settings.handlers, one.settings.max_attempts) == ("app:router", 5)
    [one] = _consumers(text, subscription="audit", handlers="audit:router")
    assert (one.settings.subscription, one.settings.handlers) == ("audit", "audit:router")


@pytest.mark.parametrize(
    ("text", "said", "hint"),
    [
        ("[subscription.search]", "[subscription.search] names no handlers", "handlers ="),
        ("[subscription.search]\nhandlers = 'a:b'\nhandler = 'x'", "handler in [subscription.search]", "handlers"),
        ("[subscription.Search]\nhandlers = 'a:b'", "'Search' cannot be the name", "lower-case"),
        ("[subscription]\nsearch = 'a:b'", "[subscription.search] is no section", "handlers ="),
        ("[subscription.search]\nhandlers = 'a:b'\nretention = '1d'", "retention in .* is one for the whole", "above"),
        (
            "[subscription.a]\nhandlers='a:b'\n[subscription.a.slot]\nname='x'",
            "slot.name in .* is one",
            "above",
        ),
        ("[subscription.search]\nhandlers = 'a:b'\nthreads = 0", "threads in [subscription.search]: ", ""),
        ("handlers='a:b'\n[subscription.default]\nhandlers='c:d'", "set for the default subscription twice", "above"),
        ("[subscription.search]\nhandlers='a:b'\n[subscription.search.deliver]\nto='http://a/'", "both set", ""),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence_that_names_it(text: str, said: str, hint: str) -> None:
    with pytest.raises(UsageError) as refused:
        _consumers(text)
    assert all(piece in str(refused.value) for piece in said.split(".*"))
    assert hint in (refused.value.hint or "")


def test_a_file_that_was_merely_found_here_stays_known_as_that() -> None:
    assert [each.found for each in _consumers(_TWO)] == [True, True]
    assert [each.found for each in consumers(load({}, file=Path("cdc.toml"), environ={}))] == [False, False]
