"""A guest that prepares what is copied out of its cell: nothing but plain files and directories reaches the host, in one new place."""

import io
import os
import stat
import tarfile

import pytest

import vallum
from vallum.client.transfer import unpack
from vallum.core.errors import GuestFileError, InvalidInput

BIG = {"limit_bytes": 1 << 20, "limit_entries": 50}


def archive(*members):
    """(name, type, content or link) as a tar stream, however hostile."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, kind, content in members:
            info = tarfile.TarInfo(name)
            info.type, info.mode = kind, 0o6777
            if kind == tarfile.REGTYPE:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            else:
                info.linkname = content
                tar.addfile(info)
    raw.seek(0)
    return raw


DIR, FILE, LINK, HARD = tarfile.DIRTYPE, tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE

REFUSED = {
    "absolute": [("./out", DIR, ""), ("/etc/owned", FILE, b"x")],
    "dots": [("./out", DIR, ""), ("./out/../../owned", FILE, b"x")],
    "dots in a name of its own": [("./out/../owned", FILE, b"x")],
    "another name": [("./else", FILE, b"x")],
    "through a link": [("./out", DIR, ""), ("./out/l", LINK, "{outside}"), ("./out/l/owned", FILE, b"x")],
    "through a file": [("./out", DIR, ""), ("./out/f", FILE, b""), ("./out/f/owned", FILE, b"x")],
    "over a file": [("./out", DIR, ""), ("./out/f", FILE, b"1"), ("./out/f", FILE, b"2")],
    "twice": [("./out", FILE, b"1"), ("./out", FILE, b"2")],
    "twice a directory": [("./out", DIR, ""), ("./out", DIR, "")],
    "a file, then a directory": [("./out", FILE, b""), ("./out", DIR, ""), ("./out/x", FILE, b"x")],
    "hard link to the host": [("./out", DIR, ""), ("./out/h", HARD, "{outside}/secret")],
    "hard link with dots": [("./out", DIR, ""), ("./out/h", HARD, "./out/../outside/secret")],
    "a link itself": [("./out", LINK, "{outside}")],
    "a device itself": [("./out", tarfile.CHRTYPE, "")],
    "a hard link itself": [("./out", HARD, "{outside}/secret")],
    "no directory before": [("./out/x", FILE, b"x")],
    "nothing": [],
    "too many": [("./out", DIR, ""), *((f"./out/{n}", FILE, b"") for n in range(60))],
    "too large": [("./out", DIR, ""), ("./out/x", FILE, bytes(1 << 21))],
    "too large by links": [
        ("./out", DIR, ""),
        ("./out/x", FILE, bytes(1 << 19)),
        *((f"./out/{n}", HARD, "./out/x") for n in range(3)),
    ],
    "too deep": [("./out", DIR, ""), ("./out/" + "d/" * 300, DIR, "")],
}


@pytest.mark.parametrize("what", REFUSED)
def test_hostile_streams_leave_nothing(tmp_path, what):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    place = tmp_path / "place"
    place.mkdir()
    members = [
        (name, kind, content.replace("{outside}", str(outside)) if isinstance(content, str) else content)
        for name, kind, content in REFUSED[what]
    ]
    with pytest.raises(GuestFileError):
        unpack(archive(*members), b"out", place / "out", **BIG)
    assert list(place.iterdir()) == [], "nothing half-made"
    assert [path.name for path in tmp_path.rglob("*")].count("owned") == 0
    assert (outside / "secret").read_text() == "secret"


def test_the_honest_twin(tmp_path):
    stream = archive(
        ("./out", DIR, ""), ("./out/sub", DIR, ""), ("./out/sub/f", FILE, b"content"), ("./out/again", HARD, "./out/sub/f"),
        ("./out/new\nline \x1b[31m", FILE, b"n"), ("./out/link", LINK, "/etc/passwd"), ("./out/pipe", tarfile.FIFOTYPE, ""),
        ("./out/dev", tarfile.BLKTYPE, ""), ("./out/to-link", HARD, "./out/link"),
    )  # fmt: skip
    copied = unpack(stream, b"out", tmp_path / "out", **BIG)
    assert (copied.files, copied.directories, copied.bytes, copied.left_out) == (3, 2, 15, 4)
    found = {str(path.relative_to(tmp_path / "out")): path for path in (tmp_path / "out").rglob("*")}
    assert set(found) == {"sub", "sub/f", "again", "new\nline \x1b[31m"}
    assert found["again"].read_bytes() == b"content"
    assert found["again"].stat().st_nlink == 1
    for path in [tmp_path / "out", *found.values()]:
        mode = path.lstat().st_mode
        assert stat.S_ISREG(mode) or stat.S_ISDIR(mode)
        assert not mode & 0o6022, "no set-id, nobody else may write"
        assert path.lstat().st_uid == os.geteuid()


def test_what_is_there_is_not_touched(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "owned")
    for name in ("file", "dangling"):
        with pytest.raises(InvalidInput, match="is there already"):
            unpack(archive(("./out", FILE, b"x")), b"out", tmp_path / name, **BIG)
    assert (tmp_path / "file").read_text() == "mine"
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("cut", [1, 511, 513, 1025, 1600])
def test_damaged_streams(tmp_path, cut):
    raw = archive(("./out", DIR, ""), ("./out/f", FILE, bytes(5000))).getvalue()
    for stream in (raw[:cut], raw[:600] + bytes([raw[600] ^ 1]) + raw[601:]):
        with pytest.raises(GuestFileError):
            unpack(io.BytesIO(stream), b"out", tmp_path / "out", **BIG)
        assert list(tmp_path.iterdir()) == []


PLANT = r"""
mkdir -p /tmp/out/sub; cd /tmp/out
echo good > good; chmod 6755 good; ln good hard; ln -s /etc/shadow shadow; ln -s / root; ln -s ../.. sub/up
mkfifo pipe; printf x > "$(printf 'two\nlines')"; printf y > '..hidden'; printf z > './-rf'
"""


@pytest.mark.root
async def test_what_a_guest_plants(tmp_path):
    async with vallum.Node(home=tmp_path / "home") as node, node.sandbox() as sb:
        assert (await sb.exec(["sh", "-c", PLANT])).exit_code == 0
        copied = await sb.copy_out("/tmp/out", tmp_path / "got")
        got = {path.name: path for path in (tmp_path / "got").rglob("*")}
        assert set(got) == {"good", "hard", "sub", "two\nlines", "..hidden", "-rf"}
        assert copied.left_out == 4
        assert got["hard"].read_text() == got["good"].read_text() == "good\n"
        assert got["good"].stat().st_mode & 0o7000 == 0
        for guest in ("/tmp/out/shadow", "/tmp/out/pipe"):
            with pytest.raises(vallum.VallumError):
                await sb.copy_out(guest, tmp_path / "no")
        for guest in ("/", "/tmp/..", ""):
            with pytest.raises(InvalidInput):
                await sb.copy_out(guest, tmp_path / "no")
        with pytest.raises(GuestFileError) as missing:
            await sb.copy_out("/tmp/nothing", tmp_path / "no")
        assert missing.value.errno_name == "ENOENT"
        with pytest.raises(GuestFileError) as closed:
            await sb.copy_out("/etc/shadow", tmp_path / "no", user="4321")
        assert closed.value.errno_name in ("EIO", "ENOENT")
        await sb.exec(
            [
                "sh",
                "-c",
                "truncate -s 1E /tmp/huge 2>/dev/null || truncate -s 4T /tmp/huge; mkdir /tmp/many; cd /tmp/many; seq 3000 | xargs touch",
            ]
        )
        for guest, limits in (("/tmp/huge", {"limit_bytes": 1 << 22}), ("/tmp/many", {"limit_entries": 2000})):
            with pytest.raises(GuestFileError) as large:
                await sb.copy_out(guest, tmp_path / "no", **limits)
            assert large.value.errno_name == "EFBIG"
        assert not (tmp_path / "no").exists()
        calls = [e for e in await node.events(run=sb.run) if e.kind == "tool.call"]
        assert len({e["scope"]["step"] for e in calls}) >= 5, "each copy is a step of its own"


@pytest.mark.root
async def test_a_guest_that_races_and_replaces_its_tar(tmp_path):
    race = r"""mkdir -p /tmp/race/d; cd /tmp/race; (i=0; while [ $i -lt 400 ]; do i=$((i+1))
      rm -rf d; ln -s /etc d; rm d; mkdir d; echo x > d/passwd; done) >/dev/null 2>&1 & """
    async with vallum.Node(home=tmp_path / "home") as node, node.sandbox(root="plain") as sb:
        await sb.exec(["sh", "-c", race])
        for turn in range(4):
            try:
                await sb.copy_out("/tmp/race", tmp_path / f"r{turn}")
            except GuestFileError:
                assert not (tmp_path / f"r{turn}").exists()
                continue
            for path in (tmp_path / f"r{turn}").rglob("*"):
                assert not path.is_symlink()
                assert path.name in ("d", "passwd")
                assert path.is_dir() or path.read_text() in ("x\n", "")


@pytest.mark.root
async def test_in_and_out_again(tmp_path):
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "sub" / "f").write_text("hello")
    (source / "link").symlink_to("sub/f")
    (source / "big").write_bytes(os.urandom(3_000_000))
    async with vallum.Node(home=tmp_path / "home") as node, node.sandbox() as sb:
        await sb.copy_in(source, "/tmp/here")
        ran = await sb.exec(["sh", "-c", "cat /tmp/here/link; stat -c ' %u' /tmp/here/big"])
        assert ran.stdout == b"hello 1000\n"
        assert (await sb.copy_out("/tmp/here", tmp_path / "back")).left_out == 1
        assert (tmp_path / "back" / "big").read_bytes() == (source / "big").read_bytes()
        await sb.copy_in(source / "sub" / "f", "/tmp/one")
        await sb.copy_out("/tmp/one", tmp_path / "one")
        assert (tmp_path / "one").read_text() == "hello"
        with pytest.raises(InvalidInput, match="more than"):
            await sb.copy_in(source, "/tmp/x", limit_bytes=1000)
        with pytest.raises(GuestFileError):
            await sb.copy_in(source, "/no/such/x")
