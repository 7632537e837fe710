"""`vallum run`: contain any command."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import click
import msgspec

from vallum.cli.copying import check_copies, copy_all, copy_out_option
from vallum.cli.program import program
from vallum.cli.prompt import Prompt
from vallum.cli.terminal import feeding, interruptible, raw_terminal, terminal_size, write_all
from vallum.client.face import EventView, ExecResult, Node, Sandbox
from vallum.client.places import Places
from vallum.client.wire import Used
from vallum.core.errors import InvalidInput, VallumError
from vallum.core.limits import Limits
from vallum.core.scope import make_run_id
from vallum.core.text import show

_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
SHOWN_ATTEMPTS = 12


def parse_size(text: str) -> int:
    """Bytes of ``512M``, ``2G``, ``1048576``.

    Raises:
        InvalidInput: it is not a size.
    """
    word = text.strip().lower().removesuffix("ib").removesuffix("b")
    number, unit = (word[:-1], word[-1]) if word and word[-1].isalpha() else (word, "")
    try:
        return int(float(number) * _UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        raise InvalidInput(f"{text!r} is not a size: write for example 512M or 2G") from None


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--rules", "rules_file", metavar="FILE", help="Rule file (TOML).")
@click.option(
    "--allow",
    multiple=True,
    metavar="HOST[:PORT]",
    help="Grant a host, *.wildcard, address, CIDR or @bundle. Repeatable.",
)
@click.option(
    "--containment",
    type=click.Choice(["locked", "standard", "research"]),
    help="How much is granted from the start [default: standard].",
)
@click.option(
    "--image",
    default="host",
    show_default=True,
    metavar="REF",
    help="host, dir:PATH, oci:PATH, oci-archive:FILE, docker-archive:FILE or docker://NAME.",
)
@click.option(
    "--mount",
    "mounts",
    multiple=True,
    metavar="SRC:DST[:ro]",
    help="Show a host directory inside, copy-on-write: the host is never written. Repeatable.",
)
@click.option("--work", metavar="DIR", help="Show DIR copy-on-write at /work and start there.")
@click.option(
    "--env",
    "environ",
    multiple=True,
    metavar="NAME=VALUE",
    help="Set a variable inside (nothing of yours is passed by itself). Repeatable.",
)
@click.option("--user", metavar="NAME", help="User inside the cell (default: agent).")
@click.option(
    "--root",
    type=click.Choice(["plain", "owner"]),
    default="plain",
    show_default=True,
    help="Whether root inside may own and give away the cell's files and become its users (adduser, apt-get, tar).",
)
@click.option("--cpus", type=float, metavar="N", help="Cores, e.g. 1.5.")
@click.option("--memory", metavar="SIZE", help="e.g. 512M, 2G.")
@click.option("--pids", type=int, metavar="N", help="Processes and threads at once.")
@click.option("--disk", metavar="SIZE", help="Most that it may write, e.g. 1G (kept in memory; see --memory).")
@click.option(
    "--setup",
    "setups",
    multiple=True,
    metavar="CMD",
    help="Shell command in phase setup, before CMD runs in phase run. Repeatable.",
)
@click.option("--canary", "canaries", multiple=True, metavar="NAME=VALUE", help="Text that must not leave. Repeatable.")
@click.option(
    "--canary-file", "canary_files", multiple=True, metavar="NAME=FILE", help="The same, out of a file. Repeatable."
)
@click.option("--plant-canaries", is_flag=True, help="Put false keys into the cell, which are canaries.")
@click.option(
    "--credential",
    "credentials",
    multiple=True,
    metavar="NAME",
    help="Stored credential that rules may use [default: those that they name]. Repeatable.",
)
@click.option(
    "--approval-timeout",
    "approval_timeout_s",
    type=float,
    default=300.0,
    show_default=True,
    metavar="S",
    help="What rules hold is denied when nobody decides in S seconds.",
)
@click.option(
    "--package-min-age",
    "package_min_age_days",
    type=click.FloatRange(min=0),
    default=0.0,
    metavar="DAYS",
    help="Refuse versions of packages that were published less than DAYS ago, where their index says so.",
)
@copy_out_option
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0, min_open=True),
    metavar="S",
    help="End it after S seconds (exit code 124).",
)
@click.option("--run", "run_id", metavar="ID", help="Id of the run (default: a new one).")
@click.option("--level", default="ns", show_default=True, help="Isolation level.")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="One JSON object on stdout at the end; the command's own output goes to stderr.",
)
@click.option("--quiet", "-q", is_flag=True, help="No summary.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.pass_obj
def run(places: Places, /, command: tuple[str, ...], **options: Any) -> None:
    """Contain any command: `vallum run -- CMD ARG...`.

    The host's files are never written; --copy-out GUEST:HOST takes a result along. It runs in a fresh cell with a read-only view of this machine's programs, no way out but what is
    granted, and everything it does in the record. Exit code is CMD's; 125 where containment stopped it.
    """
    if not command:
        raise click.UsageError("give a command: vallum run -- CMD ARG...")
    if options["work"]:
        options["work"] = os.path.abspath(options["work"])  # noqa: PTH100 - no symlink is resolved: the user named this path
    sys.exit(asyncio.run(_run(places, list(command), options)))


async def _run(places: Places, command: list[str], options: dict[str, Any]) -> int:
    limits = Limits(
        cpus=options["cpus"],
        memory_bytes=parse_size(options["memory"]) if options["memory"] else None,
        pids=options["pids"],
        disk_bytes=parse_size(options["disk"]) if options["disk"] else None,
    ).check()
    mounts = list(options["mounts"])
    workdir = None
    if options["work"]:
        mounts.append(f"{options['work']}:/work")
        workdir = "/work"
    copies = check_copies(options["copies"])
    pty = sys.stdin.isatty() and sys.stdout.isatty() and not options["as_json"]
    out = 2 if options["as_json"] else 1
    prompt = Prompt(lambda stream, data: write_all(out if stream == "stdout" else 2, data), is_quiet=options["quiet"])
    async with Node(places=places) as node:
        sandbox = await node.sandbox(
            options["image"],
            containment=options["containment"],
            allow=options["allow"],
            rules=options["rules_file"],
            mounts=mounts,
            limits=limits,
            run=options["run_id"] or make_run_id(),
            environ=_environ(options["environ"]),
            user=options["user"],
            workdir=workdir,
            level=options["level"],
            root=options["root"],
            phase="setup" if options["setups"] else "run",
            canaries=_canaries(options["canaries"], options["canary_files"]),
            plant_canaries=options["plant_canaries"],
            credentials=options["credentials"] or None,
            approval_timeout_s=options["approval_timeout_s"],
            package_min_age_s=options["package_min_age_days"] * 86400,
            on_approval=prompt,
            command=command,
        )
        code, failure = 125, None
        try:
            result = await _set_up(sandbox, options["setups"], prompt)
            if result is None:
                result = await _attend(sandbox, command, options["timeout_s"], prompt, pty=pty)
            code = result.exit_code
        except VallumError as error:
            code, failure = error.exit_code, error
        except OSError as error:
            code, failure = 1, VallumError(f"its output could not be written: {error.strerror}; the command was ended")
            if isinstance(error, BrokenPipeError):
                code, failure = 141, None
        lost = await copy_all(sandbox, copies, quiet=options["quiet"] or options["as_json"])
        code = code or (lost.exit_code if lost is not None else 0)
        with contextlib.suppress(VallumError):
            await sandbox.close(exit_code=code)
        events = await node.events(run=sandbox.run, episode=sandbox.episode)
    if failure is not None:
        click.echo(f"vallum: {failure}", err=True)
    if options["as_json"]:
        click.echo(msgspec.json.encode(_summary(sandbox, code, failure, events)).decode())
    elif not options["quiet"]:
        print_summary(sandbox, code, events)
    return code


def _environ(pairs: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not sign or not name:
            raise InvalidInput(f"--env {pair!r} is not NAME=VALUE")
        found[name] = value
    if "TERM" in os.environ and sys.stdout.isatty():
        found.setdefault("TERM", os.environ["TERM"])
    return found


def _canaries(pairs: tuple[str, ...], files: tuple[str, ...]) -> dict[str, bytes]:
    found = {}
    for option, given in (("--canary", pairs), ("--canary-file", files)):
        for pair in given:
            name, sign, value = pair.partition("=")
            if not sign or not name:
                raise InvalidInput(f"{option} {name!r} is not NAME={'VALUE' if option == '--canary' else 'FILE'}")
            try:
                found[name] = value.encode() if option == "--canary" else Path(value).read_bytes().rstrip(b"\r\n")
            except OSError as error:
                raise InvalidInput(f"the canary {name} cannot be read from {value}: {error.strerror}") from error
    return found


async def _set_up(sandbox: Sandbox, commands: tuple[str, ...], prompt: Prompt) -> ExecResult | None:
    """Run what belongs to phase setup, all of its output on our stderr, and end the phase. The result of what failed."""
    for command in commands:
        process = sandbox.start(["sh", "-c", command], on_output=lambda _, data: prompt.write("stderr", data))
        async with interruptible(process), feeding(None, prompt):
            result = await process.wait()
        if result.exit_code != 0:
            click.echo(f"vallum: the set-up command {show(command)!r} failed, so nothing else was run", err=True)
            return result
    if commands:
        await sandbox.set_phase("run")
    return None


async def _attend(
    sandbox: Sandbox, command: list[str], timeout_s: float | None, prompt: Prompt, *, pty: bool
) -> ExecResult:
    """Run the command with our terminal, pipes and signals behind it."""
    rows, columns = terminal_size() if pty else (24, 80)
    process = sandbox.start(
        command,
        timeout_s=timeout_s,
        interactive=True,
        pty=pty,
        rows=rows,
        columns=columns,
        on_output=prompt.write,
    )
    async with interruptible(process, pty=pty), feeding(process, prompt):
        with raw_terminal(0, prompt) if pty else contextlib.nullcontext():
            return await process.wait()


DENIABLE = frozenset({"net.flow", "dns.query", "net.packet", "http.request", "model.call", "mcp.call"})


def is_denial(event: EventView) -> bool:
    """Whether an event is an attempt that was refused."""
    return event.get("verdict") == "deny" and event["kind"] in DENIABLE


def _summary(sandbox: Sandbox, code: int, failure: VallumError | None, events: list[EventView]) -> dict[str, Any]:
    used = sandbox.used
    return {
        "run": sandbox.run,
        "episode": sandbox.episode,
        "exit_code": code,
        "error": str(failure) if failure else None,
        **({name: getattr(used, name) for name in used.__struct_fields__} if used else {}),
        "denied_attempts": [event for event in events if is_denial(event)],
        "findings_list": [event for event in events if event["kind"] == "finding"],
    }


def _target(event: EventView) -> str:
    if event["kind"] == "dns.query":
        return f"DNS {event['qname']}"
    if event["kind"] == "http.request":
        return f"{event['method']} {event['scheme']}://{event['host']}:{event['port']}{event['path']}"
    if event["kind"] == "model.call":
        return f"model {event['model']} ({event['dialect']})"
    if event["kind"] == "mcp.call":
        return f"tool {event['tool']} of {event['server']}"
    host = f" ({event['dst_host']})" if event.get("dst_host") else ""
    port = f":{event['dst_port']}" if event.get("dst_port") is not None else ""
    return f"{event['protocol']} {event['dst_ip']}{port}{host}"


def print_summary(sandbox: Sandbox, code: int, events: list[EventView]) -> None:
    """What a run came to, on standard error."""

    def say(text: str) -> None:
        click.echo(text, err=True)

    used = sandbox.used
    denials = [event for event in events if is_denial(event)]
    say(click.style(f"-- vallum: run {sandbox.run}", bold=True) + f"  exit {code}")
    if used is not None:
        say(f"   {_figures(used)}")
    for event in denials[:SHOWN_ATTEMPTS]:
        process = event.get("process") or {}
        step = event["scope"]["step"]
        who = show(" ".join(process.get("argv") or []) or process.get("exe") or "?", 60)
        say(
            click.style("   denied ", fg="red")
            + f"step {step if step is not None else '?'}  {show(_target(event), 80)}  rule {event['rule']}  pid {process.get('pid', '?')} {who}"
        )
    if len(denials) > SHOWN_ATTEMPTS:
        say(f"   ... and {len(denials) - SHOWN_ATTEMPTS} more")
    for event in events:
        if event["kind"] == "finding":
            say(
                click.style("   finding ", fg="yellow")
                + f"step {event['scope']['step']}  {event['severity']}  {show(event['title'], 80)}  {' '.join(event['attack'])}"
            )
    say(f"   look: {program()} show {sandbox.run}    report: {program()} report {sandbox.run}")


def _figures(used: Used) -> str:
    parts = [
        f"{used.steps} step{'s' * (used.steps != 1)}",
        f"{used.processes} process{'es' * (used.processes != 1)}",
        f"{used.denied} denied",
    ]
    if used.findings:
        parts.append(f"{used.findings} finding{'s' * (used.findings != 1)}")
    if used.cpu_ns is not None:
        parts.append(f"cpu {used.cpu_ns / 1e9:.2f} s")
    if used.memory_peak_bytes is not None:
        parts.append(f"memory {used.memory_peak_bytes / 2**20:.0f} MiB")
    parts.append(f"out {used.bytes_out} B, in {used.bytes_in} B")
    return "  ".join(parts)
