"""opencode: one native program, speaks chat completions through its OpenAI-compatible provider."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence

from vallum.agent.harness.base import MODEL_BASE, STATE, Dialect, Installer, Launch

_ARCH = {"x86_64": "x64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())


class OpenCode:
    """See :class:`vallum.agent.harness.base.Harness`."""

    name = "opencode"
    version = "1.18.33"
    dialect: Dialect = "chat"
    installer: Installer = "npm"
    packages: Sequence[str] = ("opencode-ai@1.18.33",)
    program = f"node_modules/opencode-linux-{_ARCH}/bin/opencode"
    shows_command = "bash -c CMD"

    def make_launch(self, place: str, task: str, *, model: str) -> Launch:
        """See the contract."""
        home = f"{STATE}/opencode"
        config = {
            "$schema": "https://opencode.ai/config.json",
            "autoupdate": False,
            "share": "disabled",
            "permission": {"edit": "allow", "bash": "allow", "webfetch": "allow"},
            "model": f"vallum/{model}",
            "small_model": f"vallum/{model}",
            "provider": {
                "vallum": {
                    "npm": "@ai-sdk/openai-compatible",
                    "name": "vallum",
                    "options": {"baseURL": f"{MODEL_BASE}/v1", "apiKey": "{env:OPENAI_API_KEY}"},
                    "models": {model: {"name": model}},
                }
            },
        }
        return Launch(
            argv=[f"{place}/{self.program}", "run", "--format", "json", task],
            environ={
                "OPENCODE_CONFIG": f"{home}/opencode.json",
                "XDG_CONFIG_HOME": f"{home}/config",
                "XDG_DATA_HOME": f"{home}/data",
                "XDG_CACHE_HOME": f"{home}/cache",
                "XDG_STATE_HOME": f"{home}/state",
                "OPENCODE_DISABLE_AUTOUPDATE": "1",
                "OPENCODE_DISABLE_MODELS_FETCH": "1",
            },
            files={f"{home}/opencode.json": json.dumps(config).encode()},
        )
