"""Sealing: what a cell's layers hold is copied as it is, and a cell built on the copy sees the same.

For levels whose cells can be sealed. Besides ``make_cell`` a test module provides::

    @pytest.fixture
    async def make_fork(...):
        yield make          # async def make(sealing: Sealing, directory: Path) -> Cell, over the image of make_cell
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from vallum.core.errors import CellGone, SandboxError
from vallum.sandbox.base import Cell, Sealing
from vallum.sandbox.snapshots.changes import compare, read_listing
from vallum.testing.sandbox_conformance.driving import MakeCell, become, close_pipes, python, sh, start

MakeFork = Callable[[Sealing, Path], Awaitable[Cell]]

LOOK = (
    "cd /tmp; find . | sort | while read -r f; do stat -c '%n %F %a %u %g %s %h %Y' \"$f\"; done | sed 's/directory .*//';"
    " cat a hard 2>&1; readlink link; ls -A gone made 2>&1; stat -c '%a %u %g' / /tmp /tmp/closed"
)
FILL = (
    "cd /tmp; mkdir made gone closed; echo one > a; ln a hard; ln -s /no/where link; mkfifo pipe; chmod 4751 a;"
    " touch -d @1000000 a; truncate -s 300G big; echo end >> big; touch made/x gone/y; touch closed/in; chmod 000 closed;"
    " printf x > \"$(printf 'new\\nline \\377')\"; mkdir -p deep/er/est; echo d > deep/er/est/f"
)


async def seal(
    cell: Cell, directory: Path, name: str = "s", *, merge: bool = False, copy: bool = True
) -> tuple[Sealing, Path]:
    """Seal into a fresh directory."""
    place = directory / name
    place.mkdir(mode=0o700)
    return await cell.seal(place, merge=merge, copy=copy), place


def changes_of(sealing: Sealing, place: Path) -> dict[str, str]:
    """Path -> what became of it, since the cell began."""
    found: dict[str, str] = {}
    for layer in sealing.layers:
        listing = place / f"{layer.number}.list"
        found.update({one.path: one.change for one in compare(layer.at, None, read_listing(listing))})
    return found


async def test_a_fork_sees_what_was_sealed(make_cell: MakeCell, make_fork: MakeFork, tmp_path: Path) -> None:
    """Contents, names of any bytes, owners, modes, times, links, holes."""
    cell = await make_cell()
    await sh(cell, FILL)
    sealing, place = await seal(cell, tmp_path)
    fork = await make_fork(sealing, place)
    before, after = await sh(cell, LOOK), await sh(fork, LOOK)
    assert before.stdout == after.stdout
    assert before.stderr == after.stderr
    assert sum(layer.bytes for layer in sealing.layers) < 1 << 20, "a hole costs nothing"


async def test_what_was_deleted_stays_deleted(make_cell: MakeCell, make_fork: MakeFork, tmp_path: Path) -> None:
    """A file of the image, one of a sealed layer, and a directory that was deleted and made again; twice over."""
    cell = await make_cell()
    user = None if cell.rootless else "root"
    await sh(cell, "mkdir /srv/d /srv/e; touch /srv/d/old /srv/e/kept /srv/f", user=user)
    sealing, place = await seal(cell, tmp_path, "one")
    fork = await make_fork(sealing, place)
    await sh(fork, "rm -r /srv/d; mkdir /srv/d; touch /srv/d/new; rm /srv/f /etc/hostname", user=user)
    sealing, place = await seal(fork, tmp_path, "two", merge=True)
    look = "ls /srv /srv/d /srv/e; ls -d /etc/hostname /etc/hosts 2>/dev/null; true"
    assert (await sh(fork, look)).text == "/srv:\nd\ne\n\n/srv/d:\nnew\n\n/srv/e:\nkept\n/etc/hosts"
    merged = await make_fork(sealing, place)
    assert (await sh(merged, look)).stdout == (await sh(fork, look)).stdout, "two layers merged into one"
    own: dict[str, str] = {}
    for layer in sealing.layers:
        listing = place / f"{layer.number}.own.list"
        if listing.exists():
            own.update({one.path: one.change for one in compare(layer.at, None, read_listing(listing))})
    assert own == {
        "/etc/hostname": "removed", "/srv/d": "changed", "/srv/d/new": "added", "/srv/f": "removed",
    }  # fmt: skip


async def test_a_sealed_layer_is_nobodys_to_write(make_cell: MakeCell, make_fork: MakeFork, tmp_path: Path) -> None:
    """Two forks and the parent go on, each for itself."""
    cell = await make_cell()
    await sh(cell, "echo base > /tmp/a")
    sealing, place = await seal(cell, tmp_path)
    forks = [await make_fork(sealing, place) for _ in range(2)]
    for number, one in enumerate([cell, *forks]):
        await sh(one, f"echo {number} >> /tmp/a; chmod 600 /tmp/a; rm -f /tmp/b; touch /tmp/b{number}")
    for number, one in enumerate([cell, *forks]):
        assert (await sh(one, "cat /tmp/a; ls /tmp")).text == f"base\n{number}\na\nb{number}"
    last = await make_fork(sealing, place)
    assert (await sh(last, "cat /tmp/a; ls /tmp")).text == "base\na"


async def test_sealing_follows_no_link(make_cell: MakeCell, make_fork: MakeFork, tmp_path: Path) -> None:
    """Links to the host's files are copied as links; what they point to is not read."""
    secret = tmp_path / "secret"
    secret.write_text("of the host")
    cell = await make_cell()
    await sh(cell, f"ln -s {secret} /tmp/one; ln -s {tmp_path} /tmp/two; ln -s / /tmp/three")
    sealing, place = await seal(cell, tmp_path)
    found = b"".join(path.read_bytes() for path in place.rglob("*") if path.is_file() and not path.is_symlink())
    assert b"of the host" not in found
    assert changes_of(sealing, place) == {"/tmp/one": "added", "/tmp/three": "added", "/tmp/two": "added"}


async def test_a_tree_that_changes_meanwhile_is_sealed(
    make_cell: MakeCell, make_fork: MakeFork, tmp_path: Path
) -> None:
    """Processes stand still and go on; a guest that swaps directories for links gains nothing."""
    cell = await make_cell()
    swap = "mkdir -p /tmp/d/e; echo x > /tmp/d/e/f; echo up; while :; do mv /tmp/d /tmp/o; ln -s /etc /tmp/d; rm /tmp/d; mv /tmp/o /tmp/d; done"
    child = await start(cell, swap)
    await asyncio.sleep(0.2)
    for number in range(5):
        sealing, place = await seal(cell, tmp_path, f"s{number}")
        assert sealing.alive >= 1
        assert not [path for path in changes_of(sealing, place) if path.startswith("/etc")]
    alive = len(cell.pids())
    assert alive >= 1, "it goes on"
    await cell.kill_step(0)
    close_pipes(child)


async def test_ending_processes_first(make_cell: MakeCell, tmp_path: Path) -> None:
    """``processes="end"``: nothing runs any more, the cell still serves."""
    cell = await make_cell()
    for step in (0, 1):
        close_pipes(await start(cell, "sleep 60 & sleep 61", step=step))
    assert await become(lambda: len(cell.pids()) >= 4)
    place = tmp_path / "s"
    place.mkdir()
    sealing = await cell.seal(place, processes="end")
    assert sealing.alive >= 4
    assert cell.pids() == []
    assert (await sh(cell, "echo up", step=2)).text == "up"


async def dig(cell: Cell, name: str, depth: int) -> None:
    """Directories in one another, with a file at the bottom."""
    code = f"import os\nos.chdir('/tmp')\nfor _ in range({depth}):\n os.mkdir('{name}')\n os.chdir('{name}')\nopen('f', 'w').write('x')"
    assert (await python(cell, code)).exit.code == 0


async def test_a_deep_tree_is_sealed_or_refused_in_a_sentence(
    make_cell: MakeCell, make_fork: MakeFork, tmp_path: Path
) -> None:
    """Deeper than PATH_MAX is fine; deeper than any program needs is refused, and the cell goes on."""
    cell = await make_cell()
    await dig(cell, "d" * 200, 60)
    sealing, place = await seal(cell, tmp_path, "one")
    fork = await make_fork(sealing, place)
    assert (await sh(fork, "find /tmp | wc -l")).text == "62"
    await dig(cell, "e", 4100)
    with pytest.raises(SandboxError, match=r"nested deeper than|Too many open files"):
        await seal(cell, tmp_path, "two")
    # What is half-made is the caller's to delete; Python's own rmtree gives up at such a depth.
    remove = await asyncio.create_subprocess_exec("rm", "-rf", str(tmp_path / "one"), str(tmp_path / "two"))
    assert await remove.wait() == 0
    assert (await sh(cell, "echo up")).text == "up"


async def test_listing_only(make_cell: MakeCell, tmp_path: Path) -> None:
    """``copy=False`` makes no tree; the same files give the same digest."""
    cell = await make_cell()
    await sh(cell, "echo x > /tmp/a")
    first, place = await seal(cell, tmp_path, "one", copy=False)
    again, _ = await seal(cell, tmp_path, "two", copy=True)
    assert [layer.digest for layer in first.layers] == [layer.digest for layer in again.layers]
    assert not [path for path in place.iterdir() if path.is_dir()]
    await sh(cell, "echo y > /tmp/a")
    other, _ = await seal(cell, tmp_path, "three", copy=False)
    assert [layer.digest for layer in first.layers] != [layer.digest for layer in other.layers]


async def test_a_cell_that_ends_meanwhile_says_so(make_cell: MakeCell, tmp_path: Path) -> None:
    """And one that has ended."""
    cell = await make_cell()
    await sh(cell, "for i in $(seq 300); do echo $i > /tmp/f$i; done")
    place = tmp_path / "s"
    place.mkdir()
    sealing = asyncio.ensure_future(cell.seal(place))
    await asyncio.sleep(0)
    await cell.close()
    with contextlib.suppress(CellGone):  # it may have been quicker
        await asyncio.wait_for(sealing, 10)
    with pytest.raises(CellGone):
        await cell.seal(place)
