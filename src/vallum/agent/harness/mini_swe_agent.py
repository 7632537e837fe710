"""mini-swe-agent: Python, one shell command a turn in a process of its own; asks through LiteLLM (chat completions)."""

from __future__ import annotations

from collections.abc import Sequence

from vallum.agent.harness.base import MODEL_BASE, STATE, Dialect, Installer, Launch


class MiniSweAgent:
    """See :class:`vallum.agent.harness.base.Harness`."""

    name = "mini-swe-agent"
    version = "2.4.6"
    dialect: Dialect = "chat"
    installer: Installer = "pip"
    packages: Sequence[str] = ("mini-swe-agent==2.4.6", "mcp")  # mcp: LiteLLM imports it without requiring it
    program = "minisweagent/__init__.py"
    shows_command = "sh -c CMD"

    def make_launch(self, place: str, task: str, *, model: str) -> Launch:
        """See the contract."""
        settings = (
            "mini",
            "agent.cost_limit=0",
            "model.cost_tracking=ignore_errors",
            "model.model_kwargs.custom_llm_provider=openai",
            f"model.model_kwargs.api_base={MODEL_BASE}/v1",
        )
        return Launch(
            argv=[
                "python3", "-m", "minisweagent.run.mini", "--model", model, "--model-class", "litellm", "--task", task,
                "--exit-immediately", "--yolo", *(word for setting in settings for word in ("-c", setting)),
                "-o", f"{STATE}/mini-swe-agent/trajectory.json",
            ],
            environ={
                "PYTHONPATH": place,
                "MSWEA_CONFIGURED": "true",
                "MSWEA_SILENT_STARTUP": "true",
                "MSWEA_GLOBAL_CONFIG_DIR": f"{STATE}/mini-swe-agent",
                "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            },
        )  # fmt: skip
