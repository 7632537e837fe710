"""Cgroup drivers: one contract, one file per hierarchy layout."""
