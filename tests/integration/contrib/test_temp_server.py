"""A temporary server that cannot be made or started says why: nobody can look into its folder afterwards."""

from __future__ import annotations

import pytest

from cdc.contrib.demo.temp_server import TempServer
from cdc.core.errors import CdcError

pytestmark = pytest.mark.usefixtures("server")


def test_a_server_that_does_not_start_tells_what_it_wrote_into_its_log() -> None:
    server = TempServer(durable=False, settings={"max_wal_senders": "many"})
    with pytest.raises(CdcError, match="pg_ctl failed with status 1") as failed, server:
        pass
    assert "max_wal_senders" in failed.value.hint
    assert not server.folder.exists()


def test_a_cluster_that_cannot_be_made_tells_what_initdb_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cdc.contrib.demo.temp_server._LOCALE", "no-such-locale")
    with pytest.raises(CdcError, match="initdb failed with status 1") as failed, TempServer(durable=False):
        pass
    assert "no-such-locale" in failed.value.hint
