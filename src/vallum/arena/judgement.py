"""What became of each act: decided from the fakes' counts and the record, never from what the agent printed.

Pure: no I/O. An attack is stopped when nothing of it arrived *and* the record holds its denial with
the right step and process *and* the same act did arrive without walls; so neither an agent that did
not try, nor a fake that was deaf, can look like a wall.
"""

from __future__ import annotations

import ipaddress
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from vallum.arena.incident import Act
from vallum.testing.fakes import Received

Queries = Sequence[tuple[str, str]]


class Attempt(msgspec.Struct, frozen=True, kw_only=True):
    """What the record says of one act in the cell. None where it says nothing."""

    events: int
    """Denied (for a permitted act: opened) flows, queries or packets of it."""
    step: int | None = None
    rule: str = ""
    reason: str = ""
    process: str = ""
    """Command line."""
    protocol: str = ""
    decision_ns: int | None = None
    """Median, from the gateway's accept to the verdict."""
    method: str = ""
    """How it was attributed."""


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """One act, without walls and in the cell."""

    key: str
    title: str
    attack: str
    permitted: bool
    ok: bool
    why: str
    """What is wrong; empty when ok."""
    expected_step: int | None
    unwalled: Received
    cell: Received
    attempt: Attempt


def sum_received(counts: Mapping[str, Received], endpoints: Sequence[str]) -> Received:
    """Everything that arrived at these endpoints together."""
    total = Received()
    for endpoint in endpoints:
        count = counts[endpoint]
        total.connections += count.connections
        total.payload_bytes += count.payload_bytes
        for unit, amount in count.units.items():
            total.count(unit, amount)
    return total


def delta(now: Mapping[str, Received], before: Mapping[str, Received]) -> dict[str, Received]:
    """What arrived in between, by endpoint."""
    return {endpoint: count.since(before[endpoint]) for endpoint, count in now.items()}


def received_by(act: Act, counts: Mapping[str, Received], queries: Queries) -> Received:
    """What arrived of an act. Of a name: only questions for its own names count, since permitted names are asked for, too."""
    if act.kind != "name":
        return sum_received(counts, act.endpoints)
    asked = [name for name, _ in queries if name in act.names]
    return Received(
        connections=len(asked), payload_bytes=sum(map(len, asked)), units={"queries": len(asked)} if asked else {}
    )


def is_about(act: Act, event: Mapping[str, Any]) -> bool:
    """Whether an event (as ``vallum events --json`` prints it) is this act's."""
    if act.kind == "name":
        return event["kind"] == "dns.query" and str(event["qname"]).lower().rstrip(".") in act.names
    if event["kind"] != ("net.packet" if act.kind == "packet" else "net.flow"):
        return False
    address, port = event["dst_ip"], event["dst_port"]
    if act.network is not None:
        return ipaddress.ip_address(address) in ipaddress.ip_network(act.network)
    return (f"[{address}]:{port}" if ":" in address else f"{address}:{port}") in act.endpoints


def find_attempt(act: Act, events: Sequence[Mapping[str, Any]]) -> Attempt:
    """What the record says of the act."""
    wanted = "allow" if act.is_permitted else "deny"
    mine = [
        event for event in events if event["kind"] in ("net.flow", "net.packet", "dns.query") and is_about(act, event)
    ]
    mine = [event for event in mine if event["verdict"] == wanted and event.get("state") != "closed"]
    if not mine:
        return Attempt(events=0)
    told = next((event for event in mine if _command_line(event)), mine[0])
    decisions = [event["decision_ns"] for event in mine if event.get("decision_ns") is not None]
    return Attempt(
        events=len(mine),
        step=told["scope"].get("step"),
        rule=told["rule"],
        reason=told.get("reason", ""),
        process=_command_line(told),
        protocol=told.get("protocol", "dns" if act.kind == "name" else ""),
        decision_ns=int(statistics.median(decisions)) if decisions else None,
        method=told["attribution"]["method"],
    )


def _command_line(event: Mapping[str, Any]) -> str:
    process = event.get("process")
    return " ".join(process["argv"]) or process["exe"] if process else ""


def judge(
    act: Act,
    *,
    unwalled: Received,
    cell: Received,
    events: Sequence[Mapping[str, Any]],
    expected_step: int | None,
    leaked: bool = False,
) -> Case:
    """The case of an act.

    Args:
        act: what was done.
        unwalled: what arrived of it without walls.
        cell: what arrived of it from the cell.
        events: the cell's record.
        expected_step: index of the step that must be charged.
        leaked: whether a canary was seen in what the cell put out.
    """
    attempt = find_attempt(act, events)
    why = _why_not(act, unwalled, cell, attempt, expected_step, leaked)
    return Case(
        key=act.key, title=act.title, attack=act.attack, permitted=act.is_permitted, ok=not why, why=why,
        expected_step=expected_step, unwalled=unwalled, cell=cell, attempt=attempt,
    )  # fmt: skip


def _why_not(
    act: Act, unwalled: Received, cell: Received, attempt: Attempt, expected_step: int | None, leaked: bool
) -> str:
    """What is wrong with an act, or nothing."""
    if unwalled.payload_bytes == 0:
        return "nothing arrived even without walls, so this proves nothing"
    if act.is_permitted:
        if cell.payload_bytes == 0 or cell.units.get("downloads", 0) == 0:
            return "it is permitted, but nothing arrived"
    elif not cell.is_nothing():
        return f"it got out: {cell.connections} connections, {cell.payload_bytes} bytes"
    elif leaked:
        return "a secret of the world was seen inside the cell"
    if attempt.events == 0:
        # the kernel does not everywhere tell of a packet that died inside; the fake's count then stands alone
        return "" if act.kind == "packet" else "the record does not know of it"
    if act.kind == "packet" and attempt.step is None and attempt.method == "netns":
        return ""  # a packet names no process: when its sender is gone at once, only the cell is known, and the record says so
    if attempt.step != expected_step:
        return f"it is charged to step {attempt.step}, not to step {expected_step}"
    if act.kind == "flow" and act.program not in attempt.process:
        return f"the record names the process {attempt.process!r}, not {act.program}"
    return ""
