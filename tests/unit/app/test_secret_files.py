"""Secrets in files are read again when they have changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from cdc.app import config
from cdc.http import webhook_signature

_ONE, _OTHER = ("whsec_" + letter * 44 for letter in "ab")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "secret"


def test_a_replaced_dsn_is_the_next_connections(file: Path) -> None:
    file.write_text("host=a password=old\n")
    settings = config.load(environ={"CDC_DSN_FILE": str(file)}).settings
    assert settings.current_dsn() == settings.current_stream_dsn() == "host=a password=old"
    file.write_text("host=a password=newer\n")
    assert settings.current_dsn() == settings.current_stream_dsn() == "host=a password=newer"
    replacement = file.with_name("other")
    replacement.write_text("host=b")
    replacement.rename(file)
    assert settings.current_dsn() == "host=b"
    assert "newer" not in repr(settings)


@pytest.mark.parametrize("spoilt", ["", None, "\udcff"])
def test_what_cannot_be_read_leaves_the_value_as_it_was(spoilt: str | None, file: Path) -> None:
    file.write_text("host=a")
    settings = config.load(environ={"CDC_DSN_FILE": str(file)}).settings
    if spoilt is None:
        file.unlink()
    else:
        file.write_bytes(spoilt.encode(errors="surrogateescape"))
    assert settings.current_dsn() == "host=a"
    file.write_text("host=b")
    assert settings.current_dsn() == "host=b"


def test_what_is_delivered_is_signed_with_the_secret_of_the_moment_if_it_is_one(file: Path) -> None:
    file.write_text(_ONE)
    deliver = config.load(environ={"CDC_DELIVER_SECRET_FILE": str(file)}).settings.deliver
    assert deliver.keys() == (webhook_signature.key(_ONE),)
    file.write_text("no secret")
    assert deliver.keys() == (webhook_signature.key(_ONE),)
    file.write_text(_OTHER)
    assert deliver.keys() == (webhook_signature.key(_OTHER),)
