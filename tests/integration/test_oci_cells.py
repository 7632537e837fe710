"""Cells on container images: what a guest sees of layers, whiteouts and owners; registries; disks that fill up."""

import base64
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import vallum
from vallum.core.errors import InvalidInput, SandboxError
from vallum.sandbox.base import Command
from vallum.sandbox.images.oci import resolve_oci
from vallum.testing.image_layouts import Item, Layout, make_layer, make_layout
from vallum.testing.ns_cells import open_cell
from vallum.testing.sandbox_conformance.driving import run

IS_ROOT = os.geteuid() == 0
ORDINARY_UID = 12345
PASSWD = b"root:x:0:0:root:/root:/bin/sh\nweb:x:33:33:web:/srv:/bin/sh\n"

root = pytest.mark.root
only_root = pytest.mark.skipif(not IS_ROOT, reason="needs root")
skopeo = pytest.mark.skipif(shutil.which("skopeo") is None, reason="skopeo is not installed (apt-get install skopeo)")


def collect_programs(*names: str) -> list[Item]:
    """Programs of this machine with their libraries, at the paths that they ask for."""
    items = {}
    for name in names:
        path = shutil.which(name)
        assert path is not None, name
        items[f"bin/{name}"] = Item(f"bin/{name}", Path(path).read_bytes(), mode=0o755)
        linked = subprocess.run(["ldd", path], capture_output=True, text=True, check=True).stdout
        for library in re.findall(r"(/\S+) \(0x", linked):
            at = library.lstrip("/")
            items[at] = Item(at, Path(library).read_bytes(), mode=0o755)
    return list(items.values())


@pytest.fixture(scope="session")
def base() -> bytes:
    programs = collect_programs("sh", "cat", "ls", "id", "stat", "rm", "chmod", "env")
    rest = [
        Item("etc"), Item("etc/passwd", PASSWD), Item("etc/group", b"root:x:0:\nweb:x:33:\n"),
        Item("etc/resolv.conf", b"nameserver 8.8.8.8\n"), Item("root", mode=0o700), Item("srv", uid=33, gid=33),
        Item("srv/old", b"old", uid=33, gid=33), Item("srv/kept", b"kept", uid=33, gid=65534, mode=0o640),
        Item("data"), Item("data/one", b"1"), Item("data/sub/two", b"2"), Item("setuid", b"", mode=0o4755),
        Item("first", b"shared", mode=0o600), Item("second", kind=b"1", link="first"), Item("tmp", link="/etc"),
    ]  # fmt: skip
    return make_layer(programs + rest)


UPPER = [
    Item("srv/.wh.old", b""), Item("srv/new", b"new", uid=5), Item("data"), Item("data/.wh..wh..opq", b""), Item("data/three", b"3"),
    Item("first", b"changed"), Item(".wh.setuid", b""),
]  # fmt: skip


@pytest.fixture
def image_ref(tmp_path, base):
    process = {"Env": ["A=b"], "WorkingDir": "/work/here", "User": "web"}
    Layout(tmp_path / "l").add_image([base, make_layer(UPPER)], process=process)
    return f"oci:{tmp_path}/l"


async def text(cell, script, *, user=None, status=0):
    result = await run(cell, ["/bin/sh", "-c", script], user=user)
    assert result.exit.status == status, result.stderr
    return result.text


@root
@only_root
async def test_a_cell_on_an_image(tmp_path, image_ref):
    image = resolve_oci(image_ref, images_dir=tmp_path / "images", rootless=False)
    async with open_cell(tmp_path, image=image) as cell:
        assert await text(cell, "id -u; id -g; echo $A $HOME $USER; pwd") == "33\n33\nb /srv web\n/work/here"
        assert await text(cell, "cd /srv; ls; cat new") == "kept\nnew\nnew"
        assert await text(cell, "ls /data; ls -d /setuid 2>/dev/null", status=2) == "three"
        assert (
            await text(cell, "stat -c '%u:%g %a' /srv/kept /srv/new /root /etc/passwd")
            == "33:65534 640\n5:0 644\n0:0 700\n0:0 644"
        )
        assert await text(cell, "cat /first /second; stat -c %h /second", user="root") == "changedshared2"
        assert "198.18.0.53" in await text(cell, "cat /etc/resolv.conf")
        assert await text(cell, "stat -c '%a %F' /tmp; echo x > /tmp/x; cat /etc/hostname") == "1777 directory\ncell"
        assert await text(cell, "rm /second && chmod 600 /etc/passwd && ls -d /srv", user="root") == "/srv"
        with pytest.raises(InvalidInput, match="there is no user 'nobody-here'"):
            await cell.spawn(Command(argv=[b"/bin/sh"], user="nobody-here"), step=0)
    lower = Path(image.layers[0].lowers[2])
    assert (lower / "second").exists(), "what a guest deletes is deleted in its own layer only"
    assert (lower / "etc/passwd").stat().st_mode & 0o777 == 0o644


@root
@only_root
async def test_setuid_files_of_an_image_raise_nobody(tmp_path, base):
    programs = [Item("bin/raised", Path(shutil.which("id")).read_bytes(), mode=0o4755)]
    Layout(tmp_path / "l").add_image([base, make_layer(programs)], process={"User": "web"})
    image = resolve_oci(f"oci:{tmp_path}/l", images_dir=tmp_path / "images", rootless=False)
    async with open_cell(tmp_path, image=image) as cell:
        assert await text(cell, "stat -c %a /bin/raised; /bin/raised -u") == "4755\n33"


@root
@only_root
async def test_a_user_that_the_image_does_not_have(tmp_path, base):
    Layout(tmp_path / "l").add_image([base], process={"User": "ghost"})
    image = resolve_oci(f"oci:{tmp_path}/l", images_dir=tmp_path / "images", rootless=False)
    async with open_cell(tmp_path, image=image) as cell:
        with pytest.raises(InvalidInput, match="there is no user 'ghost' in the cell"):
            await run(cell, ["/bin/sh", "-c", "true"])
        assert await text(cell, "id -u", user="0") == "0"


async def test_a_cell_of_an_ordinary_user(tmp_path, image_ref):
    """As root: a cell without a range of ids, which is built the same way. As an ordinary user: the real thing."""
    image = resolve_oci(image_ref, images_dir=tmp_path / "images", rootless=True)
    async with open_cell(tmp_path, image=image, with_range=False) as cell:
        assert await text(cell, "id -u; echo $A $HOME $USER; pwd") == "1000\nb /home/agent agent\n/work/here"
        assert await text(cell, "ls /srv /data; stat -c %u /srv/new") == "/data:\nthree\n\n/srv:\nkept\nnew\n1000"
        assert await text(cell, "echo x >> /srv/kept; cat /srv/kept; rm /second; ls /root") == "keptx"


@root
@only_root
def test_the_same_as_an_ordinary_user():
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        pytest.skip("setpriv (util-linux) is not here")
    become = [setpriv, "--reuid", str(ORDINARY_UID), "--regid", str(ORDINARY_UID), "--clear-groups", "--"]
    if subprocess.run([*become, sys.executable, "-c", f"open({__file__!r})"], capture_output=True).returncode != 0:
        pytest.skip("an ordinary user cannot read this repository")
    home = Path("/tmp") / f"vallum-oci-{secrets.token_hex(4)}"
    home.mkdir(mode=0o700)
    os.chown(home, ORDINARY_UID, ORDINARY_UID)
    environ = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "PYTHONDONTWRITEBYTECODE": "1",
        "LANG": "C.UTF-8",
        "HYPOTHESIS_STORAGE_DIRECTORY": f"{home}/h",
    }
    files = [__file__, *map(str, Path(__file__).parents[1].glob("unit/test_oci*.py"))]
    command = [
        *become,
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        f"--basetemp={home}/t",
        "--tb=short",
        "-k",
        "not registry",
        *files,
    ]
    try:
        result = subprocess.run(
            command, cwd=Path(__file__).parents[2], env=environ, capture_output=True, text=True, timeout=110
        )
    finally:
        shutil.rmtree(home, ignore_errors=True)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


@root
@only_root
async def test_hostile_images_build_no_way_out(tmp_path, base):
    """Links where a cell mounts, device nodes, a database of users that is a link."""
    items = [
        Item("proc", link="/etc"), Item("dev", link="/root"), Item("sys", link="../../.."), Item("run", link="/tmp"),
        Item("etc/resolv.conf", link="/etc/shadow"), Item("etc/hosts", link="/nonexistent"),
        Item("disk", kind=b"4"), Item("etc/passwd", link="/proc/1/environ"), Item("work/here", link="/proc/self/root"),
    ]  # fmt: skip
    Layout(tmp_path / "l").add_image([base, make_layer(items)], process={"WorkingDir": "/work/here"})
    image = resolve_oci(f"oci:{tmp_path}/l", images_dir=tmp_path / "images", rootless=False)
    async with open_cell(tmp_path, image=image) as cell:
        assert (
            await text(cell, "stat -c %F /proc /dev /sys /run /etc/hosts", user="0")
            == "directory\n" * 4 + "regular file"
        )
        assert await text(cell, "ls -d /disk 2>&1", user="0", status=2) != ""
        assert "198.18.0.53" in await text(cell, "cat /etc/resolv.conf", user="0")


@root
@only_root
@pytest.mark.skipif(shutil.which("umoci") is None, reason="umoci is not installed (apt-get install umoci)")
async def test_the_tree_is_the_one_that_another_tool_unpacks(tmp_path, image_ref):
    subprocess.run(
        ["umoci", "raw", "unpack", "--image", f"{tmp_path}/l:latest", f"{tmp_path}/theirs"],
        check=True,
        capture_output=True,
    )
    image = resolve_oci(image_ref, images_dir=tmp_path / "images", rootless=False)
    (tmp_path / "ours").mkdir()
    lowers = ":".join(image.layers[0].lowers)
    subprocess.run(
        ["mount", "-t", "overlay", "overlay", "-o", f"ro,userxattr,lowerdir={lowers}", f"{tmp_path}/ours"], check=True
    )
    try:
        ours, theirs = describe_tree(tmp_path / "ours"), describe_tree(tmp_path / "theirs")
        added = {
            "dev",
            "etc/hostname",
            "etc/hosts",
            "etc/resolv.conf",
            "proc",
            "run",
            "sys",
            "tmp",
            "work",
            "work/here",
        }
        assert set(ours) - added == set(theirs) - added
        assert {p: v for p, v in ours.items() if p not in added} == {p: v for p, v in theirs.items() if p not in added}
    finally:
        subprocess.run(["umount", f"{tmp_path}/ours"], check=True)


def describe_tree(top: Path) -> dict[str, tuple]:
    found = {}
    for path in sorted(top.rglob("*")):
        s = path.lstat()
        content = (
            os.readlink(path)
            if path.is_symlink()
            else hashlib.sha256(path.read_bytes()).hexdigest()
            if path.is_file()
            else ""
        )
        found[str(path.relative_to(top))] = (
            oct(s.st_mode),
            s.st_uid,
            s.st_gid,
            content,
            int(s.st_mtime) if path.is_file() else 0,
        )
    return found


# ---------------------------------------------------------------------- through the public face


@root
@only_root
@pytest.mark.e2e
async def test_an_image_through_the_public_face(tmp_path, image_ref, base):
    async with vallum.Node(home=tmp_path / "home") as node:
        async with node.sandbox(image=image_ref) as sb, node.sandbox(image=image_ref) as other:
            assert (await sb.exec(["cat", "/srv/new"])).stdout == b"new"
            assert (await other.exec(["id", "-u"])).stdout == b"33\n"
            async with sb.session() as shell:
                assert (await shell.run("cd /data && ls")).stdout == b"three\n"
            events = await node.events(run=sb.run, episode=sb.episode)
        digest = json.loads((tmp_path / "l/index.json").read_text())["manifests"][0]["digest"]
        assert (events[0]["image"], events[0]["image_digest"]) == (image_ref, digest)
        with pytest.raises(vallum.InvalidInput, match="does not exist"):
            await node.sandbox(image="oci:/nonexistent")


# ---------------------------------------------------------------------- a disk that fills up


@root
@only_root
@pytest.mark.parametrize("size", ["1m", "8m"])
def test_a_full_disk_leaves_nothing_half_made(tmp_path, size):
    images = tmp_path / "images"
    images.mkdir()
    ref = make_layout(tmp_path / "l", [[Item(f"f{n}", os.urandom(1 << 20)) for n in range(16)]])
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "tmpfs", str(images)], check=True)
    try:
        with pytest.raises(SandboxError, match=r"^the disk of the image store .* is full; free some space there"):
            resolve_oci(ref, images_dir=images, rootless=False)
        assert list((images / "layers").iterdir()) == []
        assert os.statvfs(images).f_bavail > os.statvfs(images).f_blocks - 64
    finally:
        subprocess.run(["umount", str(images)], check=True)


# ---------------------------------------------------------------------- registries


class Registry:
    """A registry of one layout on loopback, over plain HTTP."""

    def __init__(self, layout: Path) -> None:
        self.layout = layout
        self.asked: list[str] = []
        self.needs_login = False
        self.swap: dict[str, bytes] = {}
        registry = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                registry.answer(self)

            do_HEAD = do_GET  # noqa: N815 - as the base class calls it

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.at = f"127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request) -> None:
        self.asked.append(request.path)
        wanted = "Basic " + base64.b64encode(b"ann:secret").decode()
        if self.needs_login and request.headers.get("Authorization") != wanted:
            self.send(
                request,
                401,
                b'{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}',
                {"WWW-Authenticate": 'Basic realm="x"'},
            )
            return
        if request.path == "/v2/":
            self.send(request, 200, b"{}")
            return
        found = re.fullmatch(r"/v2/team/tool/(manifests|blobs)/(.+)", request.path)
        name = found[2] if found else ""
        index = json.loads((self.layout / "index.json").read_text())["manifests"]
        digest = next(
            (m["digest"] for m in index if m["annotations"]["org.opencontainers.image.ref.name"] == name), name
        )
        path = self.layout / "blobs/sha256" / digest.removeprefix("sha256:")
        if not re.fullmatch("sha256:[0-9a-f]{64}", digest) or not path.is_file():
            self.send(request, 404, b'{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}')
            return
        body = self.swap.get(digest, path.read_bytes())
        kind = (
            json.loads(body).get("mediaType", "application/json")
            if found[1] == "manifests"
            else "application/octet-stream"
        )
        self.send(request, 200, body, {"Content-Type": kind, "Docker-Content-Digest": digest})

    @staticmethod
    def send(request, status, body, headers=None) -> None:
        request.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            request.send_header(key, value)
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(body)


@pytest.fixture
def registry(tmp_path, monkeypatch):
    Layout(tmp_path / "remote").add_image(
        [make_layer([Item("etc/passwd", PASSWD), Item("f", b"f")]), make_layer([Item("g", os.urandom(1000))])], tag="v1"
    )
    registry = Registry(tmp_path / "remote")
    conf = tmp_path / "home/.config/containers/registries.conf"
    conf.parent.mkdir(parents=True)
    conf.write_text(f'[[registry]]\nlocation = "{registry.at}"\ninsecure = true\n')
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    yield registry
    registry.close()


def pull(ref, tmp_path):
    try:
        return resolve_oci(ref, images_dir=tmp_path / "images", rootless=not IS_ROOT)
    finally:
        assert list((tmp_path / "images").glob("pulls/*")) == []
        assert list((tmp_path / "images/layers").glob(".new*")) == []


@skopeo
def test_an_image_of_a_registry(tmp_path, registry):
    image = pull(f"docker://{registry.at}/team/tool:v1", tmp_path)
    digest = json.loads((tmp_path / "remote/index.json").read_text())["manifests"][0]["digest"]
    assert image.digest == digest
    assert (Path(image.layers[0].lowers[2]) / "f").read_bytes() == b"f"
    registry.asked.clear()
    assert pull(f"docker://{registry.at}/team/tool:v1", tmp_path) == image
    assert registry.asked == [], "a name that was pulled is not asked for again"
    pinned = pull(f"docker://{registry.at}/team/tool@{digest}", tmp_path)
    assert pinned.layers == image.layers
    shutil.rmtree(tmp_path / "images/layers")
    assert pull(f"docker://{registry.at}/team/tool:v1", tmp_path).digest == digest
    assert (Path(image.layers[0].lowers[2]) / "f").read_bytes() == b"f"


@skopeo
def test_a_registry_for_several_machines(tmp_path, registry):
    layout = Layout(tmp_path / "remote")
    one = json.loads((tmp_path / "remote/index.json").read_text())["manifests"][0]
    from vallum.sandbox.images.oci_spec import find_architecture

    entry = {k: one[k] for k in ("digest", "size", "mediaType")} | {
        "platform": {"os": "linux", "architecture": find_architecture()}
    }
    other = entry | {"platform": {"os": "linux", "architecture": "s390x"}, "digest": "sha256:" + "0" * 64}
    body = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": [other, entry]}
    index = layout.add_blob(json.dumps(body).encode(), body["mediaType"])
    index["annotations"] = {"org.opencontainers.image.ref.name": "multi"}
    (tmp_path / "remote/index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [one, index]}))
    assert pull(f"docker://{registry.at}/team/tool:multi", tmp_path).digest == one["digest"]
    assert pull(f"docker://{registry.at}/team/tool@{index['digest']}", tmp_path).digest == one["digest"]


@skopeo
def test_a_registry_that_has_no_such_image_or_wants_a_login(tmp_path, registry):
    with pytest.raises(InvalidInput, match="the registry has no such image"):
        pull(f"docker://{registry.at}/team/tool:v2", tmp_path)
    registry.needs_login = True
    with pytest.raises(SandboxError, match="log in with: skopeo login"):
        pull(f"docker://{registry.at}/team/tool:v1", tmp_path)


@skopeo
def test_credentials_of_a_registry_are_passed_on(tmp_path, registry, monkeypatch):
    registry.needs_login = True
    auth = tmp_path / "auth.json"
    auth.write_text(json.dumps({"auths": {registry.at: {"auth": base64.b64encode(b"ann:secret").decode()}}}))
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(auth))
    assert len(pull(f"docker://{registry.at}/team/tool:v1", tmp_path).layers[0].lowers) == 3


@skopeo
def test_a_registry_that_lies(tmp_path, registry):
    manifest = json.loads((tmp_path / "remote/index.json").read_text())["manifests"][0]["digest"]
    layer = json.loads(Layout(tmp_path / "remote").find_blob(manifest).read_text())["layers"][1]["digest"]
    registry.swap = {layer: b"something else"}
    with pytest.raises((SandboxError, InvalidInput), match=r"cannot be pulled|is not usable"):
        pull(f"docker://{registry.at}/team/tool:v1", tmp_path)
    raw = Layout(tmp_path / "remote").find_blob(manifest).read_bytes()
    registry.swap = {manifest: raw.replace(b'"schemaVersion": 2', b'"schemaVersion":  2')}
    with pytest.raises((SandboxError, InvalidInput), match=r"cannot be pulled|sent something else"):
        pull(f"docker://{registry.at}/team/tool@{manifest}", tmp_path)
    assert not list((tmp_path / "images/refs").iterdir())


@skopeo
def test_a_registry_that_cannot_be_reached(tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        with pytest.raises(SandboxError, match="the registry cannot be reached; check its name"):
            pull(f"docker://127.0.0.1:{port}/team/tool:v1", tmp_path)


def test_no_skopeo_and_so_no_registry(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SandboxError, match="skopeo is not installed; install it"):
        pull("docker://127.0.0.1:1/team/tool:v1", tmp_path)


@skopeo
async def test_a_registry_that_never_answers_is_let_go_when_nobody_waits(tmp_path):
    import asyncio

    from vallum.sandbox.images.resolve import resolve_in_thread

    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        ref = f"docker://127.0.0.1:{silent.getsockname()[1]}/team/tool:v1"
        task = asyncio.ensure_future(resolve_in_thread(ref, images_dir=tmp_path / "images", rootless=not IS_ROOT))
        await asyncio.sleep(0.6)
        assert list((tmp_path / "images/pulls").iterdir())
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        for _ in range(100):
            if not list((tmp_path / "images/pulls").iterdir()):
                break
            await asyncio.sleep(0.05)
        assert list((tmp_path / "images/pulls").iterdir()) == []
