"""`vallum credentials`: secrets that the gateway puts into granted requests. Values come from stdin, a prompt or a descriptor."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import BinaryIO

import click
import msgspec
from rich.console import Console
from rich.table import Table

from vallum.cli.groups import Group
from vallum.client.connection import prepare
from vallum.client.places import Places
from vallum.core.errors import InvalidInput
from vallum.core.text import show
from vallum.node.credentials import MAX_SECRET_BYTES, CredentialStore, StoredCredential, read_header


@click.group(cls=Group)
def credentials() -> None:
    """Keep secrets for granted hosts: a rule with `credential = "NAME"` sends one; no guest ever has it."""


@credentials.command()
@click.argument("name")
@click.option("--host", "hosts", multiple=True, required=True, metavar="HOST", help="Where it may be sent. Repeatable.")
@click.option("--header", metavar="NAME", help="Header that carries it (default: authorization).")
@click.option(
    "--prefix", metavar="TEXT", help="Before it in the header (default: 'Bearer ' in authorization, else none)."
)
@click.option("--basic", is_flag=True, help="It is user:password for Authorization: Basic.")
@click.option("--ssh-key", is_flag=True, help="It is a private key in PEM form.")
@click.option("--user", default="", metavar="NAME", help="With --ssh-key: who logs in, whomever the guest names.")
@click.option(
    "--known-hosts",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="With --ssh-key: known_hosts lines of the servers it is for.",
)
@click.option("--fd", type=int, metavar="N", help="Read the secret from descriptor N instead of stdin.")
@click.option("--keyring", is_flag=True, help="Keep the secret in the system keyring instead of a file.")
@click.option("--replace", is_flag=True, help="Instead of one of that name.")
@click.pass_obj
def add(
    places: Places,
    name: str,
    hosts: tuple[str, ...],
    header: str | None,
    prefix: str | None,
    basic: bool,
    ssh_key: bool,
    user: str,
    known_hosts: Path | None,
    fd: int | None,
    keyring: bool,
    replace: bool,
) -> None:
    """Keep a secret as NAME. It is asked for, or read from stdin or --fd; never from the command line.

    vallum credentials add github --host api.github.com < token
    """
    if (header is not None) + basic + ssh_key > 1:
        raise InvalidInput("--header, --basic and --ssh-key exclude each other: give one")
    if (user or known_hosts) and not ssh_key:
        raise InvalidInput("--user and --known-hosts are for --ssh-key")
    carrier, before = read_header("basic" if basic else "ssh-key" if ssh_key else header, prefix)
    stored = StoredCredential(
        name=name, hosts=hosts, header=carrier, prefix=before, user=user, place="keyring" if keyring else "file",
        host_keys=tuple(known_hosts.read_text("utf-8").splitlines()) if known_hosts else (),
    ).check()  # fmt: skip
    secret = _read_secret(name, fd, one_line=not ssh_key)
    prepare(places)
    CredentialStore(places.credentials).add(stored, secret, replace=replace)
    click.echo(f"{name}: kept in the {'keyring' if keyring else 'file store'}, for {', '.join(stored.hosts)}", err=True)


@credentials.command(name="list")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line; without secrets.")
@click.pass_obj
def list_command(places: Places, as_json: bool) -> None:
    """List what is kept. Secrets are never shown."""
    found = CredentialStore(places.credentials).list()
    if as_json:
        for one in found:
            row = {name: getattr(one, name) for name in one.__struct_fields__ if name != "secret"}
            sys.stdout.buffer.write(msgspec.json.encode(row) + b"\n")
        return
    table = Table(box=None)
    for column in ("name", "hosts", "sent as", "kept in"):
        table.add_column(column)
    for one in found:
        table.add_row(one.name, ", ".join(one.hosts), show(one.header), one.place)
    Console().print(table if found else "No credentials: `vallum credentials add NAME --host HOST` keeps one.")


@credentials.command()
@click.argument("name")
@click.pass_obj
def remove(places: Places, name: str) -> None:
    """Forget NAME. Cells that have it go on having it until their rules change or they end."""
    CredentialStore(places.credentials).remove(name)


def _read_secret(name: str, fd: int | None, *, one_line: bool) -> bytes:
    if fd is None and sys.stdin.isatty() and one_line:
        text: str = click.prompt(f"Secret of {name}", hide_input=True, err=True)
        return text.encode()
    try:
        with os.fdopen(0 if fd is None else fd, "rb", closefd=False) as file:
            raw = _read_all(file)
    except OSError as error:
        raise InvalidInput(f"the secret of {name} cannot be read: {error.strerror}") from error
    return raw.rstrip(b"\r\n") if one_line else raw


def _read_all(file: BinaryIO) -> bytes:
    return file.read(MAX_SECRET_BYTES + 16)
