"""cdc demo: see it work, with nothing set up."""

from __future__ import annotations

import click

from cdc.cli.output import paint


@click.command()
@click.option("--keep", is_flag=True, help="Stay up afterwards, until Ctrl-C, to play with psql.")
@click.option("--verbose", is_flag=True, help="Show the consumer's log as well.")
def demo(keep: bool, verbose: bool) -> None:
    """Watch changes travel from a table to their handlers, on a throw-away server.

    Needs PostgreSQL's server programs, and wal2json, on this machine. No existing server is touched, no setting
    is read, and nothing is left. Ends by itself after about 20 seconds, with 1 if a change was not processed.
    """
    from cdc.demo.play import play  # noqa: PLC0415 - --help does not wait for the driver to load

    if not play(say=click.echo, paint=paint, keep=keep, verbose=verbose):
        click.get_current_context().exit(1)
