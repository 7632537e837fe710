"""Compiles the C part (PID 1, fork server and cell builder) into one static binary while the package is built."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "native"
BINARY = ROOT / "src" / "vallum" / "native" / "vallum-cell"


class CustomBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Runs `cc` over native/*.c before files are collected."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile; refuse with one sentence when there is no compiler or no static C library."""
        if self.target_name == "sdist":
            return
        compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
        if compiler is None:
            raise SystemExit(
                "vallum: no C compiler found to build the cell's PID 1; install one (Debian, Ubuntu: apt-get install gcc libc6-dev)"
            )
        BINARY.parent.mkdir(parents=True, exist_ok=True)
        temporary = BINARY.with_suffix(".new")
        command = [
            compiler,
            "-std=gnu11",
            "-O2",
            "-static",
            "-Wall",
            "-Wextra",
            "-Werror=implicit-function-declaration",
            "-fstack-protector-strong",
            "-D_FORTIFY_SOURCE=2",
            "-o",
            str(temporary),
            *sorted(str(p) for p in SOURCES.glob("*.c")),
        ]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise SystemExit(
                f"vallum: compiling native/*.c failed (is the static C library there? Debian, Ubuntu: apt-get install libc6-dev linux-libc-dev):\n{result.stderr}"
            )
        temporary.replace(BINARY)
        # For guests of the gvisor level: native/preload/statx.c says why.
        library = [
            "-shared",
            "-fPIC",
            "-nostdlib",
            "-O2",
            "-Wall",
            "-o",
            str(temporary),
            str(SOURCES / "preload" / "statx.c"),
        ]
        result = subprocess.run([compiler, *library], capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise SystemExit(f"vallum: compiling native/preload/statx.c failed:\n{result.stderr}")
        temporary.replace(BINARY.with_name("vallum-statx.so"))
        build_data["pure_python"] = False
        build_data["infer_tag"] = True
