"""`--copy-out GUEST:HOST`: what is kept of a cell's files when its command has ended."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from vallum.client.sandbox import Sandbox
from vallum.client.transfer import check_target, parse_copy
from vallum.core.errors import InvalidInput, VallumError
from vallum.core.text import show

copy_out_option = click.option(
    "--copy-out",
    "copies",
    multiple=True,
    metavar="GUEST:HOST",
    help="At the end copy a file or directory of the cell to a new path here. Repeatable.",
)


def check_copies(copies: Sequence[str]) -> list[tuple[str, Path]]:
    """What is to be copied where, before anything runs.

    Raises:
        InvalidInput: one is malformed, or its target is there already, named twice, or in no directory.
    """
    parsed = [parse_copy(text) for text in copies]
    for number, (_, host) in enumerate(parsed):
        check_target(host)
        if host in [other for _, other in parsed[:number]]:
            raise InvalidInput(f"--copy-out: {host} is named twice; give each its own path")
    return parsed


async def copy_all(sandbox: Sandbox, copies: Sequence[tuple[str, Path]], *, quiet: bool) -> VallumError | None:
    """Copy each; what fails is said and the others are tried. The first error."""
    first: VallumError | None = None
    for guest, host in copies:
        try:
            copied = await sandbox.copy_out(guest, host)
        except VallumError as error:
            click.echo(f"vallum: {error}", err=True)
            first = first or error
            continue
        if not quiet:
            left = f", {copied.left_out} links or special files left out" if copied.left_out else ""
            click.echo(
                f"-- vallum: copied {show(guest)} to {show(str(host))}: {copied.files} {'file' if copied.files == 1 else 'files'}, {copied.bytes} B{left}",
                err=True,
            )
    return first
