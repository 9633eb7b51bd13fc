"""error_summary: what an attempt failed with, in words that quote no row. The page and `cdc status` show it."""

from __future__ import annotations

from collections.abc import Callable

import psycopg
import pytest
from psycopg import sql
from pydantic import BaseModel

import cdc
from cdc import testing
from cdc.postgres import grants, migrations

_SECRET = "Ada, 4711-2222"
_WRITE = "SELECT publish_change('order', '1', 'INSERT', jsonb_build_object('amount', %s::text))"


class Order(BaseModel):
    amount: int


class RefundError(Exception):
    """Its text looks like an error of another class."""

    def __init__(self, name: str) -> None:
        super().__init__(f"KeyError: {name}")


@pytest.mark.parametrize(
    ("error", "summary"),
    [
        (ValueError(_SECRET), "ValueError at "),
        (RefundError(_SECRET), "RefundError at "),
        (cdc.Reject(_SECRET), "rejected it"),
        (cdc.Retry(0, _SECRET), "asked for another try"),
    ],
)
async def test_it_names_the_error_and_quotes_nothing(
    error: Exception, summary: str, outbox: str, outbox_db: psycopg.Connection
) -> None:
    router = cdc.Router()

    @router.on("order", max_attempts=1)
    def fail(_: cdc.Change) -> None:
        raise error

    outbox_db.execute(_WRITE, [_SECRET])
    [dead] = (await testing.drain(outbox, router, allow_dead=True)).dead_letters
    assert _SECRET in (dead.last_error or "")
    assert (dead.error_summary or "").startswith(summary)
    assert "Ada" not in (dead.error_summary or "")


async def test_of_a_row_that_does_not_fit_it_names_the_model(outbox: str, outbox_db: psycopg.Connection) -> None:
    router = cdc.Router()
    router.on("order", model=Order)(lambda _: None)
    outbox_db.execute(_WRITE, [_SECRET])
    [dead] = (await testing.drain(outbox, router, allow_dead=True)).dead_letters
    assert dead.error_summary == "the row does not fit the model Order"


async def test_it_is_of_the_last_error_and_goes_with_what_is_discarded(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    router = cdc.Router()
    errors: list[Exception] = [ValueError(), KeyError(), cdc.Discard(_SECRET)]
    seen = []

    @router.on("order", max_attempts=5)
    def fail(_: cdc.Change) -> None:
        seen.extend(outbox_db.execute("SELECT split_part(error_summary, ' at ', 1) FROM entity_changes").fetchall())
        raise errors.pop(0)

    outbox_db.execute(_WRITE, [_SECRET])
    await testing.drain(outbox, router)
    assert seen == [(None,), ("ValueError",), ("KeyError",)]
    assert outbox_db.execute("SELECT error_summary FROM entity_changes").fetchone() == (None,)


@pytest.mark.parametrize("bring", [migrations.install, migrations.upgrade])
def test_who_may_read_and_write_last_error_may_so_after_an_upgrade(
    bring: Callable[..., object], outbox_db: psycopg.Connection
) -> None:
    roles = {name: f"{name}_{outbox_db.info.dbname}" for name in ("consumer", "readonly")}
    for role in roles.values():
        outbox_db.execute(sql.SQL("CREATE ROLE {}").format(sql.Identifier(role)))
    try:
        grants.grant(outbox_db, "public", [grants.consumer(roles["consumer"]), grants.reader(roles["readonly"])])
        outbox_db.execute("ALTER TABLE entity_changes DROP COLUMN error_summary")
        outbox_db.execute("DELETE FROM cdc_migrations WHERE version >= 9")
        outbox_db.execute(_WRITE, [_SECRET])
        outbox_db.execute("UPDATE entity_changes SET last_error = 'ValueError: Ada', dead_at = now()")
        bring(outbox_db, "public")
        assert migrations.verify(outbox_db, "public") == []
        assert outbox_db.execute("SELECT last_error, error_summary FROM entity_changes").fetchone() == (
            "ValueError: Ada",
            None,
        )
        may = "SELECT has_column_privilege(%s, 'entity_changes', 'error_summary', %s)"
        allowed = {
            (name, right)
            for name, role in roles.items()
            for right in ("SELECT", "UPDATE")
            if outbox_db.execute(may, [role, right]).fetchone() == (True,)
        }
        assert allowed == {("consumer", "SELECT"), ("consumer", "UPDATE"), ("readonly", "SELECT")}
        again = grants.grant(outbox_db, "public", [grants.consumer(roles["consumer"])])
        assert [each.excess for each in again] == [""]
    finally:
        for role in roles.values():
            outbox_db.execute(sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(sql.Identifier(role)))
