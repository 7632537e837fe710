"""Help: lists of commands say whole sentences; every command of every group has help, every option its own."""

import click
import pytest
from click.testing import CliRunner

from vallum.cli.main import cli


def _walk(command, path=()):
    yield path, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            yield from _walk(command.get_command(context, name), (*path, name))


EVERY = dict(_walk(cli))


@pytest.mark.parametrize("path", EVERY, ids=" ".join)
def test_help_is_there_and_whole(path):
    command = EVERY[path]
    assert command.help
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name
    said = CliRunner().invoke(cli, [*path, "--help"], prog_name="vallum")
    assert said.exit_code == 0
    listed = said.output.partition("\nCommands:")[2].splitlines()
    assert [line for line in listed if line.endswith("...")] == []
