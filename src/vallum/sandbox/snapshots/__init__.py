"""Sealed layers on disk: what a snapshot is, where it is kept, and what changed between two of them."""
