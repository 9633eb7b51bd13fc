"""Where a subscription begins, whatever is written meanwhile, and what it leaves behind when it is dropped."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from psycopg import sql

from cdc.core.errors import NotFoundError, RefusedError, SchemaError, UsageError
from cdc.core.model import SHARDS
from cdc.core.pauses import Pause
from cdc.postgres import migrations, subscriptions
from cdc.postgres.controls import Controls
from cdc.postgres.retention import Retention
from cdc.postgres.subscriptions import INDEX, INDEXES, Subscriptions
from tests.commands_outbox import process, publish, wait
from tests.commands_subscription import fail, finish, taken
from tests.eventually import eventually
from tests.fix_outbox import fill

pytestmark = pytest.mark.server

SUBSCRIPTIONS = Subscriptions("public")
CONTROLS = Controls("public")


def make(db: psycopg.Connection, name: str = "search", **given: Any) -> int:
    return SUBSCRIPTIONS.create(db, name, **given)[0].number


def indexes(db: psycopg.Connection) -> list[tuple[bool]]:
    return db.execute(
        "SELECT bool_and(i.indisvalid) FROM pg_index AS i JOIN pg_class AS c ON c.oid = i.indexrelid"
        " WHERE c.relname = ANY (%s) HAVING count(*) > 0",
        [list(INDEXES)],
    ).fetchall()


def left(db: psycopg.Connection) -> list[int]:
    return [
        db.execute(f"SELECT count(*) FROM {table}".encode()).fetchall()[0][0]
        for table in ("cdc_subscriptions", "cdc_positions", "cdc_subscription_changes")
    ]


def in_a_thread(dsn: str, name: str = "search", **given: Any) -> tuple[threading.Thread, list[Any]]:
    """A subscription that is created meanwhile, and its number, or what it raised."""
    result: list[Any] = []

    def create() -> None:
        with psycopg.connect(dsn, autocommit=True) as connection:
            try:
                result.append(make(connection, name, **given))
            except Exception as error:
                result.append(error)

    thread = threading.Thread(target=create)
    thread.start()
    return thread, result


def noted(db: psycopg.Connection) -> bool:
    """Whether somebody waits for the writers, and so has noted a candidate."""
    return bool(
        db.execute(
            "SELECT FROM pg_stat_activity WHERE query LIKE '%%pg_snapshot_xmin%%' AND pid <> pg_backend_pid()"
            " AND datname = current_database()"
        ).fetchall()
    )


# --- where it begins -----------------------------------------------------------------------------------------------


def test_now_takes_what_is_written_later_and_nothing_from_before(outbox_db: psycopg.Connection) -> None:
    before = [publish(outbox_db, "order", f"{n}") for n in range(10)]
    process(outbox_db, *before[:5])
    wait(outbox_db, before[6])
    number = make(outbox_db)
    assert taken(outbox_db, number) == []
    later = [publish(outbox_db, "order", f"{n}") for n in range(10)]
    assert taken(outbox_db, number) == later


def test_beginning_takes_all_that_is_there_in_any_state(outbox_db: psycopg.Connection) -> None:
    before = [publish(outbox_db, "order", f"{n}") for n in range(10)]
    process(outbox_db, *before[:5])
    wait(outbox_db, before[6])
    number = make(outbox_db, start="beginning")
    later = publish(outbox_db)
    assert taken(outbox_db, number) == [*before, later]


def test_a_number_is_the_first_that_is_taken(outbox_db: psycopg.Connection) -> None:
    before = [publish(outbox_db, "order", f"{n}") for n in range(10)]
    assert taken(outbox_db, make(outbox_db, start=before[4])) == before[4:]
    assert taken(outbox_db, make(outbox_db, "next", start=before[-1] + 1)) == []
    with pytest.raises(UsageError, match="still to come"):
        make(outbox_db, "later", start=before[-1] + 2)


def test_a_time_begins_each_shard_at_its_first_change_since_then(outbox_db: psycopg.Connection) -> None:
    fill(outbox_db, 20, days=10)
    fill(outbox_db, 20, days=2)
    fill(outbox_db, 20, state="waiting", days=10)
    fill(outbox_db, 20, state="fresh", days=1)
    since = datetime.now(UTC) - timedelta(days=3)
    by_shard = outbox_db.execute(
        "SELECT n.seq FROM entity_changes AS n WHERE n.seq >= (SELECT min(seq) FROM entity_changes AS f"
        " WHERE f.shard = n.shard AND f.changed_at >= %s) ORDER BY 1", [since]
    )  # fmt: skip
    wanted = [seq for (seq,) in by_shard]
    assert len(wanted) > 40
    assert taken(outbox_db, make(outbox_db, start=since)) == wanted
    assert taken(outbox_db, make(outbox_db, "relative", start=timedelta(days=3))) == wanted


def test_a_time_to_come_is_refused(outbox_db: psycopg.Connection) -> None:
    with pytest.raises(UsageError, match="still to come"):
        make(outbox_db, start=datetime.now(UTC) + timedelta(hours=1))
    assert left(outbox_db) == [0, 0, 0]


@pytest.mark.parametrize("start", ["now", timedelta(hours=1)])
def test_a_transaction_that_is_open_when_it_begins_is_taken_whole_and_what_had_committed_is_not(
    outbox: str, outbox_db: psycopg.Connection, start: Any
) -> None:
    make(outbox_db, "other")  # the index is there: building it waits for transactions of its own accord
    fill(outbox_db, 20, days=10)
    with psycopg.connect(outbox) as writing, psycopg.connect(outbox) as later:
        early = [publish(writing, "order", f"{n}") for n in range(100)]
        committed = [publish(outbox_db, "order", f"{n}") for n in range(100)]
        creating, result = in_a_thread(outbox, start=start)
        eventually(lambda: noted(outbox_db), what="the creation waits for who writes")
        meanwhile = [publish(outbox_db, "order", f"{n}") for n in range(100)]
        # Open when the snapshot is taken, too.
        late = [publish(later, "order", f"{n}") for n in range(100)]
        above = [publish(outbox_db, "order", f"{n}") for n in range(100)]
        assert not result
        writing.commit()
        creating.join(30)
        [number] = result
        late += [publish(later, "order", f"{n}") for n in range(100)]
        later.commit()
    after = [publish(outbox_db, "order", f"{n}") for n in range(100)]
    got = taken(outbox_db, number)
    if start == "now":
        # By the snapshot: the first one and what committed before it are not taken.
        assert got == [*late[:100], *late[100:], *after]
    else:
        assert got == [*early, *committed, *meanwhile, *late[:100], *above, *late[100:], *after]


def test_of_what_had_committed_meanwhile_only_its_own_types_are_noted(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    make(outbox_db, "other")
    with psycopg.connect(outbox) as writing, psycopg.connect(outbox) as later:
        publish(writing, "order")
        creating, result = in_a_thread(outbox, types=["order"])
        eventually(lambda: noted(outbox_db), what="the creation waits for who writes")
        publish(later, "order")
        for entity_type in ("order", "item", "item"):
            publish(outbox_db, entity_type)
        writing.commit()
        creating.join(30)
    number = result[0]
    [(rows,)] = outbox_db.execute(
        "SELECT count(*) FROM cdc_subscription_changes WHERE subscription = %s", [number]
    ).fetchall()
    assert rows == 1


def test_numbers_of_many_writers_are_each_taken_or_not_as_the_snapshot_has_it(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    """Twenty subscriptions under eight writers: what each takes are all changes that were not committed before it."""
    stopping = threading.Event()

    def write(key: str) -> None:
        with psycopg.connect(outbox) as connection:
            while not stopping.is_set():
                for n in range(5):
                    publish(connection, "order", f"{key}{n}")
                connection.commit()

    writers = [threading.Thread(target=write, args=[f"{n}"]) for n in range(8)]
    for each in writers:
        each.start()
    found: list[tuple[int, set[int], set[int]]] = []
    try:
        for n in range(20):
            before = {seq for (seq,) in outbox_db.execute("SELECT seq FROM entity_changes")}
            number = make(outbox_db, f"s{n}")
            after = {seq for (seq,) in outbox_db.execute("SELECT seq FROM entity_changes")}
            found.append((number, before, after))
    finally:
        stopping.set()
        for each in writers:
            each.join()
    everything = {seq for (seq,) in outbox_db.execute("SELECT seq FROM entity_changes")}
    for number, before, after in found:
        got = set(taken(outbox_db, number))
        assert not got & before, "it had committed before"
        assert got >= everything - after, "it was not committed when it began"


class _Interrupted(psycopg.Connection[Any]):
    """Calls ``meanwhile`` once, after its first look at the transactions and the numbers."""

    meanwhile: Callable[[], None] | None = None

    def execute(self, query: Any, *arguments: Any, **options: Any) -> Any:
        cursor = super().execute(query, *arguments, **options)
        looks = isinstance(query, bytes) and (b"last_value" in query or b"pg_snapshot_xmin" in query)
        if looks and self.meanwhile:
            meanwhile, self.meanwhile = self.meanwhile, None
            meanwhile()
        return cursor


def test_it_waits_for_a_transaction_that_begins_between_its_looks_at_the_numbers_and_at_the_transactions(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    make(outbox_db, "other")
    with psycopg.connect(outbox) as writing, _Interrupted.connect(outbox, autocommit=True) as creating:
        begun: list[int] = []
        creating.meanwhile = lambda: begun.append(publish(writing))
        with pytest.raises(RefusedError, match="stays open"):
            make(creating, wait_s=0.1)
        assert begun


def test_a_writer_that_stays_open_is_named(outbox: str, outbox_db: psycopg.Connection) -> None:
    make(outbox_db, "other")
    with psycopg.connect(outbox, application_name="long import") as writing:
        publish(writing)
        with pytest.raises(RefusedError, match="stays open") as refused:
            make(outbox_db, wait_s=0.1)
        assert "long import" in refused.value.hint
        assert f"pg_terminate_backend({writing.info.backend_pid})" in refused.value.hint
        assert make(outbox_db, "all", start="beginning"), "needs nobody to end"
        assert make(outbox_db, "numbered", start=1)
    assert make(outbox_db)


def test_more_than_can_be_noted_is_refused(
    outbox: str, outbox_db: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(outbox_db, "other")
    before = left(outbox_db)
    monkeypatch.setattr(subscriptions, "_SKIPPED_MAX", 10)
    with psycopg.connect(outbox) as writing, psycopg.connect(outbox) as later:
        publish(writing)
        creating, result = in_a_thread(outbox)
        eventually(lambda: noted(outbox_db), what="the creation waits for who writes")
        publish(later)
        fill(outbox_db, 10, days=0)
        writing.commit()
        creating.join(30)
    assert isinstance(result[0], RefusedError)
    assert left(outbox_db) == before, "all or nothing"


# --- the index -----------------------------------------------------------------------------------------------------


def test_the_first_one_makes_the_index_and_the_last_one_drops_it(outbox_db: psycopg.Connection) -> None:
    assert indexes(outbox_db) == []
    make(outbox_db, "a")
    make(outbox_db, "b")
    assert indexes(outbox_db) == [(True,)]
    SUBSCRIPTIONS.drop(outbox_db, "a")
    assert indexes(outbox_db) == [(True,)]
    SUBSCRIPTIONS.drop(outbox_db, "b")
    assert indexes(outbox_db) == []
    assert migrations.verify(outbox_db, "public") == []


def test_every_row_is_in_one_of_the_two_indexes_whatever_its_columns_say(outbox_db: psycopg.Connection) -> None:
    number = make(outbox_db)
    outbox_db.execute(
        """
        INSERT INTO entity_changes (table_name, operation, entity_id, processed, processed_at, next_attempt_at, dead_at)
        SELECT 'x', 'INSERT', '1', processed, processed_at, next_attempt_at, dead_at
        FROM unnest(ARRAY[true, false]) AS processed, unnest(ARRAY[now(), NULL]) AS processed_at,
          unnest(ARRAY['infinity', '-infinity', now(), NULL]::timestamptz[]) AS next_attempt_at,
          unnest(ARRAY['infinity', now(), NULL]::timestamptz[]) AS dead_at
        """
    )
    [figures] = SUBSCRIPTIONS.progress(outbox_db)
    assert (figures.behind, len(taken(outbox_db, number))) == (48, 48)


def test_what_an_interrupted_command_has_left_of_the_index_is_dropped_first(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    with psycopg.connect(outbox) as reading, psycopg.connect(outbox, autocommit=True) as interrupted:
        publish(reading)
        interrupted.execute("SET statement_timeout = '300ms'")
        with pytest.raises(psycopg.errors.QueryCanceled):
            interrupted.execute(
                f"CREATE INDEX CONCURRENTLY {INDEX} ON entity_changes (shard, seq) WHERE processed".encode()
            )
    assert indexes(outbox_db) == [(False,)]
    make(outbox_db)
    assert indexes(outbox_db) == [(True,)]


def test_where_it_cannot_begin_the_index_is_dropped_again(outbox: str, outbox_db: psycopg.Connection) -> None:
    # Of another database: to build the index nobody waits for it.
    with psycopg.connect(outbox, dbname="postgres") as writing:
        writing.execute("SELECT pg_current_xact_id()")
        with pytest.raises(RefusedError, match="stays open"):
            make(outbox_db, wait_s=0.1)
    assert indexes(outbox_db) == []
    assert left(outbox_db) == [0, 0, 0]


def test_neither_creation_nor_drop_takes_a_lock_that_a_writer_waits_for(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    fill(outbox_db, 1_000)
    with psycopg.connect(outbox) as writing, psycopg.connect(outbox, autocommit=True) as other:
        publish(writing)  # so that the index waits for it
        creating, result = in_a_thread(outbox)
        eventually(
            lambda: bool(outbox_db.execute("SELECT FROM pg_stat_progress_create_index").fetchall()),
            what="the index is being built",
        )
        other.execute("SET lock_timeout = '1ms'")
        seq = publish(other)
        other.execute("UPDATE entity_changes SET processed = true, processed_at = now() WHERE seq = %s", [seq])
        other.execute("DELETE FROM entity_changes WHERE seq = %s", [seq])
        writing.commit()
        creating.join(30)
        assert isinstance(result[0], int)
        publish(writing)
        with psycopg.connect(outbox, autocommit=True) as dropping:
            dropped = threading.Thread(target=SUBSCRIPTIONS.drop, args=[dropping, "search"])
            dropped.start()
            eventually(lambda: left(outbox_db)[0] == 0, what="the subscription is dropped")
            publish(other)
            writing.commit()
            dropped.join(30)
    assert indexes(outbox_db) == []


# --- names, and those that are there -------------------------------------------------------------------------------


def test_one_that_is_there_is_refused_and_said_how_it_differs(outbox_db: psycopg.Connection) -> None:
    number = make(outbox_db, types=["order", "item"])
    with pytest.raises(RefusedError, match="it takes the types item, order, and not every type") as refused:
        make(outbox_db)
    assert "cdc subscription drop search" in refused.value.hint
    with pytest.raises(RefusedError, match="it takes the types item, order; since") as refused:
        make(outbox_db, types=["item", "order"])
    assert "--if-not-exists" in refused.value.hint
    there, is_new = SUBSCRIPTIONS.create(outbox_db, "search", types=["item", "order"], if_not_exists=True)
    assert (there.number, is_new) == (number, False)
    with pytest.raises(RefusedError):
        SUBSCRIPTIONS.create(outbox_db, "search", types=["item"], if_not_exists=True)


def test_two_are_not_created_at_once(outbox: str, outbox_db: psycopg.Connection) -> None:
    make(outbox_db, "other")
    with psycopg.connect(outbox) as writing:
        publish(writing)
        creating, _ = in_a_thread(outbox)
        eventually(lambda: noted(outbox_db), what="the creation waits for who writes")
        with pytest.raises(RefusedError, match="being created or dropped"):
            make(outbox_db, "third", start="beginning")
        writing.commit()
        creating.join(30)
    assert make(outbox_db, "third", start="beginning")


def test_a_number_is_not_used_again(outbox_db: psycopg.Connection) -> None:
    first = make(outbox_db)
    SUBSCRIPTIONS.drop(outbox_db, "search")
    assert make(outbox_db) > first


def test_an_unknown_one_is_answered_with_the_nearest(outbox_db: psycopg.Connection) -> None:
    make(outbox_db)
    for ask in (SUBSCRIPTIONS.named, SUBSCRIPTIONS.drop):
        with pytest.raises(NotFoundError, match="there is no subscription serach") as missing:
            ask(outbox_db, "serach")
        assert missing.value.hint == "did you mean search?"


def test_an_outbox_of_an_earlier_version_says_what_to_do(outbox_db: psycopg.Connection) -> None:
    outbox_db.execute("DROP TABLE cdc_subscriptions")
    with pytest.raises(SchemaError) as old:
        SUBSCRIPTIONS.all(outbox_db)
    assert "cdc db upgrade" in old.value.hint


def test_outboxes_of_other_schemas_have_their_own(database: str, db: psycopg.Connection) -> None:
    hostile = 'a"b%c d'
    migrations.install(db, "public")
    migrations.install(db, hostile)
    there = Subscriptions(hostile)
    number = there.create(db, "search")[0].number
    quoted = sql.Identifier(hostile).as_string()
    db.execute(f"SELECT {quoted}.publish_change('x', '1')".encode())
    assert taken(db, number, quoted.replace("%", "%%")) == [1]
    assert SUBSCRIPTIONS.all(db) == []
    [figures] = there.progress(db)
    assert figures.behind == 1
    there.drop(db, "search")
    assert there.all(db) == []


# --- pause and drop ------------------------------------------------------------------------------------------------

_FORMERLY = """
ALTER TABLE cdc_subscriptions ADD COLUMN paused_at timestamptz, ADD COLUMN paused_because text;
DELETE FROM cdc_migrations WHERE version = 21
"""


def _pause(db: psycopg.Connection, subscription: str | None, entity_type: str | None = None) -> Pause:
    return CONTROLS.pause(db, Pause(0, subscription, entity_type, because="a test", set_by="anna")).pause


def test_one_is_paused_by_what_concerns_all_of_it_and_names_what_concerns_a_part(
    outbox_db: psycopg.Connection,
) -> None:
    make(outbox_db)
    _pause(outbox_db, "default")
    _pause(outbox_db, "billing")
    of_type = _pause(outbox_db, "search", "order")
    [found] = SUBSCRIPTIONS.progress(outbox_db)
    assert (found.paused, [each.pause.id for each in found.pauses]) == (None, [of_type.id])
    everywhere = _pause(outbox_db, None)
    [found] = SUBSCRIPTIONS.progress(outbox_db)
    assert found.paused is not None
    assert found.paused.pause.id == everywhere.id


def test_a_drop_ends_its_pauses_so_that_another_one_of_its_name_is_not_born_paused(
    outbox_db: psycopg.Connection,
) -> None:
    make(outbox_db)
    for subscription in ("search", "billing", None):
        _pause(outbox_db, subscription)
    SUBSCRIPTIONS.drop(outbox_db, "search")
    assert [each.pause.subscription for each in CONTROLS.all(outbox_db)] == ["billing", None]


def test_an_upgrade_keeps_what_is_paused_with_its_beginning_and_its_reason(outbox_db: psycopg.Connection) -> None:
    for name in ("search", "billing", "audit", "mail"):
        make(outbox_db, name)
    outbox_db.execute(_FORMERLY.encode())
    outbox_db.execute(
        """
        UPDATE cdc_subscriptions SET paused_at = '2026-01-31T18:00Z', paused_because = CASE name
          WHEN 'search' THEN 'index is rebuilt' WHEN 'billing' THEN repeat('é', 3000) END WHERE name <> 'audit'
        """
    )
    migrations.upgrade(outbox_db, "public")
    found = {each.pause.subscription: each for each in CONTROLS.all(outbox_db)}
    assert found.keys() == {"search", "billing", "mail"}
    assert found["search"].pause.because == "index is rebuilt"
    assert {each.set_at.isoformat() for each in found.values()} == {"2026-01-31T18:00:00+00:00"}
    assert {each.until for each in found.values()} == {None}
    assert {each.subscription.name: each.paused is not None for each in SUBSCRIPTIONS.progress(outbox_db)} == {
        "audit": False, "billing": True, "mail": True, "search": True
    }  # fmt: skip
    assert migrations.verify(outbox_db, "public") == []
    outbox_db.execute("DELETE FROM cdc_migrations WHERE version = 21")
    migrations.upgrade(outbox_db, "public")
    assert len(CONTROLS.all(outbox_db)) == 3


def test_a_drop_leaves_nothing_of_it_and_all_of_others(
    outbox_db: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subscriptions, "_DROP_BATCH", 3)
    seqs = [publish(outbox_db, "order", f"{n}") for n in range(10)]
    search, billing = make(outbox_db, start="beginning"), make(outbox_db, "billing", start="beginning")
    fail(outbox_db, search, *seqs)
    fail(outbox_db, billing, *seqs[:4])
    SUBSCRIPTIONS.drop(outbox_db, "search")
    assert left(outbox_db) == [1, SHARDS, 4]
    assert taken(outbox_db, billing) == seqs[4:]


def test_what_an_interrupted_drop_has_left_goes_with_the_next(outbox_db: psycopg.Connection) -> None:
    [seq] = [publish(outbox_db)]
    number = make(outbox_db, start="beginning")
    fail(outbox_db, number, seq)
    outbox_db.execute("DELETE FROM cdc_subscriptions")
    make(outbox_db, "billing")
    SUBSCRIPTIONS.drop(outbox_db, "billing")
    assert left(outbox_db)[2] == 0


# --- figures -------------------------------------------------------------------------------------------------------


def test_figures_say_how_far_each_is_and_what_it_holds_back(outbox_db: psycopg.Connection) -> None:
    seqs = [publish(outbox_db, entity_type, f"{n}") for n in range(5) for entity_type in ("order", "item")]
    orders, items = seqs[::2], seqs[1::2]
    make(outbox_db, "all", start="beginning")
    only = make(outbox_db, "orders", types=["order"], start="beginning")
    process(outbox_db, *seqs[:4])
    fail(outbox_db, only, orders[0])
    fail(outbox_db, only, orders[1], dead=True)
    finish(outbox_db, make(outbox_db, "done", start="beginning"))
    found = {each.subscription.name: each for each in SUBSCRIPTIONS.progress(outbox_db)}
    counted = {name: (each.behind, each.held_back, each.waiting, each.dead, each.more) for name, each in found.items()}
    assert counted == {"all": (10, 4, 0, 0, False), "orders": (3, 4, 1, 1, False), "done": (0, 0, 0, 0, False)}
    assert found["done"].oldest_age_s is None
    assert (found["all"].oldest_age_s or 0) > 0
    assert items


def test_what_it_keeps_of_types_that_it_does_not_take_is_named(outbox_db: psycopg.Connection) -> None:
    seqs = [publish(outbox_db, "item", f"{n}") for n in range(5)]
    number = make(outbox_db, types=["order"], start="beginning")
    process(outbox_db, *seqs)
    assert Retention("public").prunable(outbox_db, 0) == (0, False), "nobody has passed them yet"
    [figures] = SUBSCRIPTIONS.progress(outbox_db)
    assert (figures.behind, figures.oldest_age_s, figures.held_back) == (0, None, 5)
    finish(outbox_db, number)
    [figures] = SUBSCRIPTIONS.progress(outbox_db)
    assert (figures.held_back, Retention("public").prunable(outbox_db, 0)) == (0, (5, False))


def test_figures_are_bounded_and_say_so(outbox_db: psycopg.Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subscriptions, "_PER_SHARD", 2)
    for _ in range(5):
        publish(outbox_db, "order", "same key")
    make(outbox_db, start="beginning")
    [figures] = SUBSCRIPTIONS.progress(outbox_db)
    assert (figures.behind, figures.more) == (2, True)
