"""Layers: what an honest one becomes, and what a hostile one never does."""

import contextlib
import gzip
import io
import os
import stat
import tarfile
import threading
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vallum.core.errors import SandboxError
from vallum.core.tar import LayerError, TarReader, split_name
from vallum.sandbox.images.layer import OPAQUE, Unpacker
from vallum.sandbox.images.layer_stream import LayerLimits, LayerStream
from vallum.testing.image_layouts import Item, make_layer, name_bytes

IS_ROOT = os.geteuid() == 0
needs_root = pytest.mark.skipif(not IS_ROOT, reason="needs root: owners")
SMALL = LayerLimits(max_bytes=1 << 20, max_entries=100, max_ratio=50, free_bytes=1 << 16, reserve_bytes=0)


def unpack(target: Path, raw: bytes, *, owners=IS_ROOT, limits=None, stop=None):
    target.mkdir(mode=0o700, exist_ok=True)
    unpacker = Unpacker(target, owners=owners, limits=limits, stop=stop)
    try:
        return unpacker.unpack(LayerStream(io.BytesIO(raw), limits or LayerLimits()))
    finally:
        unpacker.close()


def look(root: Path) -> dict[str, str]:
    """Path -> kind, for everything below."""
    found = {}
    for path in sorted(root.rglob("*")):
        mode = path.lstat().st_mode
        name = str(path.relative_to(root))
        if stat.S_ISLNK(mode):
            found[name] = f"-> {os.readlink(path)}"
        elif stat.S_ISDIR(mode):
            opaque = OPAQUE in os.listxattr(path)
            found[name] = "opaque" if opaque else "dir"
        elif stat.S_ISCHR(mode):
            assert path.lstat().st_rdev == 0
            found[name] = "whiteout"
        else:
            found[name] = "fifo" if stat.S_ISFIFO(mode) else path.read_bytes().decode()
    return found


def test_an_honest_layer(tmp_path):
    raw = make_layer(
        [
            Item("./", mode=0o755), Item("etc"), Item("etc/passwd", b"root", mode=0o640), Item("bin", link="usr/bin"),
            Item("usr/bin/su", b"su", mode=0o4755), Item("usr/bin/also", kind=tarfile.LNKTYPE, link="usr/bin/su"),
            Item("tmp", mode=0o1777), Item("away", link="/etc/../../shadow"), Item("pipe", kind=tarfile.FIFOTYPE),
        ]
    )  # fmt: skip
    done = unpack(tmp_path / "t", raw)
    assert look(tmp_path / "t") == {
        "away": "-> /etc/../../shadow", "bin": "-> usr/bin", "etc": "dir", "etc/passwd": "root", "pipe": "fifo", "tmp": "dir",
        "usr": "dir", "usr/bin": "dir", "usr/bin/su": "su", "usr/bin/also": "su",
    }  # fmt: skip
    assert stat.S_IMODE((tmp_path / "t/tmp").stat().st_mode) == 0o1777
    assert stat.S_IMODE((tmp_path / "t/usr/bin/su").stat().st_mode) == 0o4755
    assert stat.S_IMODE((tmp_path / "t/etc/passwd").stat().st_mode) == 0o640
    assert (tmp_path / "t/usr/bin/su").stat().st_nlink == 2
    assert (tmp_path / "t/etc").stat().st_mtime == 1_700_000_000
    assert stat.S_IMODE((tmp_path / "t").stat().st_mode) == 0o755
    assert (done.entries, done.diff_id) == (9, name_bytes(raw))


@needs_root
def test_owners_are_kept_as_in_the_image(tmp_path):
    items = [
        Item("d", uid=33, gid=34),
        Item("d/f", b"", uid=65534, gid=65535, mode=0o6755),
        Item("d/l", link="f", uid=7),
    ]
    unpack(tmp_path / "t", make_layer(items), owners=True)
    assert [(tmp_path / "t" / p).lstat().st_uid for p in ("d", "d/f", "d/l")] == [33, 65534, 7]
    assert (tmp_path / "t/d/f").stat().st_gid == 65535
    assert stat.S_IMODE((tmp_path / "t/d/f").stat().st_mode) == 0o6755


def test_owners_beyond_a_cell_are_said(tmp_path):
    with pytest.raises(LayerError, match="belongs to 70000:0, but a cell has ids up to 65535"):
        unpack(tmp_path / "t", make_layer([Item("f", b"", uid=70000)]), owners=True)


@pytest.mark.parametrize(
    "compress", [lambda b: b, lambda b: gzip.compress(b[:700]) + gzip.compress(b[700:]), zstandard.compress]
)
def test_compressions_are_told_by_their_bytes(tmp_path, compress):
    raw = make_layer([Item("a", os.urandom(100_000)), Item("b", b"b")])
    done = unpack(tmp_path / "t", compress(raw))
    assert (tmp_path / "t/b").read_bytes() == b"b"
    assert (done.diff_id, done.digest) == (name_bytes(raw), name_bytes(compress(raw)))


def test_whiteouts_take_the_form_of_overlay(tmp_path):
    raw = make_layer(
        [
            Item("etc/.wh.gone", b""), Item("var"), Item("var/.wh..wh..opq", b""), Item("var/new", b"new"),
            Item("again"), Item("again/f", b"f"), Item(".wh.again", b""), Item("kept", b"kept"), Item(".wh.kept", b""),
            Item(".wh..wh.plnk", b""), Item("dev/null", kind=tarfile.CHRTYPE),
        ]
    )  # fmt: skip
    done = unpack(tmp_path / "t", raw)
    assert look(tmp_path / "t") == {
        "again": "opaque", "again/f": "f", "dev": "dir", "dev/null": "whiteout", "etc": "dir", "etc/gone": "whiteout",
        "kept": "kept", "var": "opaque", "var/new": "new",
    }  # fmt: skip
    assert done.devices == 1


def test_the_later_member_counts(tmp_path):
    raw = make_layer(
        [
            Item("a", b"first"), Item("a", b"second"), Item("d"), Item("d/sub/f", b""), Item("d", b"now a file"),
            Item("l", link="/etc"), Item("l"), Item("l/f", b"in the layer"), Item("h", b"h"), Item("h", kind=tarfile.LNKTYPE, link="h"),
        ]
    )  # fmt: skip
    unpack(tmp_path / "t", raw)
    assert look(tmp_path / "t") == {"a": "second", "d": "now a file", "l": "dir", "l/f": "in the layer", "h": "h"}


HOSTILE = {
    "dots": ([Item("../escaped", b"")], r"'\.\.'"),
    "dots inside": ([Item("a/../../escaped", b"")], r"'\.\.'"),
    "absolute": ([Item("/escaped", b"")], "absolute name"),
    "through a link": ([Item("d", link=".."), Item("d/escaped", b"")], "leads through something that is no directory"),
    "through an absolute link": ([Item("d", link="/tmp"), Item("d/escaped", b"")], "leads through"),
    "whiteout through a link": ([Item("d", link=".."), Item("d/.wh.t", b"")], "leads through"),
    "opaque through a link": ([Item("d", link=".."), Item("d/.wh..wh..opq", b"")], "leads through"),
    "whiteout of dots": ([Item(".wh...", b"")], "names nothing"),
    "whiteout of nothing": ([Item(".wh.", b"")], "names nothing"),
    "hard link out": ([Item("h", kind=tarfile.LNKTYPE, link="../canary")], r"link target with '\.\.'"),
    "hard link to an absolute name": ([Item("h", kind=tarfile.LNKTYPE, link="/etc/passwd")], "absolute link target"),
    "hard link through a link": (
        [Item("d", link=".."), Item("h", kind=tarfile.LNKTYPE, link="d/canary")], "not in its layer",
    ),
    "hard link to nothing": ([Item("h", kind=tarfile.LNKTYPE, link="nothing")], "not in its layer"),
    "hard link to a directory": ([Item("d"), Item("h", kind=tarfile.LNKTYPE, link="d")], "names a directory"),
    "file below a file": ([Item("f", b""), Item("f/g", b"")], "leads through"),
    "long name": ([Item("x" * 300, b"")], "too deep or too long"),
    "long path": ([Item("/".join(["xxxxxxxxxxxxxxxxxxxx"] * 250), b"")], "no file system can hold"),
    "deep": ([Item("/".join("x" * 300), b"")], "too deep or too long"),
    "link to nothing": ([Item("l", kind=tarfile.SYMTYPE)], "target that none can have"),
    "many": ([Item(f"f{n}", b"") for n in range(101)], "more than 100 entries"),
    "large": ([Item("f", os.urandom(1 << 20))], "more than 1048576 bytes"),
    "zeros": ([Item("f", bytes(900_000))], "50 times its size"),
    "sparse": ([Item("f", b"", pax={"GNU.sparse.major": "1"})], "is sparse"),
    "negative size": ([Item("f", b"", pax={"size": "-5"})], "size that is no number"),
    "root as a file": ([Item("./", b"", kind=tarfile.REGTYPE)], None),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_layer_is_refused_and_reaches_nothing(tmp_path, name):
    items, words = HOSTILE[name]
    (tmp_path / "canary").write_text("mine")
    before = (tmp_path / "canary").stat()
    raw = gzip.compress(make_layer(items))
    if words is None:
        unpack(tmp_path / "t", raw, limits=SMALL)
    else:
        with pytest.raises(LayerError, match=words):
            unpack(tmp_path / "t", raw, limits=SMALL)
    assert sorted(os.listdir(tmp_path)) == ["canary", "t"]
    after = (tmp_path / "canary").stat()
    assert (after.st_nlink, after.st_mode, after.st_ctime_ns) == (1, before.st_mode, before.st_ctime_ns)
    assert OPAQUE not in os.listxattr(tmp_path)


def make_header(name: bytes, size: int, flag: bytes) -> bytes:
    fields = name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + b"%011o\0" % size + b"00000000000\0"
    rest = flag + bytes(100) + b"ustar\0" + b"00" + bytes(247)
    total = sum(fields) + 8 * 32 + sum(rest)
    return fields + b"%06o\0 " % total + rest


def test_headers_that_lie_about_sizes(tmp_path):
    for flag, words in ((b"x", "extended header has"), (b"L", "extended header has"), (b"0", "ends inside a file")):
        with pytest.raises(LayerError, match=words):
            unpack(tmp_path / "t", make_header(b"f", 1 << 32, flag))
    with pytest.raises(LayerError, match="unknown kind"):
        unpack(tmp_path / "t", make_header(b"f", 0, b"Z"))


@pytest.mark.parametrize(
    "spoil", [lambda b: b[:-40], lambda b: b[:100] + b"\xff\xff\xff" + b[103:], lambda b: b + b"rest"]
)
def test_a_damaged_stream(tmp_path, spoil):
    raw = gzip.compress(make_layer([Item("f", os.urandom(5000))]))
    with pytest.raises(LayerError):
        unpack(tmp_path / "t", spoil(raw))


def test_a_zstd_stream_that_ends_early_has_another_digest(tmp_path):
    raw = make_layer([Item("f", os.urandom(5000))])
    with contextlib.suppress(LayerError):
        assert unpack(tmp_path / "t", zstandard.compress(raw)[:-40]).diff_id != name_bytes(raw)


def test_stopping(tmp_path):
    stop = threading.Event()
    stop.set()
    with pytest.raises(SandboxError, match="stopped"):
        unpack(tmp_path / "t", make_layer([Item("f", b"")]), stop=stop)


def test_attributes_of_a_layer_are_not_set(tmp_path):
    pax = {
        "SCHILY.xattr.user.overlay.redirect": "/etc",
        "SCHILY.xattr.security.capability": "\x01",
        f"SCHILY.xattr.{OPAQUE}": "y",
    }
    unpack(tmp_path / "t", make_layer([Item("d", pax=pax), Item("f", b"", pax=pax)]))
    assert os.listxattr(tmp_path / "t/d") == os.listxattr(tmp_path / "t/f") == []


# ---------------------------------------------------------------------- any archive at all

_links = st.sampled_from(["..", "../..", ".", "b", "a/canary", "../canary", "/", ""])
_near = st.builds(
    Item,
    name=st.sampled_from(
        ["a", "b", "canary", "a/b", "b/a", "a/canary", "b/canary", "a/.wh.canary", "b/.wh..wh..opq", "a/b/canary"]
    ),
    data=st.none() | st.just(b"theirs"),
    kind=st.sampled_from([b"", b"", b"", b"1", b"2", b"5"]),
    link=_links,
    mode=st.sampled_from([0, 0o644, 0o7777]),
)
_part = st.sampled_from(["a", "b", "..", ".", "", ".wh.a", ".wh..wh..opq", ".wh...", "canary"])
_path = st.lists(_part, min_size=1, max_size=4).map("/".join)
_far = st.builds(
    Item,
    name=_path,
    data=st.none() | st.binary(max_size=20),
    kind=st.sampled_from([b"", b"0", b"1", b"2", b"3", b"5", b"6"]),
    link=_links | _path,
    mtime_s=st.sampled_from([0, -1, 2**40]),
)
_items = st.lists(_near, max_size=8) | st.lists(_near | _far, max_size=12)


def snapshot(root: Path) -> dict[str, object]:
    found = {str(root): (root.stat().st_mode, root.stat().st_mtime_ns)}
    for path in root.rglob("*"):
        if "t" not in path.relative_to(root).parts[:1]:
            s = path.lstat()
            found[str(path)] = (s.st_mode, s.st_nlink, s.st_ctime_ns, s.st_size)
    return found


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(items=_items)
def test_no_archive_reaches_outside_of_its_directory(tmp_path_factory, items):
    place = tmp_path_factory.mktemp("any")
    (place / "canary").write_text("mine")
    (place / "t").mkdir()
    before = snapshot(place)
    with contextlib.suppress(LayerError):
        unpack(place / "t", make_layer(items), owners=False)
    assert snapshot(place) == before
    assert (place / "canary").read_text() == "mine"


@settings(max_examples=300, deadline=None)
@given(
    raw=st.binary(max_size=2048)
    | st.binary(max_size=600).map(lambda b: make_header(b[:90], len(b), b"x") + b.ljust(1024, b"\0"))
)
def test_no_bytes_break_the_reader(raw):
    source = io.BytesIO(raw)
    try:
        for member in TarReader(source.read):
            split_name(member.name)
    except LayerError:
        pass


@settings(max_examples=150, deadline=None)
@given(
    items=st.lists(
        st.builds(
            Item,
            name=st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1, max_size=120),
            data=st.binary(max_size=1500),
            uid=st.integers(0, 2**33),
            mode=st.integers(0, 0o7777),
            mtime_s=st.integers(0, 2**33),
        ),
        max_size=5,
    ),
    form=st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
)
def test_the_reader_agrees_with_another(items, form):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        for item in items:
            info = tarfile.TarInfo(item.name)
            info.size, info.uid, info.mode, info.mtime = len(item.data), item.uid, item.mode, item.mtime_s
            archive.addfile(info, io.BytesIO(item.data))
    source = io.BytesIO(out.getvalue())
    reader = TarReader(source.read)
    seen = [
        (m.name.decode(), m.uid, m.mode, m.mtime_s, b"".join(iter(lambda: reader.read_data(700), b""))) for m in reader
    ]
    assert seen == [(i.name, i.uid, i.mode, i.mtime_s, i.data) for i in items]
