"""Codex (openai/codex): native, speaks the responses API only."""

from __future__ import annotations

from collections.abc import Sequence

from vallum.agent.harness.base import MODEL_BASE, STATE, Dialect, Installer, Launch

_CONFIG = """\
model = "{model}"
model_provider = "vallum"
check_for_update_on_startup = false

[model_providers.vallum]
name = "vallum"
base_url = "{base}/v1"
env_key = "OPENAI_API_KEY"
wire_api = "responses"
request_max_retries = 2
stream_max_retries = 2
supports_websockets = false

[analytics]
enabled = false
"""


class Codex:
    """See :class:`vallum.agent.harness.base.Harness`."""

    name = "codex"
    version = "0.169.0"
    dialect: Dialect = "responses"
    installer: Installer = "npm"
    packages: Sequence[str] = ("@openai/codex@0.169.0",)
    program = "node_modules/@openai/codex/bin/codex.js"
    shows_command = "bash -c CMD"

    def make_launch(self, place: str, task: str, *, model: str) -> Launch:
        """See the contract."""
        home = f"{STATE}/codex"
        return Launch(
            argv=[
                "node", f"{place}/{self.program}", "exec", "--json", "--skip-git-repo-check",
                "--dangerously-bypass-approvals-and-sandbox", task,
            ],
            environ={"CODEX_HOME": home},
            files={f"{home}/config.toml": _CONFIG.format(model=_quote(model), base=MODEL_BASE).encode()},
        )  # fmt: skip


def _quote(text: str) -> str:
    """Inside a TOML basic string."""
    return "".join(c if c.isprintable() and c not in '"\\' else f"\\u{ord(c):04x}" for c in text)
