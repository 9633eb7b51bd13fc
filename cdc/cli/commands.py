"""A command that has commands, without what these load."""

from __future__ import annotations

import click

_UNCUT = 1_000


class Commands(click.Group):
    """Its list says of each command the whole first sentence; click would cut it."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        found = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl([(name, each.get_short_help_str(_UNCUT)) for name, each in found if each])

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            if error.possibilities:
                raise
            where, name = ctx.command_path, error.option_name
            ctx.fail(f"no such option {name} before the command: write {where} COMMAND {name}")
