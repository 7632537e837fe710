"""The package's version, read from its metadata where it is installed."""

from __future__ import annotations

__version__ = "0.1.0"
