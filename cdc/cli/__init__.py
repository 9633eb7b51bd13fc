"""The command line: arguments and printing. What a command does is elsewhere, and testable without it.

Exit codes: 0 fine, 1 findings or failure, 2 usage, 3 cannot connect, 4 not found, 5 refused for safety, 128 and its
number after a signal, such as 130 after Ctrl-C.
"""

from __future__ import annotations

import difflib
import importlib
import traceback
from typing import Any, NoReturn

import click

from cdc import __version__
from cdc.cli.commands import Commands
from cdc.cli.output import say, say_lines
from cdc.core.errors import CdcError
from cdc.core.masking import mask
from cdc.core.printable import printable
from cdc.runtime.process import Interrupted, handle_signals, leave

COMMANDS = {
    "run": ("cdc.cli.run", "Hand committed changes to your handlers."),
    "demo": ("cdc.cli.demo", "Watch changes travel, on a throw-away server."),
    "db": ("cdc.cli.db", "Install, upgrade and check the database objects."),
    "track": ("cdc.cli.track", "Capture the changes of a table."),
    "untrack": ("cdc.cli.track", "Stop capturing the changes of a table."),
    "backfill": ("cdc.cli.backfill", "Have the rows handled that a tracked table has already."),
    "tracked": ("cdc.cli.track", "List the tables whose changes are captured."),
    "status": ("cdc.cli.status", "Show who works, how fast, and what is not processed."),
    "outbox": ("cdc.cli.outbox", "Look at changes, decide about dead letters, remove old ones."),
    "pause": ("cdc.cli.controls", "Let consumers start nothing of a type, a handler, a key, or at all."),
    "resume": ("cdc.cli.controls", "End a pause."),
    "controls": ("cdc.cli.controls", "List what is paused and limited, by whom, until when and why."),
    "limits": ("cdc.cli.limits", "How often handlers may be called, over all consumers: set, list, clear."),
    "actions": ("cdc.cli.actions", "List what operators have done, to what, why and when."),
    "ui": ("cdc.cli.ui", "Show what is going on on pages, and let operators act."),
    "subscription": ("cdc.cli.subscription", "Let further services read the outbox, each at its own pace."),
    "slot": ("cdc.cli.slot", "Create, drop and inspect the replication slot."),
    "doctor": ("cdc.cli.doctor", "Check every precondition, each with its remedy."),
    "smoke": ("cdc.cli.smoke", "Send one test event to a broker."),
    "config": ("cdc.cli.config", "Show the settings in force."),
    "whatsapp": ("cdc.cli.whatsapp", "Receive webhooks of the documented application, and try it."),
    "healthcheck": ("cdc.cli.healthcheck", "Ask the consumer on this host whether it is alive."),
}
"""Name to (module that defines a command of that name, what --help says of it)."""


class _Root(Commands):
    """Imports a command's module when it is used, so that ``cdc --help`` waits for no driver."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(importlib.import_module(COMMANDS[cmd_name][0]), cmd_name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            close = difflib.get_close_matches(args[0], COMMANDS, n=1)
            ctx.fail(f"no such command {args[0]!r}" + (f": did you mean {close[0]}?" if close else ""))
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, purpose) for name, (_, purpose) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            # The message quotes the command line, where a DSN may stand in the wrong place.
            error.message = printable(mask(error.message))  # type: ignore[misc]
            raise
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise  # click handles these; a reader that closes the pipe (| head) is no error
        except KeyboardInterrupt as interrupt:
            ctx.exit(128 + interrupt.number if isinstance(interrupt, Interrupted) else 130)
        except Exception as error:  # noqa: BLE001 - every error is shown as a sentence
            if ctx.params["debug"]:
                say_lines(mask(traceback.format_exc().rstrip()))
            failure = _explained(error)
            say(f"Error: {mask(str(failure))}")
            if failure.hint:
                say(f"  {failure.hint}")
            ctx.exit(failure.exit_code)


def _explained(error: Exception) -> CdcError:
    if isinstance(error, CdcError):
        return error
    from cdc.postgres.connect import explain  # noqa: PLC0415 - --help does not wait for the driver to load

    # The class without the text: an unexpected error may quote anything.
    return explain(error) or CdcError(
        f"unexpected {type(error).__name__}; this is a fault of cdc", hint="run cdc --debug ... for the traceback"
    )


@click.group(cls=_Root, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="cdc", message="%(prog)s %(version)s")
@click.option("--debug", is_flag=True, help="Show the traceback of an error. It may quote data.")
def cdc(debug: bool) -> None:
    """Change data capture for PostgreSQL: committed rows reach their handlers, in order, at once.

    Settings come from options, then CDC_* variables, then cdc.toml. The database is --dsn, CDC_DSN or the variables
    of psql (PGHOST, PGDATABASE, PGSERVICE, ...).
    """


def main() -> NoReturn:
    handle_signals()
    try:
        cdc(prog_name="cdc")
    except SystemExit as end:
        leave(end.code if isinstance(end.code, int) else 0 if end.code is None else 1)
    raise AssertionError("click ends the process")
