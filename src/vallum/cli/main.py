"""The `vallum` command. Subcommands are imported when used, so that `vallum run` starts quickly."""

from __future__ import annotations

import importlib
import os
import sys

import click

from vallum.cli.groups import Group
from vallum.client.places import Places
from vallum.core.errors import VallumError
from vallum.version import __version__

COMMANDS = {
    "agent": "vallum.cli.agent:agent",
    "approvals": "vallum.cli.approvals:approvals",
    "approve": "vallum.cli.approvals:approve",
    "bench": "vallum.cli.bench:bench",
    "credentials": "vallum.cli.credentials:credentials",
    "data": "vallum.cli.data:data",
    "demo": "vallum.cli.demo:demo",
    "deny": "vallum.cli.approvals:deny",
    "diff": "vallum.cli.snapshots:diff",
    "doctor": "vallum.cli.doctor:doctor",
    "events": "vallum.cli.records:events",
    "incidents": "vallum.cli.records:incidents",
    "report": "vallum.cli.records:report",
    "rules": "vallum.cli.rules:rules",
    "run": "vallum.cli.run:run",
    "runs": "vallum.cli.records:runs",
    "show": "vallum.cli.records:show",
    "snapshots": "vallum.cli.snapshots:snapshots",
    "verify": "vallum.cli.records:verify",
}
"""Name -> where the click command is. A new command is one line here and one file beside this."""


class LazyGroup(Group):
    """Loads a subcommand's module only when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Every command, in alphabetical order."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name."""
        place = COMMANDS.get(cmd_name)
        if place is None:
            return None
        module, _, name = place.partition(":")
        command = getattr(importlib.import_module(module), name)
        assert isinstance(command, click.Command)
        return command


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="vallum")
@click.option("--home", metavar="DIR", help="Where runs are kept instead of the default (also VALLUM_HOME).")
@click.pass_context
def cli(ctx: click.Context, home: str | None) -> None:
    """Run and train tool-using AI agents behind walls.

    Every process, connection and DNS query of a contained command is charged to one step, from
    kernel facts; what is not permitted is stopped before its first byte.

    \b
    Exit codes: the contained command's own, or
      1    a check of this command failed (its message says which)
      2    the input cannot be used
      3    a record cannot be read or written
      4    a record was changed after it was written
      124  the time of a command was up
      125  containment stopped it, or a cell could not be built
      126  the command may not be executed        127  there is no such command
    """
    environ = dict(os.environ)
    if home:
        environ["VALLUM_HOME"] = os.path.abspath(home)  # noqa: PTH100 - no symlink is resolved: the user named this path
    ctx.obj = Places.from_environ(environ, os.geteuid())


def main() -> None:
    """Entry point of the console script."""
    try:
        status = cli.main(standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except VallumError as error:
        click.echo(f"vallum: {error}", err=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(status if isinstance(status, int) else 0)
