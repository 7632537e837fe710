"""Which harnesses there are."""

from __future__ import annotations

from vallum.agent.harness.base import Harness
from vallum.agent.harness.claude_code import ClaudeCode
from vallum.agent.harness.codex import Codex
from vallum.agent.harness.gemini_cli import GeminiCli
from vallum.agent.harness.mini_swe_agent import MiniSweAgent
from vallum.agent.harness.opencode import OpenCode
from vallum.core.errors import InvalidInput

HARNESSES: dict[str, Harness] = {
    one.name: one for one in (Codex(), ClaudeCode(), MiniSweAgent(), OpenCode(), GeminiCli())
}


def find_harness(name: str) -> Harness:
    """The harness of that name.

    Raises:
        InvalidInput: there is none.
    """
    found = HARNESSES.get(name)
    if found is None:
        raise InvalidInput(f"there is no harness {name!r}: use one of {', '.join(sorted(HARNESSES))}")
    return found
