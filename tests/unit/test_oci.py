"""Container images on this machine: what they resolve to, each bad one in one sentence, nothing half-made left."""

import json
import os
import stat
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import pytest

from vallum.core.errors import InvalidInput, SandboxError
from vallum.sandbox.images.layer_stream import LayerLimits
from vallum.sandbox.images.layer_view import LayerView
from vallum.sandbox.images.oci import resolve_oci, split_place
from vallum.sandbox.images.oci_root import choose_user
from vallum.sandbox.images.oci_source import Directory
from vallum.sandbox.images.oci_spec import find_architecture, parse_environ
from vallum.sandbox.images.pull import explain, parse_name
from vallum.sandbox.images.resolve import resolve
from vallum.sandbox.images.store import LayerRef, Store
from vallum.testing.image_layouts import (
    Item,
    Layout,
    make_docker_archive,
    make_layer,
    make_layout,
    name_bytes,
    pack_layout,
)

ROOTLESS = os.geteuid() != 0
PASSWD = b"root:x:0:0::/root:/bin/sh\nweb:x:33:33::/srv:/bin/sh\n"
BASE = [Item("etc/passwd", PASSWD), Item("etc/group", b"root:x:0:\nstaff:x:50:\n"), Item("srv"), Item("srv/a", b"a")]


@pytest.fixture
def images(tmp_path):
    return tmp_path / "images"


def prepare(ref, images, **options):
    return resolve_oci(ref, images_dir=images, **{"rootless": ROOTLESS, **options})


def list_left(images: Path) -> list[str]:
    """What is in the store but should not be after a failure."""
    layers = images / "layers"
    return [str(path) for path in (*layers.glob(".*"), *(images / "pulls").glob("*"), *images.glob("*/.new*"))]


def test_an_image_of_a_layout(tmp_path, images):
    process = {
        "User": "web:staff", "Env": ["PATH=/srv/bin:/bin", "A=b=c", "odd", "=x", "N=\0"], "WorkingDir": "/srv/app", "Cmd": ["sh"],
    }  # fmt: skip
    ref = make_layout(tmp_path / "l", [BASE, [Item("srv/.wh.a", b""), Item("srv/b", b"b")]], process=process)
    image = prepare(ref, images)
    top, second, first = map(Path, image.layers[0].lowers)
    assert image.digest == json.loads((tmp_path / "l/index.json").read_text())["manifests"][0]["digest"]
    assert [first.parent.name, second.parent.name] == ["layers", "layers"]
    assert first.name == name_bytes(make_layer(BASE)).replace(":", "-") + ("-mine" if ROOTLESS else "")
    assert image.environ == {"PATH": "/srv/bin:/bin", "A": "b=c", "LANG": "C.UTF-8"}
    assert image.user == ("1000:1000" if ROOTLESS else "web:50")
    assert image.workdir == "/srv/app"
    assert (top / "srv/app").is_dir(), "what commands start in is made"
    assert "198.18.0.53" in (top / "etc/resolv.conf").read_text()
    assert {path.name for path in top.iterdir()} >= {"dev", "etc", "proc", "run", "sys", "tmp"}
    assert prepare(ref, images) == image
    assert list_left(images) == []


def test_layers_are_shared_and_unpacked_once(tmp_path, images):
    one = prepare(make_layout(tmp_path / "1", [BASE, [Item("one", b"1")]]), images)
    stamp = Path(one.layers[0].lowers[2]).stat()
    two = prepare(make_layout(tmp_path / "2", [BASE, [Item("two", b"2")]], compress="zstd"), images)
    assert one.layers[0].lowers[::2] == two.layers[0].lowers[::2], "the base, and the layer on top"
    again = Path(two.layers[0].lowers[2]).stat()
    assert (stamp.st_ino, stamp.st_ctime_ns) == (again.st_ino, again.st_ctime_ns)
    assert len([path for path in (images / "layers").iterdir() if path.is_dir()]) == 3


def test_a_layer_that_comes_twice_counts_where_it_is_uppermost(tmp_path, images):
    a, b = [Item("x", b"a")], [Item(".wh.x", b""), Item("y", b"b")]
    image = prepare(make_layout(tmp_path / "l", [a, b, a]), images)
    names = [Path(lower).name for lower in image.layers[0].lowers[1:]]
    assert [name[:71] for name in names] == [name_bytes(make_layer(items)).replace(":", "-") for items in (a, b)]


def test_an_opaque_root_hides_everything_below(tmp_path, images):
    image = prepare(make_layout(tmp_path / "l", [BASE, [Item(".wh..wh..opq", b""), Item("new", b"")]]), images)
    assert len(image.layers[0].lowers) == 2


def test_tags_platforms_and_digests(tmp_path, images):
    layout = Layout(tmp_path / "l")
    layout.add_image([make_layer([Item("1", b"")])], tag="one")
    two = layout.add_image([make_layer([Item("2", b"")])], tag="v2:odd")
    assert prepare(f"oci:{tmp_path}/l:v2:odd", images).digest == two["digest"]
    assert prepare(f"oci:{tmp_path}/l@{two['digest']}", images).digest == two["digest"]
    with pytest.raises(InvalidInput, match="several images: add one of these tags: one, v2:odd"):
        prepare(f"oci:{tmp_path}/l", images)
    with pytest.raises(InvalidInput, match=r"'oci:.*:three' is not there: the tags of that place are: one, v2:odd"):
        prepare(f"oci:{tmp_path}/l:three", images)


def test_an_index_of_several_platforms(tmp_path, images):
    layout = Layout(tmp_path / "l")
    other = layout.add_image([make_layer([Item("o", b"")])], tag=None, architecture="s390x")
    mine = layout.add_image([make_layer([Item("m", b"")])], tag=None)
    entries = [
        {**other, "platform": {"os": "linux", "architecture": "s390x"}},
        {**mine, "platform": {"os": "linux", "architecture": find_architecture()}},
    ]
    nested = layout.add_blob(json.dumps({"schemaVersion": 2, "manifests": entries}).encode(), "index")
    (tmp_path / "l/index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [nested]}))
    assert prepare(f"oci:{tmp_path}/l", images).digest == mine["digest"]
    (tmp_path / "l/index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": entries[:1]}))
    with pytest.raises(InvalidInput, match="is for linux/s390x, but this machine is linux/"):
        prepare(f"oci:{tmp_path}/l", images)


def test_archives(tmp_path, images):
    layers = [make_layer(BASE), make_layer([Item("b", b"b")])]
    layout = Layout(tmp_path / "l")
    made = layout.add_image(layers)
    packed = pack_layout(tmp_path / "l", tmp_path / "l.tar")
    assert prepare(packed, images).digest == prepare(f"{packed}:latest", images).digest == made["digest"]
    saved = make_docker_archive(tmp_path / "s.tar", layers)
    image = prepare(saved, tmp_path / "other")
    assert prepare(f"{saved}:made:latest", tmp_path / "other").layers == image.layers
    assert [Path(p).name for p in image.layers[0].lowers] == [
        Path(p).name for p in prepare(packed, images).layers[0].lowers
    ]
    with pytest.raises(InvalidInput, match="0 images of that name"):
        prepare(f"{saved}:other:latest", images)


def spoil_blob(layout: Layout, which: str) -> None:
    manifest = json.loads(layout.find_blob(layout.manifests[0]["digest"]).read_text())
    digest = {"manifest": layout.manifests[0], "config": manifest["config"], "layer": manifest["layers"][0]}[which][
        "digest"
    ]
    path = layout.find_blob(digest)
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("which", ["manifest", "config", "layer"])
@pytest.mark.parametrize("compress", ["none", "gzip", "zstd"])
def test_a_blob_of_another_digest(tmp_path, images, which, compress):
    layout = Layout(tmp_path / "l")
    layout.add_image([make_layer([Item("f", os.urandom(100))])], compress=compress)
    spoil_blob(layout, which)
    with pytest.raises(InvalidInput, match=r"^image 'oci:.*corrupt") as caught:
        prepare(f"oci:{tmp_path}/l", images)
    assert "\n" not in str(caught.value)
    assert list((images / "layers").iterdir()) == []


def test_a_layer_that_is_not_what_the_configuration_says(tmp_path, images):
    layout = Layout(tmp_path / "l")
    layout.add_image([make_layer([Item("f", b"")])], diff_ids=["sha256:" + "0" * 64])
    with pytest.raises(InvalidInput, match="unpacked it is not what the configuration says"):
        prepare(f"oci:{tmp_path}/l", images)
    assert list((images / "layers").iterdir()) == []


def test_a_hostile_layer_leaves_nothing(tmp_path, images):
    ref = make_layout(tmp_path / "l", [BASE, [Item("ok", b""), Item("../../escaped", b"")]])
    with pytest.raises(InvalidInput, match=r"corrupt or hostile: a member has a name with '\.\.'"):
        prepare(ref, images)
    assert list_left(images) == []
    assert len(list((images / "layers").iterdir())) == 2, "the honest layer is whole and stays"
    assert not list(tmp_path.rglob("escaped"))


@pytest.mark.parametrize(
    ("ref", "words"),
    [
        ("oci:relative", "absolute path"),
        ("oci:/nonexistent/layout", "does not exist"),
        ("oci:/nonexistent/layout:tag", "does not exist"),
        ("oci-archive:/nonexistent.tar", "does not exist"),
        ("oci:", "absolute path"),
        ("docker:alpine/../x", "write docker://"),
        ("docker://UPPER", "write docker://"),
        ("docker://--help", "write docker://"),
        ("docker://x@sha256:12", "write docker://"),
        ("podman://x", "is not known: use 'host'"),
    ],
)
def test_a_reference_that_is_none(images, ref, words):
    with pytest.raises(InvalidInput, match=words):
        resolve(ref, images_dir=images, rootless=ROOTLESS)


def test_places_that_are_no_layout(tmp_path, images):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidInput, match=r"index.json cannot be read"):
        prepare(f"oci:{tmp_path}/empty", images)
    os.mkfifo(tmp_path / "empty/index.json")
    with pytest.raises(InvalidInput, match="not a regular file"):
        prepare(f"oci:{tmp_path}/empty", images)
    (tmp_path / "junk.tar").write_bytes(b"junk" * 1000)
    with pytest.raises(InvalidInput, match="not a plain tar archive"):
        prepare(f"oci-archive:{tmp_path}/junk.tar", images)
    for text in (
        "{",
        "[]",
        '{"manifests": [{"digest": "sha256:../../etc/passwd", "size": 1}]}',
        '{"manifests": [{"digest": 1}]}',
    ):
        (tmp_path / "l").mkdir(exist_ok=True)
        (tmp_path / "l/index.json").write_text(text)
        with pytest.raises(InvalidInput, match="is not usable"):
            prepare(f"oci:{tmp_path}/l", images)


def test_an_archive_whose_names_lead_away_reads_nothing_there(tmp_path, images):
    secret = tmp_path / "secret"
    secret.write_text('[{"Config": "c", "RepoTags": null, "Layers": []}]')
    with tarfile.open(tmp_path / "a.tar", "w") as out:
        info = tarfile.TarInfo("manifest.json")
        info.type, info.linkname = tarfile.SYMTYPE, str(secret)
        out.addfile(info)
    with pytest.raises(InvalidInput, match=r"manifest.json is not in the archive"):
        prepare(f"docker-archive:{tmp_path}/a.tar", images)


@pytest.mark.skipif(ROOTLESS, reason="needs root: owners")
def test_an_owner_that_no_cell_has(tmp_path, images):
    ref = make_layout(tmp_path / "l", [[Item("f", b"", uid=100_000)]])
    with pytest.raises(InvalidInput, match="belongs to 100000:0, but a cell has ids up to 65535 only"):
        prepare(ref, images)
    assert prepare(ref, images, rootless=True).user == "1000:1000"


def test_stopping_leaves_nothing(tmp_path, images):
    stop = threading.Event()
    stop.set()
    with pytest.raises(SandboxError, match="stopped because nobody waits"):
        prepare(make_layout(tmp_path / "l", [BASE]), images, stop=stop)
    assert list_left(images) == []


def test_what_a_crash_left_is_removed_at_the_next_use(tmp_path, images):
    prepare(make_layout(tmp_path / "1", [BASE]), images)
    left = images / "layers/.new-sha256-crashed"
    (left / "closed/d").mkdir(parents=True)
    (left / "closed").chmod(0)
    (images / "pulls/crashed/image").mkdir(parents=True)
    prepare(make_layout(tmp_path / "2", [[Item("f", b"")]]), images)
    assert list_left(images) == []


def test_what_another_process_is_making_is_not_removed(tmp_path, images):
    store = Store(images, owners=not ROOTLESS)
    left = images / "layers/.new-sha256-busy"
    left.mkdir()
    with store.lock("sha256-busy"):
        prepare(make_layout(tmp_path / "l", [BASE]), images)
        assert left.is_dir()


PREPARE = """
import json, pathlib, sys
from vallum.sandbox.images.oci import resolve_oci
ref, images, rootless = sys.argv[1:]
print(json.dumps(resolve_oci(ref, images_dir=pathlib.Path(images), rootless=rootless == "True").layers[0].lowers))
"""


def test_several_at_once_make_one(tmp_path, images):
    ref = make_layout(tmp_path / "l", [[Item(f"d{n}/f{m}", b"x" * 1000) for n in range(30) for m in range(20)], BASE])
    arguments = [sys.executable, "-c", PREPARE, ref, str(images), str(ROOTLESS)]
    others = [subprocess.Popen(arguments, stdout=subprocess.PIPE) for _ in range(2)]
    mine = []
    threads = [threading.Thread(target=lambda: mine.append(prepare(ref, images).layers[0].lowers)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    got = [*mine, *(json.loads(other.communicate(timeout=60)[0]) for other in others)]
    assert all(one == got[0] for one in got)
    assert len(got) == 4
    assert len(list(Path(got[0][2]).rglob("f*"))) == 600
    assert list_left(images) == []


def test_limits_reach_the_store(tmp_path, images):
    raw = make_layer([Item("f", bytes(200_000))])
    layout = Layout(tmp_path / "l")
    digest = layout.add_blob(raw, "")["digest"]
    store = Store(images, owners=False, limits=LayerLimits(max_bytes=100_000))
    with pytest.raises(InvalidInput, match="more than 100000 bytes"):
        store.add_layer(LayerRef(digest, digest, digest, len(raw)), Directory(tmp_path / "l", "x"), "x")
    assert list_left(images) == []


# ---------------------------------------------------------------------- pure parts


def test_names_of_registries():
    digest = "sha256:" + "a" * 64
    for text, full in {
        "alpine": "docker.io/library/alpine:latest",
        "ann/tool:1": "docker.io/ann/tool:1",
        "ghcr.io/a/b": "ghcr.io/a/b:latest",
        "localhost/b": "localhost/b:latest",
        "127.0.0.1:5000/x:y": "127.0.0.1:5000/x:y",
        f"[::1]:5000/x:y@{digest}": f"[::1]:5000/x@{digest}",
    }.items():
        assert parse_name(text, "x").full == full
    for text in ("", "-x", "a b", "a/../b", "a:b:c", "a\n", "x@md5:1", "/a", "a" * 600):
        with pytest.raises(InvalidInput):
            parse_name(text, "x")


def test_places_with_colons():
    def there(path):
        return str(path) in ("/a:b", "/c")

    assert split_place("/a:b", "x", there) == (Path("/a:b"), None)
    assert split_place("/a:b:t:u", "x", there) == (Path("/a:b"), "t:u")
    assert split_place("/c:t", "x", there) == (Path("/c"), "t")
    assert split_place("/c@sha256:00", "x", there) == (Path("/c"), "sha256:00")


def test_users():
    passwd = PASSWD.decode()
    assert choose_user("", passwd, "") == "0:0"
    assert choose_user("", passwd + "agent:x:7:7::/:/bin/sh\n", "") == "agent"
    assert choose_user("nobody-here", passwd, "") == "nobody-here"
    assert choose_user("web:staff", passwd, "staff:x:50:\n") == "web:50"
    assert choose_user("5:6", passwd, "") == "5:6"


def test_environ():
    assert parse_environ(["A=1", "B", "=", "C=", "A=2"]) == {"A": "2", "C": ""}


def test_what_overlay_shows(tmp_path):
    for path in ("low/etc/passwd", "low/a/f", "low/x/y"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("low")
    (tmp_path / "up/etc").mkdir(parents=True)
    (tmp_path / "up/a").mkdir()
    os.setxattr(tmp_path / "up/a", "user.overlay.opaque", b"y")
    (tmp_path / "up/x").symlink_to("/etc")
    view = LayerView([(tmp_path / "up", frozenset()), (tmp_path / "low", frozenset())])
    assert view.find("etc/passwd").layer == tmp_path / "low"
    assert view.read_text("etc/passwd") == "low"
    assert view.find("a/f") is None
    assert view.find("x/y") is None
    assert view.find("x/passwd") is None
    os.mknod(tmp_path / "up/etc/passwd", 0o20000, 0)
    assert view.find("etc/passwd") is None


def test_directories_that_a_layer_does_not_list_are_as_below(tmp_path, images):
    low = [Item("srv", mode=0o750), Item("srv/own", mode=0o700), Item("link", link="srv"), Item("gone", mode=0o711)]
    up = [
        Item("srv/own/f", b""),
        Item("link/f", b""),
        Item("new/f", b""),
        Item("gone/f", b""),
        Item(".wh.gone", b""),
        Item("etc/hosts/f", b""),
    ]
    image = prepare(make_layout(tmp_path / "l", [low, up]), images)
    top = Path(image.layers[0].lowers[0])
    assert [stat.S_IMODE((top / path).stat().st_mode) for path in ("srv", "srv/own")] == [0o750, 0o700]
    assert not {"link", "new", "gone"} & {path.name for path in top.iterdir()}


@pytest.mark.parametrize(
    ("words", "kind", "meaning"),
    [
        ('level=fatal msg="... dial tcp 127.0.0.1:1: connect: connection refused"', SandboxError, "cannot be reached"),
        ("lookup x.invalid: no such host", SandboxError, "cannot be reached"),
        ("unauthorized: authentication required", SandboxError, "log in with: skopeo login"),
        ("manifest unknown", InvalidInput, "no such image"),
        ("write /x: no space left on device", SandboxError, "disk of the image store is full"),
        ("x509: certificate signed by unknown authority", SandboxError, "certificate"),
        ("\x1b[31mstrange", SandboxError, "skopeo failed: \\x1b"),
    ],
)
def test_what_skopeo_means(words, kind, meaning):
    error = explain(words.encode(), "image 'x'")
    assert type(error) is kind
    assert meaning in str(error)
    assert "\x1b" not in str(error)
