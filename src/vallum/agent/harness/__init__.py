"""Agents of others, unmodified, at work in a cell behind its model door. One file an agent; ``base`` is the contract."""
