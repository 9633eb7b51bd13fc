"""`cdc track --truncate`: a TRUNCATE is captured, refused, or ignored as before."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest

from cdc.postgres import tracking
from cdc.postgres.tracked_tables import Fires, Truncate
from tests.commands import done, invoke, refused

_TRIGGERS = """
SELECT tgname::text, tgenabled::text, tgtype::int & 2 <> 0 AS before FROM pg_trigger
WHERE tgfoid = 'capture_truncate()'::regprocedure AND tgrelid = 'orders'::regclass
"""


@pytest.fixture
def orders(outbox_db: psycopg.Connection) -> psycopg.Connection:
    outbox_db.execute("CREATE TABLE orders (id int PRIMARY KEY)")
    return outbox_db


def triggers(db: psycopg.Connection) -> list[tuple[Any, ...]]:
    return db.execute(_TRIGGERS).fetchall()


def captured(db: psycopg.Connection) -> list[tuple[Any, ...]]:
    return db.execute(
        "SELECT operation, entity_type, entity_id, old_data, new_data FROM entity_changes ORDER BY seq"
    ).fetchall()


def test_a_truncate_is_ignored_unless_it_is_asked_for(outbox: str, orders: psycopg.Connection) -> None:
    done(outbox, "track", "orders")
    orders.execute("TRUNCATE orders")
    assert captured(orders) == []
    assert tracking.tracked(orders, "public")[0].truncate == Truncate.IGNORE


def test_a_truncate_is_captured_as_a_change_of_the_type_without_a_row(outbox: str, orders: psycopg.Connection) -> None:
    assert "truncate event" in done(outbox, "track", "orders", "--type", "order", "--truncate", "event")
    orders.execute("TRUNCATE orders")
    assert captured(orders) == [("TRUNCATE", "order", "", None, None)]
    assert "insert,update,delete,truncate" in done(outbox, "tracked")


def test_its_time_is_written_as_that_of_other_changes_whatever_the_writers_zone(
    outbox: str, orders: psycopg.Connection
) -> None:
    done(outbox, "track", "orders", "--truncate", "event")
    orders.execute("SET timezone = 'Asia/Tokyo'")
    orders.execute("INSERT INTO orders VALUES (1)")
    orders.execute("TRUNCATE orders")
    times = orders.execute("SELECT metadata ->> 'timestamp' FROM entity_changes ORDER BY seq").fetchall()
    assert [time[-6:] for (time,) in times] == ["+00:00", "+00:00"]


def test_a_truncate_that_is_refused_is_an_error_that_says_what_to_do(outbox: str, orders: psycopg.Connection) -> None:
    done(outbox, "track", "orders", "--truncate", "refuse")
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState) as refusal:
        orders.execute("TRUNCATE orders")
    assert refusal.value.diag.message_primary == (
        "TRUNCATE of public.orders is refused: its changes are captured, and its rows would go without one"
    )
    assert "cdc track TABLE --truncate event" in (refusal.value.diag.message_hint or "")
    assert "(truncate refused)" in done(outbox, "tracked")


def test_a_second_track_keeps_it_with_the_type_that_it_names(outbox: str, orders: psycopg.Connection) -> None:
    done(outbox, "track", "orders", "--truncate", "event")
    done(outbox, "track", "orders", "--type", "order")
    orders.execute("TRUNCATE orders")
    assert captured(orders) == [("TRUNCATE", "order", "", None, None)]
    assert "was tracked so already" in done(outbox, "track", "orders")
    assert "is tracked now" in done(outbox, "track", "orders", "--truncate", "refuse")
    assert triggers(orders) == [("#cdc_truncate", "O", True)]
    assert "was tracked so already" in done(outbox, "track", "orders", "--truncate", "refuse")
    done(outbox, "track", "orders", "--truncate", "ignore")
    assert triggers(orders) == []
    assert "was tracked so already" in done(outbox, "track", "orders", "--truncate", "ignore")


def test_it_fires_for_the_same_sessions_as_the_trigger_for_rows(outbox: str, orders: psycopg.Connection) -> None:
    done(outbox, "track", "orders", "--truncate", "event", "--always")
    assert triggers(orders) == [("#cdc_truncate", "A", False)]
    done(outbox, "track", "orders", "--no-always")
    assert triggers(orders) == [("#cdc_truncate", "O", False)]


@pytest.mark.parametrize(
    "before", [[], ["--truncate", "refuse"], ["--truncate", "event", "--type", "x"], ["--truncate", "event"]]
)
@pytest.mark.parametrize("does", ["event", "refuse", "ignore"])
def test_what_is_printed_does_what_track_does(
    outbox: str, orders: psycopg.Connection, before: list[str], does: str
) -> None:
    options = ["orders", "--truncate", does, "--type", "order", "--always", "--replace"]
    done(outbox, "track", "orders", *before)
    printed = invoke(outbox, "track", *options, "--print").stdout
    orders.execute(printed.encode())
    by_script = triggers(orders), tracking.tracked(orders, "public")
    done(outbox, "untrack", "orders")
    assert triggers(orders) == []
    done(outbox, "track", "orders", *before)
    done(outbox, "track", *options)
    assert (triggers(orders), tracking.tracked(orders, "public")) == by_script
    assert by_script[1][0].truncate == does


def test_untrack_says_that_both_triggers_are_gone(outbox: str, orders: psycopg.Connection) -> None:
    done(outbox, "track", "orders", "--truncate", "event")
    said = done(outbox, "untrack", "orders")
    assert "dropped trigger #cdc_capture on orders" in said
    assert "dropped trigger #cdc_truncate on orders" in said
    orders.execute("TRUNCATE orders")
    assert captured(orders) == []


def test_one_made_by_hand_counts_and_is_replaced_by_ours(outbox: str, orders: psycopg.Connection) -> None:
    done(outbox, "track", "orders", "--type", "order")
    orders.execute("CREATE TRIGGER mine AFTER TRUNCATE ON orders EXECUTE FUNCTION capture_truncate('other', 'event')")
    assert "mine of orders is about the type other, and #cdc_capture captures order" in invoke(outbox, "tracked").stderr
    done(outbox, "track", "orders")
    assert triggers(orders) == [("#cdc_truncate", "O", False)]
    orders.execute("TRUNCATE orders")
    assert captured(orders) == [("TRUNCATE", "order", "", None, None)]


def test_one_that_is_disabled_is_told_and_track_mends_it(outbox: str, orders: psycopg.Connection) -> None:
    done(outbox, "track", "orders", "--truncate", "event")
    orders.execute('ALTER TABLE orders DISABLE TRIGGER "#cdc_truncate"')
    listed = invoke(outbox, "tracked")
    assert "#cdc_truncate of orders fires for other sessions than #cdc_capture" in listed.stderr
    assert "cdc track orders --truncate event" in listed.stderr
    done(outbox, "track", "orders", "--truncate", "event")
    assert triggers(orders) == [("#cdc_truncate", "O", False)]
    assert tracking.tracked(orders, "public")[0].fires == Fires.ORIGIN


@pytest.mark.parametrize("arguments", ["", "'order'", "'order', 'ignore'", "'order', ''"])
def test_a_trigger_made_by_hand_with_other_arguments_says_how_to_make_it(
    orders: psycopg.Connection, arguments: str
) -> None:
    create = f"CREATE TRIGGER mine AFTER TRUNCATE ON orders EXECUTE FUNCTION capture_truncate({arguments})"
    orders.execute(create.encode())
    with pytest.raises(psycopg.errors.TriggerProtocolViolated) as refusal:
        orders.execute("TRUNCATE orders")
    assert "cdc track TABLE --truncate event" in (refusal.value.diag.message_hint or "")


def test_a_truncate_of_a_partitioned_table_is_one_change_and_one_of_a_partition_is_told_to_be_none(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    outbox_db.execute(
        "CREATE TABLE orders (id int PRIMARY KEY) PARTITION BY RANGE (id);"
        "CREATE TABLE orders_1 PARTITION OF orders FOR VALUES FROM (0) TO (10);"
        "CREATE TABLE orders_2 PARTITION OF orders FOR VALUES FROM (10) TO (20)"
    )
    said = done(outbox, "track", "orders", "--truncate", "event")
    assert "a TRUNCATE of orders is captured, and one of a partition of it is not" in said
    outbox_db.execute("TRUNCATE orders_1")
    outbox_db.execute("TRUNCATE orders")
    assert captured(outbox_db) == [("TRUNCATE", "orders", "", None, None)]


def test_a_truncate_that_cascades_is_a_change_of_each_table(outbox: str, orders: psycopg.Connection) -> None:
    orders.execute("CREATE TABLE lines (id int PRIMARY KEY, of_order int REFERENCES orders)")
    for table in ("orders", "lines"):
        done(outbox, "track", table, "--truncate", "event")
    orders.execute("TRUNCATE orders CASCADE")
    assert sorted(captured(orders)) == [("TRUNCATE", table, "", None, None) for table in ("lines", "orders")]


def test_no_writer_may_publish_a_truncate_which_would_hold_back_others(orders: psycopg.Connection) -> None:
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="knows no operation TRUNCATE"):
        orders.execute("SELECT publish_change('order', '', 'TRUNCATE')")


def test_a_word_that_is_none_of_the_three_is_refused(outbox: str, orders: psycopg.Connection) -> None:
    assert "'event', 'refuse', 'ignore'" in refused(outbox, "track", "orders", "--truncate", "yes")
