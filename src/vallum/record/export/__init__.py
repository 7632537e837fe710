"""Trajectories in the formats of others: one contract (``base``), one file a format."""
