"""`--diff`: what an agent changed, for a person."""

from __future__ import annotations

from collections.abc import Sequence

import click

from vallum.client.snapshots import FileChange
from vallum.core.text import show


def print_changes(changes: Sequence[FileChange], own: Sequence[str] = ()) -> None:
    """One line a change on standard error. What lies in ``own``, where an agent keeps its state, is only counted."""
    kept = 0
    for change in changes:
        if any(change.path == place or change.path.startswith(f"{place}/") for place in own):
            kept += 1
        else:
            click.echo(f"{change.change:8} {show(change.path, 4096)}", err=True)
    if kept:
        click.echo(f"-- and {kept} in {' and '.join(own)}, the agent's own: `vallum diff` lists them", err=True)
