"""Cells: one contract (base), one folder or file per isolation level, cgroup drivers and images. Knows nothing of rules or the record."""
