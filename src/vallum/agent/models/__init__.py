"""Models that the agent can ask: one contract (``base``), one file each."""
