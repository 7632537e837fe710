"""The ``ns`` level against the definition of a cell: as root here, and as an ordinary user in a process of its own."""

import os
import secrets
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

pytest.register_assert_rewrite("vallum.testing.sandbox_conformance")

from vallum.core.limits import Limits  # noqa: E402
from vallum.sandbox.base import CellSpec  # noqa: E402
from vallum.sandbox.cgroup.detect import find_driver  # noqa: E402
from vallum.sandbox.images.resolve import resolve, with_mounts  # noqa: E402
from vallum.sandbox.ns.backend import BINARY, NsBackend  # noqa: E402
from vallum.sandbox.uidrange import UidRanges  # noqa: E402
from vallum.testing.sandbox_conformance import *  # noqa: E402, F403
from vallum.testing.sandbox_conformance.sealing import *  # noqa: E402, F403

IS_ROOT = os.geteuid() == 0
ORDINARY_UID = 12345
NO_LIMITS = Limits(memory_bytes=None, pids=None, disk_bytes=None)

pytestmark = pytest.mark.skipif(
    not BINARY.is_file(), reason=f"{BINARY} is not compiled: install the package (make setup)"
)


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A node's home, on a path that nobody else can enter."""
    path = tmp_path_factory.mktemp("home")
    path.chmod(0o700)
    return path


@pytest.fixture
async def backend(home):
    driver = find_driver(f"vallum.{secrets.token_hex(4)}")
    backend = NsBackend(home / "cells", uids=UidRanges(home / "uids") if IS_ROOT else None, driver=driver)
    await backend.start()
    yield backend
    await backend.stop()
    assert list((home / "cells").iterdir()) == [], "layers were left behind"
    if driver is not None:
        assert driver.sweep() == 0, "cgroups were left behind"
        driver.close()


@pytest.fixture
async def make_cell(backend, home):
    cells = []

    async def make(*, limits=NO_LIMITS, mounts=(), hostname="cell"):
        image = resolve("host", images_dir=home / "images", rootless=not IS_ROOT)
        spec = CellSpec(
            id=f"t{secrets.token_hex(5)}", image=with_mounts(image, mounts), limits=limits, hostname=hostname
        )
        cells.append(await backend.create(spec))
        return cells[-1]

    yield make
    for cell in cells:
        await cell.close()


@pytest.fixture
async def make_fork(backend, home):
    cells = []

    async def make(sealing, directory):
        """Over the image, or over what the cell that was sealed lay on."""
        image = resolve("host", images_dir=home / "images", rootless=not IS_ROOT)
        trees = {layer.at: str(directory / str(layer.number)) for layer in sealing.layers}
        layers = [
            msgspec.structs.replace(layer, lowers=[trees[layer.at], *layer.lowers], sealed=1)
            if layer.at in trees
            else layer
            for layer in image.layers
        ]
        spec = CellSpec(
            id=f"t{secrets.token_hex(5)}", image=msgspec.structs.replace(image, layers=layers), limits=NO_LIMITS
        )
        cells.append(await backend.create(spec))
        return cells[-1]

    yield make
    for cell in cells:
        await cell.close()


@pytest.mark.root
@pytest.mark.timeout(300)
@pytest.mark.skipif(not IS_ROOT, reason="root runs this same file as an ordinary user")
def test_the_same_as_an_ordinary_user(tmp_path_factory):
    repository = Path(__file__).resolve().parents[2]
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        pytest.skip("setpriv (util-linux) is not here")
    become = [setpriv, "--reuid", str(ORDINARY_UID), "--regid", str(ORDINARY_UID), "--clear-groups", "--"]
    readable = subprocess.run(
        [*become, sys.executable, "-c", f"open({str(BINARY)!r}); open({__file__!r})"], capture_output=True
    )
    if readable.returncode != 0:
        pytest.skip(
            f"an ordinary user cannot read {repository} or run {sys.executable}: {readable.stderr.decode()[-200:]}"
        )
    base = Path("/tmp") / f"vallum-conformance-{secrets.token_hex(4)}"
    base.mkdir(mode=0o700)
    os.chown(base, ORDINARY_UID, ORDINARY_UID)
    environ = {"PATH": os.environ["PATH"], "HOME": str(base), "PYTHONDONTWRITEBYTECODE": "1", "LANG": "C.UTF-8"}
    command = [
        *become,
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        f"--basetemp={base}/t",
        "--tb=short",
        __file__,
    ]
    try:
        result = subprocess.run(command, cwd=repository, env=environ, capture_output=True, text=True, timeout=280)
    finally:
        shutil.rmtree(base, ignore_errors=True)
    print(result.stdout[-6000:], result.stderr[-2000:])
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
