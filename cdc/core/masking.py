"""Secrets in text, masked: passwords of DSNs and URLs, tokens in queries. Pure; a net below the rule to quote none.

It reads foreign text in the process that handles changes, so each pattern takes linear time: every repeat is
possessive, and either nothing after it can fail or it stops where another match might begin.
"""

from __future__ import annotations

import re

# A quote that is not closed runs to the end: the text may have been cut.
_QUOTED = r"'(?:[^'\\]++|\\.)*+'?+|\"(?:[^\"\\]++|\\.)*+\"?+"
_PASSWORD = re.compile(rf"(passw(?:or)?d[\"']?\s*+[=:]\s*+)(?:{_QUOTED}|\S++)", re.IGNORECASE | re.DOTALL)

_SECRET = re.compile(
    rf"((?:token|secret|passphrase|api[_-]?key|access[_-]?key|signature|credential)s?(?:=|[\"']\s*+[=:]\s*+))"
    rf"(?:{_QUOTED}|[^\s&]++)",
    re.IGNORECASE | re.DOTALL,
)
"""As ``name=value``, or as a quoted name: "the secret: ..." is prose."""

_BEARER = re.compile(r"(\bbearer )(?=[^\s]{8})[^\s\"',;]++", re.IGNORECASE)

_SIGNING = re.compile(r"(\bwhsec_)[^\s\"',;]++")
"""A secret of Standard Webhooks, wherever it stands."""

_WORD = re.compile(r"\S++")
_USER = re.compile(r":/{1,2}+[^:/@\s]*+:")
_QUERY = re.compile(r"\?[^\s'\"<>]++")


def mask(text: str) -> str:
    """``text`` without the passwords of DSNs and URLs, URLs' queries, and the values of names that mean a secret."""
    text = _SECRET.sub(r"\1***", _PASSWORD.sub(r"\1***", text))
    text = _SIGNING.sub(r"\1***", _BEARER.sub(r"\1***", text))
    return _WORD.sub(_of_a_url, text) if ":/" in text else text


def _of_a_url(word: re.Match[str]) -> str:
    """The password ends at the last @ of the word, because a password may hold an @ itself.

    A parameter of a query may have any name, so the whole query is masked.
    """
    before, slash, rest = word[0].partition(":/")
    if not slash:
        return before
    text = f"{before}:/{_QUERY.sub('?***', rest)}"
    if "@" in text and (user := _USER.search(text)) and (at := text.rfind("@")) >= user.end():
        return f"{text[: user.end()]}***{text[at:]}"
    return text


def without_query(url: str) -> str:
    """A URL to show: without its query, in which a token may stand, and without a password."""
    place, question, _ = url.partition("?")
    return mask(place) + (f"{question}***" if question else "")
