"""Secrets are masked in any text, in time that grows with the text and no faster."""

from __future__ import annotations

import ast
import importlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc.app.config import _OTHERS_VARIABLES
from cdc.cli.track import _EVENT, _NAME
from cdc.core.masking import mask, without_query
from cdc.core.printable import cut, printable, printable_json, printable_lines
from cdc.postgres.capture_catalog import _QUOTED

# The parser behind re, which has no public name.
sre, parser = importlib.import_module("re._constants"), importlib.import_module("re._parser")

ROOT = Path(__file__).resolve().parents[3]

SECRET = st.text(st.characters(categories=("L", "N")), min_size=9, max_size=30).map(lambda text: f"Zq{text}qZ")


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("GET /y?token=abc&page=2", "GET /y?token=***&page=2"),
        ("/y?access_token=abc", "/y?access_token=***"),
        ("/y?client_secret=abc", "/y?client_secret=***"),
        ("/y?api_key=abc&api-key=def", "/y?api_key=***&api-key=***"),
        ("url='https://x/y?sig=abc&page=2'>, https://z?q", "url='https://x/y?***'>, https://z?***"),
        ("is it http://x/y? yes", "is it http://x/y? yes"),
        ("postgresql://h/db?password=hunter&sslpassword=x", "postgresql://h/db?***"),
        ("postgresql://h/db?%70assword=hunter", "postgresql://h/db?***"),
        ("https://user:pa:ss@host/x https://other:pw@host", "https://user:***@host/x https://other:***@host"),
        ("postgresql://:hunter@db/app", "postgresql://:***@db/app"),
        ("Authorization: Bearer abcdefghijkl", "Authorization: Bearer ***"),
        ('{"token": "a b", "x": 1}', '{"token": ***, "x": 1}'),
        ("password='cut off in the midd", "password=***"),
        ("password='one\\' still\nit' x", "password=*** x"),
        ("sender_url is whsec_QUJD+/= so far", "sender_url is whsec_*** so far"),
        ("a secret is whsec_ and then base64", "a secret is whsec_ and then base64"),
        ("the secret: it is short", "the secret: it is short"),
        ("3 tokens are left", "3 tokens are left"),
        ("a bearer of news", "a bearer of news"),
        ("http://a/b://c:d", "http://a/b://c:d"),
    ],
)
def test_what_is_called_a_secret_is_masked_and_the_rest_is_not(text: str, masked: str) -> None:
    assert mask(text) == masked


@given(st.text(max_size=50), SECRET, st.text(max_size=50))
def test_a_secret_is_masked_between_any_other_text(before: str, secret: str, after: str) -> None:
    for form in (f"password={secret}", f"://user:{secret}@host", f"?token={secret}", f"'secret': '{secret}'"):
        assert secret not in mask(f"{before} {form} {after}")


def test_a_url_is_shown_without_its_query_and_its_password() -> None:
    assert without_query("https://u:pw@host:1/path?k=v?w") == "https://u:***@host:1/path?***"
    assert without_query("https://host/path") == "https://host/path"


# --- printable -----------------------------------------------------------------------------------------------------

HOSTILE = "\x1b]0;t\x07\x9b2J\u202e\u2028\x85\r\nERROR \x00\x7f\U000e0001"


@given(st.text())
def test_what_is_printable_is_one_line_and_holds_no_control(text: str) -> None:
    assert printable(text + HOSTILE).isprintable()
    assert printable("plain ü ✅") == "plain ü ✅"


@given(st.text())
def test_a_json_text_without_controls_means_the_same(text: str) -> None:
    value = {text + HOSTILE: [text, HOSTILE]}
    shown = printable_json(json.dumps(value, ensure_ascii=False, indent=1))
    assert shown.replace("\n", "").isprintable()
    assert json.loads(shown) == value


def test_lines_that_are_lines_by_right_are_indented_one_and_all() -> None:
    assert printable_lines("a\nb\x1b\nc\rd", indent="  ") == "  a\n  b\\x1b\n  c\\rd"


@given(st.text(), st.integers(1, 100))
def test_a_cut_text_has_so_many_bytes_and_says_what_is_missing(text: str, most: int) -> None:
    shown = cut(text, most)
    kept = shown.partition("... (")[0] if shown != text else text
    assert text.startswith(kept)
    assert len(kept.encode("utf-8", "surrogatepass")) <= most
    assert (shown == text) == (len(text.encode("utf-8", "surrogatepass")) <= most)


# --- every pattern of the package is linear --------------------------------------------------------------------------

WHOLE = "it matches the whole or nothing, so it begins at one place"
BY_HAND = {
    r" of ((?:table|view|function|sequence) .*)$": "over names, which have at most 63 bytes",
    '"[^"]*"|[^\\s,"]+': "a quote that is not closed is the last one of the text",
    r"([0-9]+(?:\.[0-9]+)?) ?([smhdw])": WHOLE,
    r"entity_change:[A-Za-z0-9_%]+(?: ([1-9][0-9]{0,18}),(0|[1-9][0-9]?))+": WHOLE,
    _QUOTED.pattern: "a quote that is not closed is the last one of its kind",
    _NAME.pattern: "it is matched where the name before has ended, so it begins at one place",
    _EVENT.pattern: "it is matched where the word before has ended, so it begins at one place",
    _OTHERS_VARIABLES.pattern: "over the names of our own environment's variables",
}
"""Why a pattern which the rule below refuses takes no more than linear time all the same."""

_CALLS = ("compile", "search", "match", "fullmatch", "sub", "subn", "findall", "finditer", "split")
Items = Sequence[tuple[Any, Any]]


def patterns() -> Iterator[tuple[str, str | bytes]]:
    """(where, pattern): those of modules, and those in calls."""
    for path in sorted((ROOT / "cdc").rglob("*.py")):
        where = path.relative_to(ROOT).as_posix()
        module = importlib.import_module(where.removesuffix(".py").replace("/", ".").removesuffix(".__init__"))
        yield from ((where, each.pattern) for each in vars(module).values() if isinstance(each, re.Pattern))
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _CALLS:
                of_re = isinstance(node.func.value, ast.Name) and node.func.value.id == "re"
                match node.args:
                    case [ast.Constant(value=str() | bytes() as pattern), *_] if of_re:
                        yield where, pattern


def unbounded(items: Items, after: Items) -> Iterator[tuple[bool, Items, Items]]:
    """(possessive, what repeats, what follows) of each repeat that has no limit, at any depth."""
    for place, (kind, argument) in enumerate(items):
        rest = [*items[place + 1 :], *after]
        if kind in (sre.MAX_REPEAT, sre.MIN_REPEAT, sre.POSSESSIVE_REPEAT):
            _, most, inner = argument
            if most > 1_000:
                yield kind is sre.POSSESSIVE_REPEAT, list(inner), rest
            yield from unbounded(list(inner), rest)
        elif kind is sre.SUBPATTERN:
            yield from unbounded(list(argument[-1]), rest)
        elif kind is sre.BRANCH:
            for branch in argument[1]:
                yield from unbounded(list(branch), rest)
        elif kind is sre.ATOMIC_GROUP:
            yield from unbounded(list(argument), rest)


def can_fail(items: Items) -> bool:
    return any(
        (argument[0] > 0 if kind in (sre.MAX_REPEAT, sre.MIN_REPEAT, sre.POSSESSIVE_REPEAT)
         else can_fail(list(argument[-1])) if kind is sre.SUBPATTERN else True)
        for kind, argument in items
    )  # fmt: skip


def begins(pattern: str | bytes, character: str, flags: int = re.IGNORECASE) -> bool:
    """Whether some match of ``pattern`` begins with the character."""
    return _begins(list(parser.parse(pattern, flags)), character)


def _begins(items: Items, character: str) -> bool:  # noqa: PLR0911 - an answer for each kind of item
    if not items:
        return True  # it may match nothing at all: then anything may come
    (kind, argument), rest = items[0], items[1:]
    code = ord(character)
    if kind is sre.LITERAL:
        return chr(argument).lower() == character.lower()
    if kind is sre.NOT_LITERAL:
        return chr(argument) != character
    if kind is sre.ANY:
        return True
    if kind is sre.IN:
        return bool(_compiled_set(argument).match(character))
    if kind is sre.SUBPATTERN:
        return _begins([*argument[-1], *rest], character)
    if kind is sre.BRANCH:
        return any(_begins([*branch, *rest], character) for branch in argument[1])
    if kind in (sre.MAX_REPEAT, sre.MIN_REPEAT, sre.POSSESSIVE_REPEAT):
        least, _, inner = argument
        return _begins(list(inner), character) or (least == 0 and _begins(rest, character))
    if kind in (sre.AT, sre.ASSERT, sre.ASSERT_NOT):
        return _begins(rest, character)
    raise AssertionError(f"{kind} at {code}: teach this test what it means")


def _compiled_set(members: Iterable[tuple[Any, Any]]) -> re.Pattern[str]:
    names = {sre.CATEGORY_SPACE: r"\s", sre.CATEGORY_NOT_SPACE: r"\S", sre.CATEGORY_WORD: r"\w",
             sre.CATEGORY_NOT_WORD: r"\W", sre.CATEGORY_DIGIT: r"\d", sre.CATEGORY_NOT_DIGIT: r"\D"}  # fmt: skip
    text = ""
    for kind, argument in members:
        if kind is sre.NEGATE:
            text += "^"
        elif kind is sre.LITERAL:
            text += re.escape(chr(argument))
        elif kind is sre.RANGE:
            text += f"{re.escape(chr(argument[0]))}-{re.escape(chr(argument[1]))}"
        else:
            text += names[argument]
    return re.compile(f"[{text}]", re.IGNORECASE)


ALPHABET = [chr(code) for code in range(256)]


def refused(pattern: str | bytes) -> str | None:
    """Why it may take more than linear time, or None.

    After an unlimited repeat that fails in the end the next beginning is tried, and the repeat goes over the same text
    again: unless it cannot run over a beginning, or nothing after it can fail. And without being possessive, it is
    tried at each of its lengths: unless what comes next never begins with what it repeats.
    """
    whole = list(parser.parse(pattern))
    anchored = whole[0] == (sre.AT, sre.AT_BEGINNING_STRING)
    for possessive, repeated, rest in unbounded(whole, []):
        inside = [character for character in ALPHABET if _begins(repeated, character)]
        if any(True for _ in unbounded(repeated, [])) and not possessive:
            return "a repeat in a repeat"
        if not possessive and can_fail(rest) and any(_begins(list(rest), character) for character in inside):
            return "what follows a repeat may begin with what it repeats"
        begins_again = any(_begins(whole, character) for character in inside)
        if can_fail(rest) and begins_again and not anchored:
            return "it may fail after a repeat that runs over other beginnings"
    return None


def test_no_pattern_of_the_package_takes_more_than_linear_time() -> None:
    found = list(patterns())
    assert len(found) > 12
    suspect = {(where, pattern): why for where, pattern in found if (why := refused(pattern))}
    assert {key: why for key, why in suspect.items() if key[1] not in BY_HAND} == {}
    assert BY_HAND.keys() <= {pattern for _, pattern in suspect}


@pytest.mark.parametrize(
    "pattern", [r"(\w*passwd\s*=\s*)\S+", r"(://[^:/@\s]*):\S*@", r"(a+)+b", r"x.*y", r"(?:a|b)*c", r"\s+$"]
)
def test_a_pattern_that_tries_again_and_again_is_refused(pattern: str) -> None:
    assert refused(pattern)
