"""The parts of cdc.postgres.migrations and cdc.postgres.tracking that need no database."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc.core.errors import UsageError
from cdc.core.model import SHARDS, Operation, message_prefix, trigger_name
from cdc.postgres import catalogs, migration_scripts, tracked_tables
from cdc.postgres.catalogs import Difference


def test_no_two_migrations_have_the_same_number_and_each_says_what_it_is_for_first():
    found = migration_scripts.migrations()
    numbers = [migration.version for migration in found]
    assert numbers == sorted(set(numbers))
    assert all(migration.template.startswith("-- ") for migration in found)


def test_the_shard_is_computed_modulo_the_models_number_of_shards():
    assert f"& {SHARDS - 1})::smallint" in migration_scripts.migrations()[0].template
    assert SHARDS & (SHARDS - 1) == 0, "a mask is a modulo only for a power of two"


def test_placeholders_become_quoted_names_in_one_pass():
    rendered = migration_scripts.render("@schema@ @schema_literal@ @prefix_literal@", "@schema_literal@'\"")
    assert rendered == """"@schema_literal@'\""" '@schema_literal@''"' 'entity_change:%40schema_literal%40%27%22'"""
    assert migration_scripts.render("@prefix_literal@", "a", prefix_schema="b") == f"'{message_prefix('b')}'"


@given(st.text(min_size=1, max_size=20))
def test_no_schema_name_escapes_its_quotes(name: str):
    identifier, literal = (
        migration_scripts.render("@schema@\0@schema_literal@", name).split("\0") if "\0" not in name else ("", "")
    )
    assert not identifier or identifier == '"' + name.replace('"', '""') + '"'
    assert "'" not in literal.removeprefix(" E")[1:-1].replace("''", "")


@pytest.mark.parametrize("name", ["", "x" * 64, "é" * 32, "a\0b", "pg_mine", "a$cdc$b"])
def test_a_name_that_postgresql_or_the_migrations_cannot_take_is_refused_before_anything_runs(name: str):
    with pytest.raises(UsageError):
        migration_scripts.print_sql(name)


def test_compare_names_a_missing_object_once_and_each_difference():
    expected = {"table t": "relkind r", "column a of table t": "int", "view v": "x", "query of view v": "SELECT 1"}
    assert catalogs.compare(expected, expected) == []
    assert catalogs.compare(expected, {}) == [
        Difference("table t", "missing", expected="relkind r"),
        Difference("view v", "missing", expected="x"),
    ]
    found = {"table t": "relkind r", "view v": "x", "query of view v": "SELECT 2", "table other": "relkind r"}
    assert [str(finding) for finding in catalogs.compare(expected, found)] == [
        "column a of table t is missing",
        "query of view v is different: SELECT 2, not SELECT 1",
    ]
    assert (
        str(Difference("body of function f", "different", expected="a\nb", found="c"))
        == "body of function f is different"
    )


def test_what_somebody_has_added_counts_where_it_hangs_on_an_object_of_ours():
    expected = {"table t": "relkind r"}
    added = {"trigger x of table t": "x", "policy x of table other": "x", "column x of table t": "int"}
    assert catalogs.compare(expected, {**expected, **added}) == [
        Difference("trigger x of table t", "not ours", found="x")
    ]


def test_whatever_the_migrations_make_is_looked_at_for_its_owner():
    """Else somebody could make it before, and it would be adopted."""
    looked_at = (migration_scripts.folder() / "ownership.sql").read_text()
    all_of_them = migration_scripts.migrations() + migration_scripts.migrations("legacy_processor")
    scripts = [each.template for each in all_of_them] + [migration_scripts.CREATE_LEDGER]
    made = {
        name
        for script in scripts
        for name in re.findall(
            r"CREATE (?:OR REPLACE )?(?:TABLE|VIEW|FUNCTION)(?: IF NOT EXISTS)? @schema@\.(\w+)", script
        )
    }
    assert len(made) >= 9
    assert {name for name in made if f"'{name}'" not in looked_at} == set()


def test_our_trigger_is_named_after_the_schema_unless_it_is_public_and_never_cut_inside_a_character():
    assert trigger_name("public") == "#cdc_capture"
    assert trigger_name("tenant") == "#cdc_capture_tenant"
    assert len(trigger_name("é" * 31).encode()) <= 63


@given(
    st.none() | st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1),
    st.lists(st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1), min_size=1),
    st.lists(st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1)),
)
def test_trigger_arguments_are_read_as_they_were_written(entity_type: str | None, key: list[str], exclude: list[str]):
    named, options = tracked_tables.arguments(
        tracked_tables.Tracked(
            table="t", trigger="x", operations=tuple(Operation), entity_type=entity_type, key=tuple(key),
            exclude=tuple(exclude), handled=True, more=(("new", "true"),),
        )
    )  # fmt: skip
    read = tracked_tables.read_options(options)
    assert (named, read["key"], read.get("exclude", ())) == (entity_type or "", tuple(key), tuple(exclude))
    assert (read["handled"], read["more"]) == (True, (("new", "true"),))


def test_a_key_that_is_the_column_id_is_written_as_the_capture_function_knows_it_without_reading_it():
    """Or each row pays for the reading of JSON."""
    usual = tracked_tables.Tracked(table="t", trigger="x", operations=tuple(Operation), entity_type=None, key=("id",))
    _, options = tracked_tables.arguments(usual)
    [capture] = [migration.template for migration in migration_scripts.migrations() if migration.name == "capture"]
    assert f"IF TG_ARGV[1] <> '{options}' THEN" in capture


@given(st.text(min_size=1), st.none() | st.text())
def test_what_a_trigger_remembers_of_its_schemas_is_read_as_it_was_written(pattern: str, template: str | None):
    asked = tracked_tables.Tracked(
        table="t", trigger="x", operations=tuple(Operation), entity_type=None, all_schemas=pattern,
        type_template=template or "",
    )  # fmt: skip
    read = tracked_tables.read_remembered(tracked_tables.remembered(asked))
    assert (read["all_schemas"], read.get("type_template", "")) == (pattern, template or "")


@pytest.mark.parametrize(
    "argument", ["", "no JSON", "[1]", "[" * 3000, '{"schemas": 1, "type": null}', '{"other": ""}']
)
def test_a_third_argument_of_somebody_else_says_nothing(argument: str):
    assert tracked_tables.read_remembered(argument) == {}


@pytest.mark.parametrize(
    ("options", "read"),
    [
        ("", {"more": ()}),
        ('{"exclude": ["a"]}', {"exclude": ("a",), "more": ()}),
        ('{"key": ["b"], "columns": ["a", "b"], "handled": true}',
         {"key": ("b",), "columns": ("a", "b"), "handled": True, "more": ()}),
        ('{"handled": "true", "virtual": 1, "new": true}', {"more": (("new", "true"),)}),
        ("not json", {"broken": "its options are no JSON"}),
        ("[" * 3000, {"broken": "its options are no JSON"}),
        ('{"a":' * 3000, {"broken": "its options are no JSON"}),
        ("[1]", {"broken": "its options are no JSON object"}),
        ('{"key": null}', {"broken": "its option key is no list of columns"}),
        ('{"key": "id"}', {"broken": "its option key is no list of columns"}),
        ('{"exclude": [1]}', {"broken": "its option exclude is no list of columns"}),
    ],
)  # fmt: skip
def test_options_of_a_trigger_made_by_hand_are_read_or_reported_as_broken(options: str, read: object):
    assert tracked_tables.read_options(options) == read
