"""Quantities as people read them. One place, so that the terminal and the report say the same."""

from __future__ import annotations


def show_duration(ns: int | None) -> str:
    """Nanoseconds as ``850 ns``, ``12.3 ms``, ``4.56 s``, ``3 min 07 s`` or ``2 h 05 min``; None as ``-``."""
    if ns is None:
        return "-"
    if ns < 0:
        return f"-{show_duration(-ns)}"
    for below, divisor, unit in ((1_000, 1, "ns"), (1_000_000, 1_000, "µs"), (1_000_000_000, 1_000_000, "ms")):
        if ns < below:
            return f"{_three(ns / divisor)} {unit}"
    seconds = ns / 1e9
    if seconds < 60:
        return f"{_three(seconds)} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def show_bytes(count: int | None) -> str:
    """Bytes as ``0 B``, ``512 B``, ``1.5 KiB``, ``20 MiB``...; None as ``-``."""
    if count is None:
        return "-"
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            return f"{count} B" if unit == "B" else f"{_three(value)} {unit}"
        value /= 1024
    raise AssertionError


def _three(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value >= 100:
        return f"{value:.0f}"
    text = f"{value:.1f}" if value >= 10 else f"{value:.2f}"
    return text.rstrip("0").rstrip(".")
