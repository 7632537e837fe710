"""Containment facts as plain data, the same under ``extra.vallum`` of every format. Pure."""

from __future__ import annotations

from typing import Any

import msgspec

from vallum.record.trajectory import Containment


def describe_containment(facts: Containment) -> dict[str, Any]:
    """Counts always; lists and unknown figures only where there is something in them."""
    told: dict[str, Any] = {
        "steps": facts.steps,
        "denied": facts.denied,
        "processes": facts.processes,
        "allowed_flows": facts.allowed,
        "bytes_out": facts.bytes_out,
        "bytes_in": facts.bytes_in,
        "contaminated": facts.is_contaminated,
        "confidence": facts.confidence,
        "methods": facts.methods,
    }
    more: dict[str, Any] = {
        "cpu_ns": facts.cpu_ns,
        "memory_peak_bytes": facts.memory_peak_bytes,
        "denied_late": facts.denied_late,
        "left_running": facts.left_running,
        "denied_flows": facts.denials,
        "findings": facts.findings,
        "approvals": facts.approvals,
        "files_changed": facts.files,
        "packages": facts.packages,
        "commands": facts.commands,
        "actions": facts.actions,
    }
    plain: dict[str, Any] = msgspec.to_builtins({name: value for name, value in more.items() if value})
    return told | plain


def file_stem(*names: str) -> str:
    """Names of the record joined to one that is safe as a file's, whatever they hold."""
    joined = ".".join(names)
    return "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "_" for c in joined).lstrip(".")[:180] or "_"
