import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator

import pytest

from cdc.core.masking import mask
from cdc.observability.logs import in_message, setup

Started = Callable[[str], io.StringIO]


@pytest.fixture
def started() -> Iterator[Started]:
    """Starts logging in a format; gives what is written. The root logger is as before afterwards."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    root.handlers.clear()  # setup() would close pytest's own

    def start(line_format: str) -> io.StringIO:
        stream = io.StringIO()
        setup("info", line_format, stream)
        return stream

    yield start
    logging.captureWarnings(capture=False)
    root.handlers[:] = before
    root.setLevel(level)


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("host=db password=hunter user=u", "host=db password=*** user=u"),
        ("password='hun ter' user=u", "password=*** user=u"),
        ("PGPASSWORD=hunter x", "PGPASSWORD=*** x"),
        ("sslpassword = hunter", "sslpassword = ***"),
        ('{"password": "hunter", "x": 1}', '{"password": ***, "x": 1}'),
        ("at postgresql://u:hunter@db/app now", "at postgresql://u:***@db/app now"),
        ("at postgresql://u:hun@t/er@db/app now", "at postgresql://u:***@db/app now"),
        ("http://127.0.0.1:9464/metrics", "http://127.0.0.1:9464/metrics"),
        ("password authentication failed", "password authentication failed"),
    ],
)
def test_passwords_are_masked_and_the_rest_is_not(text: str, masked: str) -> None:
    assert mask(text) == masked


def test_a_text_line_has_time_level_logger_message_and_fields(started: Started) -> None:
    written = started("text")
    logging.getLogger("cdc.slots").info("slot %s created", "cdc", extra={"slot": "cdc", "why": "it was gone", "n": 3})
    time, _, rest = written.getvalue().partition(" ")
    assert rest == 'INFO cdc.slots slot cdc created slot=cdc why="it was gone" n=3\n'
    assert time.endswith("Z")
    assert len(time) == len("2026-01-31T12:00:00.000Z")


def test_less_than_the_level_is_not_written(started: Started) -> None:
    written = started("text")
    logging.getLogger("cdc").debug("per row")
    assert written.getvalue() == ""


def test_a_line_break_in_what_is_logged_forges_no_line(started: Started) -> None:
    written = started("text")
    logging.getLogger("cdc").info("change of %s", "a\nERROR b", extra={"entity_id": "a\nb"})
    assert written.getvalue().count("\n") == 1


def test_a_json_line_is_one_object_with_the_fields(started: Started) -> None:
    written = started("json")
    logging.getLogger("cdc").warning('said "%s"', "ü", extra={"n": 3, "none": None, "dsn": "password=hunter"})
    line = json.loads(written.getvalue())
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "warning", "logger": "cdc", "message": 'said "ü"', "n": 3, "none": None, "dsn": "password=***"
    }  # fmt: skip


@pytest.mark.parametrize("line_format", ["text", "json"])
def test_a_password_in_a_message_or_a_traceback_is_masked(started: Started, line_format: str) -> None:
    written = started(line_format)
    try:
        int("postgresql://u:hunter@db/app")
    except ValueError:
        logging.getLogger("cdc").exception("failed with password=%s", "hunter")
    assert "hunter" not in written.getvalue()
    assert "***" in written.getvalue()


def test_warnings_of_python_are_logged(started: Started) -> None:
    written = started("text")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old", stacklevel=1)
    assert "WARNING py.warnings" in written.getvalue()


HOSTILE = "\x1b]0;owned\x07\x9b2J\u202eegnahc\x85 \u2028 \x0b\x0c\r\nERROR forged"


@pytest.mark.parametrize("line_format", ["text", "json"])
def test_no_control_of_others_reaches_the_log(started: Started, line_format: str) -> None:
    written = started(line_format)
    try:
        int(HOSTILE)
    except ValueError:
        logging.getLogger(HOSTILE).exception("change of %s", HOSTILE, extra={"entity_id": HOSTILE})
    lines = written.getvalue().removesuffix("\n").split("\n")
    assert all(line.isprintable() for line in lines)
    assert all(line.startswith("  ") for line in lines[1:]), "only a traceback has more lines, and they are indented"
    if line_format == "json":
        [line] = lines
        assert json.loads(line)["entity_id"] == HOSTILE


@pytest.mark.parametrize("line_format", ["text", "json"])
@pytest.mark.parametrize("character", ["a", "ü", "\x1b", "\U0001f600", "passwd='"])
def test_a_line_has_some_kilobytes_whatever_is_logged(started: Started, line_format: str, character: str) -> None:
    written = started(line_format)
    logging.getLogger("cdc").info("%s", character * 1_000_000, extra={"entity_id": character * 1_000_000})
    assert len(written.getvalue().encode()) < 65_000
    assert written.getvalue().isascii() or "more characters" in written.getvalue()


def test_a_secret_at_the_cut_is_masked(started: Started) -> None:
    written = started("text")
    logging.getLogger("cdc").info("%s postgresql://u:hunter@db/app", "x" * 7_970)
    assert "hun" not in written.getvalue()


def test_a_number_that_json_does_not_have_is_text(started: Started) -> None:
    written = started("json")
    logging.getLogger("cdc").info("x", extra={"a": float("nan"), "b": float("inf"), "c": 10**5_000, "d": 10**20})
    line = json.loads(written.getvalue(), parse_constant=pytest.fail)
    assert (line["a"], line["b"], line["d"]) == ("nan", "inf", 10**20)
    assert line["c"].startswith("0x")


def test_what_the_message_says_already_is_a_field_in_json_only(started: Started) -> None:
    extra = {**in_message({"event": "attempt", "place": "a.py:1 in f"}), "more": 1}
    written = started("text")
    logging.getLogger("cdc").info("at a.py:1", extra=extra)
    assert written.getvalue().endswith(" INFO cdc at a.py:1 more=1\n")
    logging.getLogger().handlers.clear()
    written = started("json")
    logging.getLogger("cdc").info("at a.py:1", extra=extra)
    line = json.loads(written.getvalue())
    assert line.keys() == {"time", "level", "logger", "message", "event", "place", "more"}


def test_lists_and_mappings_of_extra_are_json(started: Started) -> None:
    written = started("json")
    logging.getLogger("app").info("x", extra={"order": {"id": 7, "lines": [1, 2.5, None]}, "tags": ("a", "b")})
    line = json.loads(written.getvalue())
    assert (line["order"], line["tags"]) == ({"id": 7, "lines": [1, 2.5, None]}, ["a", "b"])


def test_lists_and_mappings_that_are_long_or_no_json_or_hold_a_password_are_text(started: Started) -> None:
    written = started("json")
    endless: list[object] = []
    endless.append(endless)
    extra = {"long": ["x" * 100] * 1_000, "endless": endless, "nan": [float("nan")], "secret": {"password": "hunter"}}
    logging.getLogger("app").info("x", extra=extra)
    line = json.loads(written.getvalue(), parse_constant=pytest.fail)
    assert all(isinstance(line[name], str) for name in extra)
    assert len(written.getvalue()) < 10_000
    assert "hunter" not in written.getvalue()


class _Unspeakable:
    def __str__(self) -> str:
        raise RuntimeError("in __str__")

    __repr__ = __str__


@pytest.mark.parametrize("line_format", ["text", "json"])
def test_a_line_is_not_lost_for_a_value_that_cannot_be_shown(started: Started, line_format: str) -> None:
    written = started(line_format)
    logging.getLogger("app").info("said", extra={"a": _Unspeakable(), "b": [_Unspeakable()], "cdc_in_message": 4})
    assert "said" in written.getvalue()
    assert written.getvalue().count("cannot be shown: RuntimeError") == 2
