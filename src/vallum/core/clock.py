"""The only place that asks what time it is, so that tests and replays can give another answer."""

from __future__ import annotations

import time


def wall_ns() -> int:
    """Nanoseconds since the Unix epoch (may jump when the machine's clock is set)."""
    return time.time_ns()


def mono_ns() -> int:
    """Nanoseconds on CLOCK_MONOTONIC: never jumps; comparable between processes of one boot."""
    return time.monotonic_ns()
