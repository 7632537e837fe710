"""A home of its own for every test, and the `vallum` command as a user types it."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass
class Ran:
    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)


class Cli:
    """Runs `vallum` with this test's home."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def __call__(self, *arguments, stdin=None, timeout=60) -> Ran:
        environ = {**os.environ, "VALLUM_HOME": str(self.home)}
        environ.pop("PYTEST_CURRENT_TEST", None)
        ran = subprocess.run(
            [sys.executable, "-m", "vallum", *map(str, arguments)],
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            timeout=timeout,
            env=environ,
        )
        return Ran(ran.returncode, ran.stdout, ran.stderr)

    def events(self, run="latest", **wanted):
        lines = self("events", run, "--json").out.splitlines()
        events = [json.loads(line) for line in lines]
        return [e for e in events if all(e.get(k) == v for k, v in wanted.items())]


@pytest.fixture
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("h")


@pytest.fixture
def cli(home):
    return Cli(home)
