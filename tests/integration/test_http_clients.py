"""Real clients through inspected HTTP and HTTPS: they work where granted and fail readably where not."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import shutil
import socket
import sys
from pathlib import Path

import pytest

from vallum.gateway.kit import Credential, Kit
from vallum.gateway.tls.leaves import Leaves
from vallum.node.authority import make_authority
from vallum.rules.grants import Rule, Ruleset

pytestmark = pytest.mark.root
if os.geteuid() != 0:
    pytest.skip("needs root: network namespaces", allow_module_level=True)


def _load(name: str, file: str):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(file))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


world_module = _load("http_clients_world_priv", "gateway_world_priv.py")
Server = _load("http_server", "http_server.py").Server
run_in_world, World = world_module.run_in_world, world_module.World

MIRROR = "192.0.2.20"
GUEST_CA, SERVER_CA = make_authority("r1"), make_authority("upstream")
KIT = Kit(authority=GUEST_CA, upstream_roots=SERVER_CA.certificate_pem)
GETS = Rule(id="gets", host="mirror.test", ports=(80, 443), methods=("GET", "HEAD"))
POSTS = Rule(id="posts", host="mirror.test", ports=(80, 443), methods=("POST",), paths=("/in/**",))
PYTHON = sys.executable


def serve(world: World, *, git_root: Path | None = None, port: int = 443):
    """The server of mirror.test, with a certificate of an authority that only the gateway trusts."""
    sock = world.in_fakes(lambda: world_module.listen(socket.AF_INET, (MIRROR, port)))
    context = Leaves(SERVER_CA).context("mirror.test", ("http/1.1",)) if port == 443 else None
    return Server(sock, context, git_root)


async def run(world: World, tmp: Path, *argv: str, **environ: str) -> tuple[int, str, str]:
    """Run a client in the cell's network; it trusts the run's authority and asks the gateway for names."""
    (tmp / "ca.pem").write_bytes(GUEST_CA.certificate_pem)
    (tmp / "none").write_text("")
    (tmp / "resolv").write_text("nameserver 9.9.9.9\noptions timeout:2 attempts:1\n")
    binds = f"mount --bind {tmp}/none /etc/hosts && mount --bind {tmp}/resolv /etc/resolv.conf"
    process = await asyncio.create_subprocess_exec(
        *("nsenter", "-t", str(world.cell), "-n", "unshare", "-m", "sh", "-c", f'{binds} && exec "$@"', "sh", *argv),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(tmp),
            "LANG": "C.UTF-8",
            **dict.fromkeys(("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"), f"{tmp}/ca.pem"),
            **dict.fromkeys(("NODE_EXTRA_CA_CERTS", "GIT_SSL_CAINFO"), f"{tmp}/ca.pem"),
            **environ,
        },
    )
    try:
        out, err = await asyncio.wait_for(process.communicate(), 40)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return process.returncode or 0, out.decode(), err.decode()


def inspect(tmp_path: Path, scenario, *allow: Rule, kit: Kit = KIT) -> None:
    run_in_world(tmp_path, Ruleset(allow=allow), scenario, kit=kit)


@pytest.mark.parametrize("version", ["--http1.1", "--http2"])
def test_curl(tmp_path: Path, version: str) -> None:
    async def scenario(world: World) -> None:
        with serve(world) as server:
            code, out, err = await run(
                world, tmp_path, "curl", "-sS", "--path-as-is", version, "https://mirror.test/a/./b?c=1"
            )
            assert code == 0, err
            assert json.loads(out)["path"] == "/a/b?c=1"
            code, out, err = await run(world, tmp_path, "curl", "-sSi", version, "-d", "x", "https://mirror.test/out")
            assert " 403" in out.splitlines()[0] and "vallum: blocked by rule" in out, (out, err)
            data = "y" * 300_000
            (tmp_path / "data").write_text(data)
            at = f"@{tmp_path}/data"
            code, out, _ = await run(world, tmp_path, "curl", "-sS", version, "--data", at, "https://mirror.test/in/a")
            assert len(json.loads(out)["body"]) == 300_000
            assert [r[:2] for r in server.requests] == [("GET", "/a/b?c=1"), ("POST", "/in/a")]
            assert [e.state for e in await world.settled(5, "http.request")] == [
                *("opened", "closed", "denied", "opened", "closed"),
            ]
            flows = await world.settled(6)
            assert all(e.inspected for e in flows)

    inspect(tmp_path, scenario, GETS, POSTS)


FETCH = """
fetch('{url}').then(async r => {{ if (!r.ok) throw r.status; console.log(await r.text()) }})
  .catch(e => {{ console.error(e); process.exit(1) }})
"""
HTTP2 = """
import httpx
r = httpx.Client(http2=True).get('{url}')
r.raise_for_status()
assert r.http_version == 'HTTP/2'
print(r.text)
"""
JAVA = """
import java.net.URI; import java.net.http.*;
public class Get {{ public static void main(String[] a) throws Exception {{
  var r = HttpClient.newHttpClient().send(HttpRequest.newBuilder(URI.create("{url}")).build(),
    HttpResponse.BodyHandlers.ofString());
  System.out.println(r.body()); System.exit(r.statusCode() == 200 ? 0 : 1); }} }}
"""
CLIENTS = {
    "wget": ("wget", "-q", "-O", "-", "{url}"),
    "urllib": (PYTHON, "-c", "import urllib.request as u; print(u.urlopen('{url}').read().decode())"),
    "requests": (PYTHON, "-c", "import requests; r = requests.get('{url}'); r.raise_for_status(); print(r.text)"),
    "httpx": (PYTHON, "-c", "import httpx; r = httpx.get('{url}'); r.raise_for_status(); print(r.text)"),
    "httpx over HTTP/2": (PYTHON, "-c", HTTP2),
    "node": ("node", "-e", FETCH),
}


@pytest.mark.parametrize("client", CLIENTS)
def test_clients_work_when_granted_and_fail_when_not(tmp_path: Path, client: str) -> None:
    argv = CLIENTS[client]
    if shutil.which(argv[0]) is None:
        pytest.skip(f"{argv[0]} is not installed")

    async def scenario(world: World) -> None:
        with serve(world) as server:
            for path in ("/pub/a", "/private"):
                line = [part.format(url=f"https://mirror.test{path}") if "{url}" in part else part for part in argv]
                trust = {"WGETRC": f"{tmp_path}/wgetrc"}
                (tmp_path / "wgetrc").write_text(f"ca_certificate = {tmp_path}/ca.pem\n")
                code, out, err = await run(world, tmp_path, *line, **trust)
                assert (code == 0) == (path == "/pub/a"), (out, err)
                if code == 0:
                    assert json.loads(out)["path"] == "/pub/a"
            assert [r[1] for r in server.requests] == ["/pub/a"]
            denied = [e for e in await world.settled(3, "http.request") if e.state == "denied"]
            assert [(e.rule, e.path, e.scope.step) for e in denied] == [("path-mismatch", "/private", 3)]

    only = Rule(id="only", host="mirror.test", ports=(443,), methods=("GET",), paths=("/pub/**",))
    inspect(tmp_path, scenario, only)


def test_git_reads_where_granted_and_is_told_why_it_may_not_push(tmp_path: Path) -> None:
    git = ("git", "-c", "user.name=a", "-c", "user.email=a@b.test", "-c", "init.defaultBranch=main")
    root, work = tmp_path / "root", tmp_path / "work"
    root.mkdir()

    async def local(*argv: str) -> None:
        process = await asyncio.create_subprocess_exec(*git, *argv, stdout=-3, stderr=-3)
        assert await process.wait() == 0, argv

    async def scenario(world: World) -> None:
        await local("init", "--bare", f"{root}/a.git")
        await local("-C", f"{root}/a.git", "config", "http.receivepack", "true")
        await local("clone", f"{root}/a.git", f"{work}")
        await local("-C", f"{work}", "commit", "--allow-empty", "-m", "one")
        await local("-C", f"{work}", "push", "origin", "HEAD:main")
        with serve(world, git_root=root) as server:
            url, clone = "https://mirror.test/a.git", f"{tmp_path}/clone"
            for version in ("2", "0"):
                target = f"{clone}{version}"
                code, _, err = await run(
                    world, tmp_path, *git, "-c", f"protocol.version={version}", "clone", url, target
                )
                assert code == 0, err
            code, _, err = await run(world, tmp_path, *git, "-C", f"{clone}2", "fetch")
            assert code == 0, err
            code, _, err = await run(world, tmp_path, *git, "-C", f"{clone}2", "commit", "--allow-empty", "-m", "two")
            code, _, err = await run(world, tmp_path, *git, "-C", f"{clone}2", "push", "origin", "HEAD:main")
            assert code != 0
            assert "remote error: vallum: blocked by rule git-read-only" in err, err
            assert not any("receive-pack" in r[1] for r in server.requests)
            denied = [e for e in world.events if e.__struct_config__.tag == "http.request" and e.state == "denied"]
            assert [(e.rule, e.status) for e in denied] == [("git-read-only", None)]

    inspect(tmp_path, scenario, Rule(id="git", host="mirror.test", ports=(443,), git="read"))


def test_git_pushes_where_granted(tmp_path: Path) -> None:
    git = ("git", "-c", "user.name=a", "-c", "user.email=a@b.test", "-c", "init.defaultBranch=main")

    async def scenario(world: World) -> None:
        root = tmp_path / "root"
        for argv in (
            ("init", "--bare", f"{root}/a.git"),
            ("-C", f"{root}/a.git", "config", "http.receivepack", "true"),
            ("init", f"{tmp_path}/work"),
            ("-C", f"{tmp_path}/work", "commit", "--allow-empty", "-m", "one"),
        ):
            code, _, err = await run(world, tmp_path, *git, *argv)
            assert code == 0, err
        with serve(world, git_root=root) as server:
            url = "https://mirror.test/a.git"
            code, _, err = await run(world, tmp_path, *git, "-C", f"{tmp_path}/work", "push", url, "HEAD:main")
            assert code == 0, err
            assert server.requests[-1][1] == "/a.git/git-receive-pack"

    inspect(tmp_path, scenario, Rule(id="git", host="mirror.test", ports=(443,), git="write"))


def test_a_credential_is_put_in_and_never_shown(tmp_path: Path) -> None:
    secret = b"sk-live-0123456789abcdef"
    credential = Credential(name="key", hosts=("mirror.test",), secret=secret)
    kit = Kit(authority=GUEST_CA, upstream_roots=SERVER_CA.certificate_pem, credentials=(credential,))

    async def scenario(world: World) -> None:
        with serve(world) as server:
            url = "https://mirror.test/echo?access_token=guess"
            code, out, err = await run(world, tmp_path, "curl", "-sS", "-H", "Authorization: Bearer mine", url)
            assert code == 0, err
            assert server.requests[0][2]["authorization"] == f"Bearer {secret.decode()}"
            assert json.loads(out)["headers"]["authorization"] == "Bearer " + "*" * len(secret)
            _, closed = await world.settled(2, "http.request")
            assert (closed.credential, closed.path) == ("key", "/echo?access_token=REDACTED")
            assert secret.decode() not in str(world.events)

    inspect(tmp_path, scenario, Rule(id="api", host="mirror.test", ports=(443,), credential="key"), kit=kit)
    other = Credential(name="key", hosts=("elsewhere.test",), secret=secret)

    async def refused(world: World) -> None:
        with serve(world) as server:
            _, out, err = await run(world, tmp_path, "curl", "-sS", "https://mirror.test/echo")
            assert "blocked by rule credential" in out, (out, err)
            assert server.requests == []

    kit = Kit(authority=GUEST_CA, upstream_roots=SERVER_CA.certificate_pem, credentials=(other,))
    inspect(tmp_path, refused, Rule(id="api", host="mirror.test", ports=(443,), credential="key"), kit=kit)


def test_java_over_clear_http_which_offers_h2c_is_read_as_http1(tmp_path: Path) -> None:
    if shutil.which("java") is None:
        pytest.skip("java is not installed")

    async def scenario(world: World) -> None:
        with serve(world, port=80) as server:
            for path in ("/pub/a", "/private"):
                (tmp_path / "Get.java").write_text(JAVA.format(url=f"http://mirror.test{path}"))
                code, out, err = await run(world, tmp_path, "java", f"{tmp_path}/Get.java")
                assert (code == 0) == (path == "/pub/a"), (out, err)
                assert path == "/pub/a" or "vallum: blocked by rule path-mismatch" in out
            ((_, path, headers, _),) = server.requests
            assert path == "/pub/a"
            assert not {"upgrade", "http2-settings"} & {name.lower() for name in headers}

    inspect(tmp_path, scenario, Rule(id="only", host="mirror.test", ports=(80,), methods=("GET",), paths=("/pub/**",)))


def peak_of(pid: int) -> int:
    """Bytes that a process has had in memory at most."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def test_a_hundred_parallel_streams_of_one_connection_stay_flat_in_memory(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        with serve(world) as server:
            code, _, err = await run(world, tmp_path, "curl", "-sS", "--http2", "https://mirror.test/big/1")
            assert code == 0, err
            before = peak_of(world.link.pid)
            urls = "https://mirror.test/big/400000?[1-100]"
            argv = ("curl", "-sS", "--http2", "-Z", "--parallel-max", "100", "-w", "%{http_code} %{size_download}\n")
            code, out, err = await run(world, tmp_path, *argv, "-o", "/dev/null", urls)
            assert code == 0, err
            assert out.splitlines() == ["200 400000"] * 100, {e.reason for e in world.events if "ended" in e.reason}
            assert len(server.requests) == 101
            grown = peak_of(world.link.pid) - before
            assert grown < 40_000_000, f"{grown} bytes more for 40 MB that passed"
            assert len({e.flow for e in await world.settled(202, "http.request")}) <= 3

    inspect(tmp_path, scenario, GETS)
