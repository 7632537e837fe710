"""Gemini CLI: Node, speaks generateContent."""

from __future__ import annotations

import json
from collections.abc import Sequence

from vallum.agent.harness.base import MODEL_BASE, STATE, Dialect, Installer, Launch


class GeminiCli:
    """See :class:`vallum.agent.harness.base.Harness`."""

    name = "gemini-cli"
    version = "0.61.0"
    dialect: Dialect = "gemini"
    installer: Installer = "npm"
    packages: Sequence[str] = ("@google/gemini-cli@0.61.0",)
    program = "node_modules/@google/gemini-cli/package.json"
    shows_command = "bash -c $'...\\nCMD\\n...'"

    def make_launch(self, place: str, task: str, *, model: str) -> Launch:
        """See the contract."""
        home = f"{STATE}/gemini"
        settings = {
            "security": {"auth": {"selectedType": "gemini-api-key"}},
            "general": {"disableAutoUpdate": True, "disableUpdateNag": True},
            "privacy": {"usageStatisticsEnabled": False},
            "telemetry": {"enabled": False},
        }
        return Launch(
            argv=[
                f"{place}/node_modules/.bin/gemini", "-m", model, "-p", task, "--yolo", "-o", "stream-json", "--skip-trust",
            ],
            environ={
                "HOME": home,
                "GOOGLE_GEMINI_BASE_URL": MODEL_BASE,
                "GEMINI_CLI_TRUST_WORKSPACE": "true",
                "GEMINI_CLI_NO_RELAUNCH": "true",
            },
            files={f"{home}/.gemini/settings.json": json.dumps(settings).encode()},
        )  # fmt: skip
