"""How the user can call this program again, for hints that can be pasted."""

from __future__ import annotations

import os
import shutil
import sys


def program() -> str:
    """``vallum`` where the shell would find it, else the path it was started by, relative to here when shorter."""
    if shutil.which("vallum") is not None:
        return "vallum"
    called = sys.argv[0]
    if not called.endswith("vallum"):
        return f"{os.path.relpath(sys.executable)} -m vallum"
    return min(os.path.relpath(called), called, key=len)
