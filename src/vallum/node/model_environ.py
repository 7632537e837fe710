"""What the guest's programs are told of the cell's model door: environment variables that agents and SDKs read by themselves.

The key is the cell's *capability*: good for this cell's own door and for nothing else, so a guest may know it. The key of
the upstream stays in the gateway.
"""

from __future__ import annotations

from vallum.gateway.kit import MODEL_HOST, Kit

BASE = f"http://{MODEL_HOST}"


def make_environ(kit: Kit) -> dict[str, str]:
    """Variables for the commands of a cell; empty when it has no model door."""
    if kit.model is None:
        return {}
    key = kit.model.capability
    return {
        "OPENAI_BASE_URL": f"{BASE}/v1",
        "OPENAI_API_BASE": f"{BASE}/v1",
        "OPENAI_API_KEY": key,
        "ANTHROPIC_BASE_URL": BASE,
        "ANTHROPIC_API_KEY": key,
        "GOOGLE_GEMINI_BASE_URL": BASE,
        "GEMINI_API_KEY": key,
    }
