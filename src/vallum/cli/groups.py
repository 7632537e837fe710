"""Groups of commands: their list says each command's first sentence in full."""

from __future__ import annotations

import click


class Group(click.Group):
    """As `click.Group`, which cuts the sentences of its list where the terminal ends; here they are wrapped."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands, one sentence each."""
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        rows = [(name, command.get_short_help_str(limit=1000)) for name, command in commands if command is not None]
        if rows:
            with formatter.section("Commands"):
                formatter.write_dl(rows)
