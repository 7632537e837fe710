"""Trees of agents: installed once on the host and shown read-only in cells, or installed in a cell's set-up phase.

On the host an agent is only *unpacked*: scripts of npm packages do not run and pip builds nothing (wheels only), so no
code of it runs outside of a cell. A tree is complete or not there: it is made beside its place and renamed.

``python -m vallum.agent.harness.install [--quiet] NAME...`` installs by name; what cannot be had is said and is no error.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from vallum.agent.harness.base import Harness
from vallum.agent.harness.catalog import find_harness
from vallum.core.errors import SandboxError, VallumError

GUEST_ROOT = "/opt/agents"
INSTALL_TIMEOUT_S = 900.0
_CELL_PYTHON = Path("/usr/bin/python3")
"""What a cell on the ``host`` image runs as ``python3``: wheels have to fit it."""


def cache_directory(environ: Mapping[str, str]) -> Path:
    """Where trees are kept: ``VALLUM_AGENTS``, else ``vallum/agents`` in the user's cache."""
    if given := environ.get("VALLUM_AGENTS"):
        return Path(given)
    cache = environ.get("XDG_CACHE_HOME") or f"{environ.get('HOME', '/root')}/.cache"
    return Path(cache) / "vallum" / "agents"


def place_of(harness: Harness, cache: Path) -> Path:
    """Directory of its tree: another one for other packages, or another Python."""
    python = [_CELL_PYTHON.resolve().name] if harness.installer == "pip" else []
    digest = hashlib.sha256("\0".join([*harness.packages, *python]).encode()).hexdigest()[:12]
    return cache / f"{harness.name}-{harness.version}-{digest}"


def is_installed(harness: Harness, cache: Path) -> bool:
    """Whether its tree is there."""
    return (place_of(harness, cache) / harness.program).exists()


def make_install_argv(harness: Harness, directory: str, *, python: str = "python3") -> list[str]:
    """The command that fills ``directory`` with the agent; on the host or, in the set-up phase, in a cell."""
    if harness.installer == "npm":
        return [
            "npm", "install", "--prefix", directory, "--no-audit", "--no-fund", "--ignore-scripts", "--no-save",
            "--fetch-retries", "1",
            *harness.packages,
        ]  # fmt: skip
    return [
        python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--retries", "2", "--only-binary", ":all:",
        "--target", directory, *harness.packages,
    ]  # fmt: skip


def install(harness: Harness, cache: Path) -> Path:
    """Have the agent's tree on this host; at once when it is there.

    Raises:
        SandboxError: it cannot be installed; says what the installer said.
    """
    place = place_of(harness, cache)
    if (place / harness.program).exists():
        return place
    _check_installer(harness)
    cache.mkdir(parents=True, exist_ok=True)
    making = Path(tempfile.mkdtemp(prefix=f".{harness.name}-", dir=cache))
    try:
        making.chmod(0o755)
        _run(make_install_argv(harness, str(making), python=sys.executable), harness)
        if not (making / harness.program).exists():
            raise SandboxError(
                f"{harness.name} was installed, but {harness.program} is not there: its layout has changed"
            )
        if place.exists():
            shutil.rmtree(place)
        making.rename(place)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return place


def _check_installer(harness: Harness) -> None:
    if harness.installer == "npm" and shutil.which("npm") is None:
        raise SandboxError(f"{harness.name} cannot be installed: there is no npm on this machine; install Node.js")
    ours = f"python{sys.version_info.major}.{sys.version_info.minor}"
    if harness.installer == "pip" and _CELL_PYTHON.resolve().name != ours:
        raise SandboxError(
            f"{harness.name} cannot be installed: cells run {_CELL_PYTHON.resolve().name}, this is {ours}, "
            "and its wheels have to fit; run this with the system's Python"
        )


def _run(argv: Sequence[str], harness: Harness) -> None:
    try:
        done = subprocess.run(argv, capture_output=True, timeout=INSTALL_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise SandboxError(f"{harness.name} could not be installed within {INSTALL_TIMEOUT_S:.0f} s") from None
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().splitlines()[-3:]
        raise SandboxError(f"{harness.name} could not be installed ({' '.join(argv[:3])}): {' / '.join(said)}")


def main(arguments: Sequence[str]) -> None:
    """Install each by name; say of each what became of it, with ``--quiet`` only of those that had to be fetched."""
    cache = cache_directory(os.environ)
    names = [word for word in arguments if word != "--quiet"]
    for name in names:
        try:
            harness = find_harness(name)
            if is_installed(harness, cache) and len(names) < len(arguments):
                continue
            place = install(harness, cache)
        except (VallumError, OSError) as error:
            sys.stdout.write(f"agents: {name} is not there: {error}\n")
        else:
            sys.stdout.write(f"agents: {name} is at {place}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
