"""cdc db: the objects in the database."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from cdc.app.config import Settings
from cdc.cli.commands import Commands
from cdc.cli.options import database_options, json_option, open_database, settings_options, yes_option
from cdc.cli.output import confirm, print_json, print_table, put_script, say
from cdc.core.errors import UsageError
from cdc.postgres import remarks

if TYPE_CHECKING:
    from cdc.postgres.catalogs import Difference
    from cdc.postgres.connect import Connection
    from cdc.postgres.migration_scripts import Migration

with_option = click.option(
    "--with", "sets", multiple=True, metavar="NAME", help="Also an optional set: whatsapp, legacy_processor."
)
"""The command gets ``sets: tuple[str, ...]``."""

dry_run_option = click.option("--dry-run", is_flag=True, help="Print the SQL that would run, and run nothing.")


@click.group(cls=Commands)
def db() -> None:
    """Install, upgrade and check the database objects.

    \b
    One schema (--schema, default public) holds them: the table entity_changes, the functions
    capture_entity_change, publish_change and reprocess_failed_actions, and two views.
    """


@db.command()
@database_options
@with_option
@dry_run_option
def install(settings: Settings, sets: tuple[str, ...], dry_run: bool) -> None:
    """Create the objects; safe to repeat.

    An entity_changes made from the documented SQL is upgraded in place and keeps its rows: the table is locked and
    rewritten, so choose a quiet hour if it is large. Stop the legacy processor first, or let it go on next to
    the consumers with --with legacy_processor: docs/guides/migrate.md.

    --with whatsapp makes and captures the tables of that application besides, once; a table that exists is kept.
    """
    from cdc.postgres import migration_scripts, migrations  # noqa: PLC0415 - --help does not wait for the driver to load

    migration_scripts.check_sets(sets)
    with open_database(settings) as connection:
        if dry_run:
            _print_steps(migrations.pending(connection, settings.schema_, sets), settings.schema_)
            return
        migrations.on_warning(connection, say)
        applied = migrations.install(connection, settings.schema_, sets)
        _put_in_order(connection, settings.schema_)
        findings = migrations.verify(connection, settings.schema_)
    _report(settings.schema_, applied)
    _finish(findings, settings.schema_, "run `cdc db upgrade` to put it right")


@db.command()
@database_options
@dry_run_option
def upgrade(settings: Settings, dry_run: bool) -> None:
    """Bring installed objects to this version, and repair what differs from it."""
    from cdc.postgres import migrations  # noqa: PLC0415 - see install

    with open_database(settings) as connection:
        if dry_run:
            _print_steps(migrations.pending(connection, settings.schema_), settings.schema_)
            return
        migrations.on_warning(connection, say)
        applied, repaired = migrations.upgrade(connection, settings.schema_)
        _put_in_order(connection, settings.schema_)
        left = migrations.verify(connection, settings.schema_)
    _report(settings.schema_, applied)
    for finding in repaired:
        say(f"repaired: {finding}")
    _finish(left, settings.schema_, "these are changed by hand only: compare with `cdc db print`")


@db.command()
@database_options
@json_option
def verify(settings: Settings, as_json: bool) -> None:
    """Compare the objects with this version, and the triggers with their tables; exit 1 if anything does not fit."""
    from cdc.postgres import catalogs, migrations, tracking  # noqa: PLC0415 - see install

    with open_database(settings) as connection:
        findings, tracked = migrations.verify(connection, settings.schema_), []
        if not any(each.object == "function capture_entity_change()" for each in findings):
            tracked = tracking.tracked(connection, settings.schema_)
            findings += [
                catalogs.Difference(fault.object, f"at fault: {fault}")
                for fault in tracking.faults(connection, settings.schema_, tracked)
            ]
    noted = [str(remark) for remark in remarks.handled(tracked, ())]
    if as_json:
        found = [{"object": each.object, "problem": each.problem, "expected": each.expected, "found": each.found,
                  "remedy": each.by_hand} for each in findings]  # fmt: skip
        print_json({"schema_name": settings.schema_, "findings": found, "notes": noted})
    elif findings:
        print_table(["object", "problem"], ((finding.object, finding.problem) for finding in findings))
        _say_by_hand(findings)
    else:
        say(f"schema {settings.schema_} is as this version makes it")
    for note in noted if not as_json else ():
        say(f"Note: {note}")
    _exit_with(findings)


@db.command("print")
@settings_options("schema")
@with_option
@click.option(
    "--no-transaction",
    is_flag=True,
    help="Plain SQL without BEGIN, COMMIT and psql's own commands, for a migration tool that has begun a transaction.",
)
def print_(*, settings: Settings, sets: tuple[str, ...], no_transaction: bool) -> None:
    """Print one script for psql that does what install does. Needs no database."""
    from cdc.postgres import migration_scripts  # noqa: PLC0415 - see install

    put_script(migration_scripts.print_sql(settings.schema_, sets=sets, transaction=not no_transaction))


@db.command()
@database_options
@click.option("--consumer", metavar="ROLE", help="Role of cdc run: reads changes and marks them.")
@click.option("--readonly", metavar="ROLE", help="Role that only reads: dashboards, cdc outbox stats and list.")
@click.option("--operator", metavar="ROLE", help="Role that decides: also pauses and resumes, retries and discards.")
@click.option("--retention", is_flag=True, help="The consumer may also remove changes, for its setting retention.")
@click.option("--publish", is_flag=True, help="The consumer's handlers may also call publish_change().")
@click.option(
    "--with",
    "sets",
    multiple=True,
    metavar="NAME",
    help="The consumer runs the handlers of this set, such as whatsapp.",
)
@click.option("--payload", is_flag=True, help="Who reads or decides may also read the data in the changes.")
@click.option("--print", "print_only", is_flag=True, help="Print a script for psql instead. Needs no database.")
def grant(
    *,
    settings: Settings,
    consumer: str | None,
    readonly: str | None,
    operator: str | None,
    retention: bool,
    publish: bool,
    sets: tuple[str, ...],
    payload: bool,
    print_only: bool,
) -> None:
    """Give roles what they need on these objects, and nothing else; safe to repeat.

    Rights on the objects that were granted to the role and are not asked for here are taken away. Run it as the owner
    of the objects, and again after each "cdc db upgrade". Exit 1 if a role has more by other ways.
    """
    from cdc.postgres import grants, migration_scripts  # noqa: PLC0415 - see install

    migration_scripts.check_sets(sets)
    if ((retention or publish or sets) and not consumer) or (payload and not (readonly or operator)):
        raise UsageError(
            "--retention, --publish and --with are about --consumer ROLE, --payload is about --readonly ROLE or"
            " --operator ROLE"
        )
    scripts = [migration_scripts.consumer_rights(name, settings.schema_, consumer or "") for name in sets]
    granting = [script for script in scripts if script]
    grantees = [
        *([grants.consumer(consumer, retention=retention, publish=publish, scripts=granting)] if consumer else []),
        *([grants.reader(readonly, payload=payload)] if readonly else []),
        *([grants.operator(operator, payload=payload)] if operator else []),
    ]
    if not grantees or len({grantee.role for grantee in grantees}) < len(grantees):
        raise UsageError(
            "no role is named, or one twice",
            hint="--consumer ROLE, --readonly ROLE, --operator ROLE, or several, each of which is a role of its own",
        )
    if print_only:
        put_script(grants.print_sql(settings.schema_, grantees))
        return
    with open_database(settings) as connection:
        granted = grants.grant(connection, settings.schema_, grantees)
    for each in granted:
        say(f"granted to {each.role}")
        for sentence in (*each.advice, *([each.excess] if each.excess else [])):
            say(f"  {sentence}")
    if any(each.excess for each in granted):
        click.get_current_context().exit(1)


@db.command()
@database_options
@click.option("--off", is_flag=True, help="Drop them: no DDL is captured any more.")
@click.option("--print", "print_only", is_flag=True, help="Print a script for psql instead. Needs no database.")
def ddl(*, settings: Settings, off: bool, print_only: bool) -> None:
    """Make the event triggers by which DDL on tables of "cdc track TABLE --ddl event" is captured; safe to repeat.

    They fire for every role of the database, so PostgreSQL asks for a superuser; some managed services give their
    administrator this right. Refused where a role that is no superuser could run code by them.
    """
    from cdc.postgres import ddl_triggers  # noqa: PLC0415 - see install

    if print_only:
        put_script(ddl_triggers.script(settings.schema_, off=off))
        return
    with open_database(settings) as connection:
        change = ddl_triggers.disable if off else ddl_triggers.enable
        names = change(connection, settings.schema_)
    for name in names:
        say(f"{'dropped' if off else 'made'} the event trigger {name}")
    if not names:
        say("there is none" if off else "both event triggers are there already")


@db.command()
@database_options
@click.argument("name", metavar="SET")
def remove(settings: Settings, name: str) -> None:
    """Remove the optional set legacy_processor, when the legacy processor is gone: an index and two triggers.

    From then on writers send no NOTIFY, and marks are quicker. "cdc db install --with legacy_processor" is the way
    back. The tables of an application are not removed: they hold its data.
    """
    from cdc.postgres import migrations  # noqa: PLC0415 - see install

    with open_database(settings) as connection:
        removed = migrations.remove(connection, settings.schema_, name)
    say(f"removed the set {name}" if removed else f"the set {name} is not installed")


@db.command()
@database_options
@yes_option
@click.option("--discard-unprocessed", is_flag=True, help="Also when changes are not processed yet: they are lost.")
def uninstall(settings: Settings, yes: bool, discard_unprocessed: bool) -> None:
    """Drop the objects and the triggers of all tracked tables. The history of changes is lost."""
    from cdc.postgres import migrations  # noqa: PLC0415 - see install

    confirm(f"drop entity_changes and what belongs to it from schema {settings.schema_}", yes)
    with open_database(settings) as connection:
        dropped = migrations.uninstall(connection, settings.schema_, discard_unprocessed=discard_unprocessed)
    for name in dropped:
        say(f"dropped {name}")
    say("a replication slot stays, and keeps WAL while no consumer reads it: cdc slot drop")


def _put_in_order(connection: Connection, schema_name: str) -> None:
    """What is no object of the schema: the names of our triggers on others' tables, and the next number."""
    from cdc.postgres import (  # noqa: PLC0415 - see install
        ddl_triggers,
        former_triggers,
        sequence,
        table_functions,
        tracking,
    )

    tracked = tracking.tracked(connection, schema_name)
    for renaming in former_triggers.rename_all(connection, schema_name, tracked):
        if renaming.refused:
            say(f"the trigger of {renaming.table} keeps its former name: {renaming.refused}")
            say(f"  as the owner of the table: cdc track {renaming.table}")
        else:
            say(f"renamed the trigger of {renaming.table}, which fires before others now")
    for table in table_functions.refresh(connection, schema_name):
        say(f"rewrote the function that captures {table}")
    for table in ddl_triggers.note(connection, schema_name, tracked):
        say(f"noted the columns of {table}, for the next change of them")
    before = sequence.catch_up(connection, schema_name)
    if before is not None:
        say(f"{before.sequence} goes on behind the highest number; it was at {before.last}")


def _print_steps(steps: Sequence[Migration], schema_name: str) -> None:
    if steps:
        from cdc.postgres import migration_scripts  # noqa: PLC0415 - see install

        put_script(migration_scripts.print_sql(schema_name, steps))
    else:
        say(f"schema {schema_name} needs no migration")


def _report(schema_name: str, applied: Sequence[Migration]) -> None:
    for migration in applied:
        say(f"applied {migration}")
    say(f"schema {schema_name} is {'up to date now' if applied else 'up to date already'}")


def _finish(findings: Sequence[Difference], schema_name: str, hint: str) -> None:
    for finding in findings:
        say(f"{finding}")
    _say_by_hand(findings)
    if not all(finding.by_hand for finding in findings):
        say(f"  {hint}")
    _exit_with(findings)


def _say_by_hand(findings: Sequence[Difference]) -> None:
    for statement in dict.fromkeys(finding.by_hand for finding in findings if finding.by_hand):
        say(f"  as a superuser, or the owner: {statement}")


def _exit_with(findings: Sequence[Difference]) -> None:
    if findings:
        click.get_current_context().exit(1)
