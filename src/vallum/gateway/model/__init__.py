"""The model gateway: every dialect in, one unified form inside, steps opened before a tool call reaches the agent."""
