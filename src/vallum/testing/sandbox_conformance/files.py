"""Files: read and written inside the cell and nowhere else."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import pytest

from vallum.core.errors import GuestFileError, InvalidInput
from vallum.sandbox.base import Cell
from vallum.testing.sandbox_conformance.driving import MakeCell, run, sh

LIMIT = 64 << 20


async def read(cell: Cell, path: str, *, user: str | None = None, limit_bytes: int = LIMIT) -> bytes:
    """Read with a bound on time: nothing that the guest makes may hang it."""
    async with asyncio.timeout(10):
        return await cell.read_file(path, user=user, limit_bytes=limit_bytes)


async def errno_of(cell: Cell, path: str, *, user: str | None = None, limit_bytes: int = LIMIT) -> str:
    """The kernel's word for why it cannot be read."""
    with pytest.raises(GuestFileError) as caught:
        await read(cell, path, user=user, limit_bytes=limit_bytes)
    return caught.value.errno_name


async def test_written_and_read_back(make_cell: MakeCell) -> None:
    """Binary, empty, and larger than any pipe or message."""
    cell = await make_cell()
    for data in (b"", b"\0\xff" * 3, os.urandom(17 << 20)):
        await cell.write_file("/tmp/file", data)
        assert await read(cell, "/tmp/file") == data
    assert (await sh(cell, "stat -c '%u %a' /tmp/file")).text == "1000 644"


async def test_parents_are_made_and_names_may_be_odd(make_cell: MakeCell) -> None:
    """Relative paths start at the work directory."""
    cell = await make_cell()
    await cell.write_file("/home/agent/a/b/ c\n'd", b"x", mode=0o600)
    assert await read(cell, "a/b/ c\n'd") == b"x"
    await cell.write_file("a/short", b"longer than that")
    await cell.write_file("a/short", b"y")
    assert await read(cell, "/home/agent/a/short") == b"y"


async def test_what_cannot_be_read(make_cell: MakeCell) -> None:
    """Each is told by the kernel's word."""
    cell = await make_cell()
    await cell.write_file("/tmp/big", b"x" * 1001)
    await sh(cell, "ln -s loop /tmp/loop; echo secret >/tmp/mine; chmod 0 /tmp/mine")
    assert await errno_of(cell, "/tmp/missing") == "ENOENT"
    assert await errno_of(cell, "/etc") == "EISDIR"
    assert await errno_of(cell, "/tmp/loop") == "ELOOP"
    assert await errno_of(cell, "/tmp/mine") == "EACCES"
    assert await errno_of(cell, "/tmp/big", limit_bytes=1000) == "EFBIG"
    assert await errno_of(cell, "/etc/passwd/x") == "ENOTDIR"
    assert len(await read(cell, "/tmp/big", limit_bytes=1001)) == 1001


async def test_what_is_no_regular_file_never_hangs(make_cell: MakeCell) -> None:
    """A pipe without a writer, a device without an end, a file that is larger than it says."""
    cell = await make_cell()
    await sh(cell, "mkfifo /tmp/fifo")
    begin = time.monotonic()
    assert await errno_of(cell, "/tmp/fifo") == "EINVAL"
    assert await errno_of(cell, "/dev/zero") == "EINVAL"
    assert time.monotonic() - begin < 5
    with pytest.raises(GuestFileError):
        await cell.write_file("/tmp/fifo", b"x")
    assert b"Name:" in await read(cell, "/proc/self/status")
    assert await errno_of(cell, "/proc/self/maps", limit_bytes=10) == "EFBIG"


async def test_what_cannot_be_written(make_cell: MakeCell) -> None:
    """As the agent: no directory, nothing of root's."""
    cell = await make_cell()
    names = []
    for path in ("/tmp", "/usr/bin/sh-new", "/proc/version", "/tmp/x/"):
        if cell.rootless and path == "/usr/bin/sh-new":
            continue
        with pytest.raises(GuestFileError) as caught:
            await cell.write_file(path, b"x")
        names.append(caught.value.errno_name)
    assert set(names) <= {"EISDIR", "EACCES", "EPERM", "EROFS", "ENOTDIR", "EIO"}


async def test_as_which_user(make_cell: MakeCell) -> None:
    """Root may what the agent may not; unknown users are refused."""
    cell = await make_cell()
    with pytest.raises(InvalidInput):
        await cell.read_file("/etc/passwd", user="nobody-by-that-name", limit_bytes=LIMIT)
    if cell.rootless:
        return
    await cell.write_file("/root/note", b"r", user="root", mode=0o600)
    assert await read(cell, "/root/note", user="root") == b"r"
    assert await errno_of(cell, "/root/note") == "EACCES"
    assert (await run(cell, ["stat", "-c", "%u %a", "/root/note"], user="root")).text == "0 600"


async def test_links_lead_nowhere_outside(make_cell: MakeCell, tmp_path: Path) -> None:
    """Whatever a link says, it is resolved in the cell; so is writing through one."""
    secret = tmp_path / "secret"
    secret.write_text("of the host")
    cell = await make_cell()
    up = "../" * 40
    await sh(
        cell,
        f"cd /tmp; ln -s {secret} a; ln -s {up}{secret} b; ln -s /proc/1/root/{secret} c; ln -s /etc/shadow d; "
        f"ln -s /proc/self/cwd e; ln -s /proc/1/cwd f; ln -s {tmp_path} g; ln -s /etc/passwd h",
    )
    for name in ("a", "b", "c", "d"):
        assert await errno_of(cell, f"/tmp/{name}") in ("ENOENT", "EACCES", "EPERM")
    assert await errno_of(cell, up + str(secret)) == "ENOENT"
    assert b"agent" in await read(cell, "/tmp/h")
    # A parent that is a link to a directory which only the host has: made in the cell, or refused, never made there.
    for path in ("/tmp/g/planted", "/tmp/a", f"/tmp/e/{up}{tmp_path}/planted"):
        try:
            await cell.write_file(path, b"planted")
        except GuestFileError:
            continue
    assert secret.read_text() == "of the host"
    assert [path.name for path in tmp_path.iterdir() if path.name == "planted"] == []


async def test_mounts_show_the_host_without_changing_it(make_cell: MakeCell, tmp_path: Path) -> None:
    """Copy-on-write, or read-only; a service listening in there cannot be reached through its socket."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "file").write_text("before")
    for path in (tmp_path, data, data / "file"):
        path.chmod(0o755)
    server = await asyncio.start_unix_server(lambda reader, writer: writer.close(), data / "service.sock")
    (data / "service.sock").chmod(0o777)
    (tmp_path / "work").mkdir()
    async with server:
        cell = await make_cell(mounts=[f"{data}:/data:ro", f"{data}:/copy"])
        assert (await sh(cell, "cat /data/file /copy/file")).text == "beforebefore"
        # It is the user's own there, whoever owns it on the host.
        assert (await sh(cell, "echo after >/copy/file && cat /copy/file")).text == "after"
        for user in (None,) if cell.rootless else (None, "root"):
            assert (await sh(cell, "echo after >/data/file", user=user)).exit.code != 0
        code = "import socket,sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
        for service in ("/data/service.sock", "/copy/service.sock"):
            for user in (None,) if cell.rootless else (None, "root"):
                assert (await run(cell, ["python3", "-c", code, service], user=user)).exit.code != 0, service
    assert (data / "file").read_text() == "before"
    assert sorted(path.name for path in data.iterdir() if path.name != "service.sock") == ["file"]
