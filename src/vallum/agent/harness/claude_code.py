"""Claude Code: one native program, speaks the Anthropic messages API."""

from __future__ import annotations

import platform
from collections.abc import Sequence

from vallum.agent.harness.base import MODEL_BASE, STATE, Dialect, Installer, Launch

_ARCH = {"x86_64": "x64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())


class ClaudeCode:
    """See :class:`vallum.agent.harness.base.Harness`.

    The program is taken from the package of the platform: what the main package's install script would link to.
    """

    name = "claude-code"
    version = "2.1.197"
    dialect: Dialect = "messages"
    installer: Installer = "npm"
    packages: Sequence[str] = ("@anthropic-ai/claude-code@2.1.197",)
    program = f"node_modules/@anthropic-ai/claude-code-linux-{_ARCH}/claude"
    shows_command = "bash -c \"... eval 'CMD' ...\""

    def make_launch(self, place: str, task: str, *, model: str) -> Launch:
        """See the contract."""
        return Launch(
            argv=[
                f"{place}/{self.program}", "-p", task, "--output-format", "stream-json", "--verbose",
                "--dangerously-skip-permissions",
            ],
            environ={
                "ANTHROPIC_BASE_URL": MODEL_BASE,
                "ANTHROPIC_MODEL": model,
                "ANTHROPIC_SMALL_FAST_MODEL": model,
                "CLAUDE_CONFIG_DIR": f"{STATE}/claude",
                "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
                "DISABLE_AUTOUPDATER": "1",
                "DISABLE_TELEMETRY": "1",
                "IS_SANDBOX": "1",
            },
        )  # fmt: skip
