"""What the gateway costs: the same client against the same server, directly, through a relay, through proxies, and from a cell.

Runs in the closed world. The client and the server are Python processes on the same processors as what is measured, so
ratios between subjects are smaller than those of what they cost themselves.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import msgspec

from vallum.arena import geography as g
from vallum.arena.fakes_server import BULK
from vallum.arena.figures import OURS, Figure, missing, summarise
from vallum.client.face import Node
from vallum.client.places import Places
from vallum.core.errors import NodeError
from vallum.testing.fakes.mirror import PACKAGE

DENIED = "refused connection, as the client sees it"
REQUESTS = "HTTP requests, a connection each, one at a time"
CROWDED = "HTTP requests, a connection each, 16 at once"
KEPT = "HTTP requests on one connection"
BULK_RATE = "bulk download"
VENV_BIN = Path(sys.prefix).parent / ".venv-bench" / "bin"
"""Where ``scripts/setup --bench`` puts peers that are Python programs: their dependencies are not ours."""
_REFUSED_PORT = 1
_PROXY_PORT = 18080
Client = Callable[[list[str]], Awaitable[list[float]]]


@dataclass(frozen=True)
class Proxy:
    """A forward proxy that others use for this, and its command line."""

    name: str
    program: str
    install: str
    config: str
    argv: tuple[str, ...]


PROXIES = (
    Proxy("tinyproxy", "tinyproxy", "apt-get install tinyproxy", "Port {port}\nListen 127.0.0.1\nTimeout 60\nLogLevel Error\n", ("-d", "-c", "{config}")),
    Proxy(
        "squid", "squid", "apt-get install squid",
        "http_port 127.0.0.1:{port}\nhttp_access allow all\ncache deny all\naccess_log none\ncache_log /dev/null\npid_filename none\n"
        "cache_store_log none\nshutdown_lifetime 0 seconds\nlogfile_rotate 0\n",
        ("-N", "-f", "{config}"),
    ),
    Proxy("mitmproxy", "mitmdump", "scripts/setup --bench", "", ("-q", "--listen-host", "127.0.0.1", "--listen-port", "{port}", "--set", "confdir={directory}")),
)  # fmt: skip


async def run(places: Places, repetitions: int) -> list[Figure]:
    """Every figure of the gateway and of the ways around it.

    Raises:
        VallumError: a cell could not be had, or the server did not answer.
    """
    figures = await _measure(OURS, None, repetitions, places)
    figures += await _measure("direct (no walls)", (g.MIRROR[0], g.MIRROR[1]), repetitions, None)
    relay = await asyncio.create_subprocess_exec(
        sys.executable, "-I", "-m", "vallum.arena.relay", g.MIRROR[0], str(g.MIRROR[1]), stdout=asyncio.subprocess.PIPE
    )
    assert relay.stdout is not None
    try:
        port = int(await relay.stdout.readline())
        figures += await _measure("plain asyncio relay", ("127.0.0.1", port), repetitions, None)
    finally:
        relay.kill()
        await relay.communicate()
    for proxy in PROXIES:
        figures += await _measure_proxy(proxy, repetitions)
    return figures


async def _measure(
    subject: str, server: tuple[str, int] | None, repetitions: int, places: Places | None, *, prefix: str = ""
) -> list[Figure]:
    async with _cell_client(places) if places is not None else _plain_client() as client:
        host, port = server or (g.MIRROR_NAME, g.MIRROR[1])
        figures = []
        if server is None or server == g.MIRROR:  # a relay refuses nothing
            refused = await client(["denied", str(repetitions), g.MIRROR[0], str(_REFUSED_PORT), "-", "-"])
            figures.append(summarise(DENIED, subject, "ms", refused))
        small = [host, str(port), g.MIRROR_NAME, f"{prefix}/packages/{PACKAGE}"]
        large = [host, str(port), g.MIRROR_NAME, f"{prefix}/packages/{BULK}"]
        figures.append(summarise(REQUESTS, subject, "/s", await client(["requests", str(repetitions), *small])))
        figures.append(summarise(CROWDED, subject, "/s", await client(["crowd", str(5 * repetitions), *small])))
        figures.append(summarise(KEPT, subject, "/s", await client(["kept", str(5 * repetitions), *small])))
        downloads = str(max(5, repetitions // 10))
        figures.append(summarise(BULK_RATE, subject, "MB/s", await client(["bulk", downloads, *large])))
        return figures


@asynccontextmanager
async def _cell_client(places: Places) -> AsyncIterator[Client]:
    async with Node(places=places) as node, node.sandbox(allow=[f"{g.MIRROR_NAME}:{g.MIRROR[1]}"]) as cell:
        await cell.write_file("/tmp/load.py", _program())  # noqa: S108 - in the cell

        async def call(arguments: list[str]) -> list[float]:
            done = await cell.exec(["/usr/bin/python3", "/tmp/load.py", *arguments], timeout_s=300)  # noqa: S108
            return _samples(done.exit_code, done.stdout, done.stderr)

        yield call


@asynccontextmanager
async def _plain_client() -> AsyncIterator[Client]:
    with tempfile.TemporaryDirectory(prefix="vallum-bench-") as directory:
        program = _lay(Path(directory))

        async def call(arguments: list[str]) -> list[float]:
            process = await asyncio.create_subprocess_exec(
                "/usr/bin/python3",
                str(program),
                *arguments,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
            out, err = await process.communicate()
            return _samples(process.returncode or 0, out, err)

        yield call


def _lay(directory: Path) -> Path:
    program = directory / "load.py"
    program.write_bytes(_program())
    return program


def _program() -> bytes:
    return resources.files("vallum.arena.agent").joinpath("load.py").read_bytes()


def _samples(status: int, out: bytes, err: bytes) -> list[float]:
    if status != 0:
        raise NodeError(f"the bench's client failed with {status}: {err.decode('utf-8', 'replace').strip()[-300:]}")
    return msgspec.json.decode(out, type=list[float])


async def _measure_proxy(proxy: Proxy, repetitions: int) -> list[Figure]:
    if _find(proxy.program) is None:
        return [missing(REQUESTS, proxy.name, "/s", f"not installed: {proxy.install}")]
    with tempfile.TemporaryDirectory(prefix="vallum-proxy-") as directory:
        argv = _prepare(proxy, Path(directory))
        quiet = asyncio.subprocess.DEVNULL
        process = await asyncio.create_subprocess_exec(*argv, stdin=quiet, stdout=quiet, stderr=quiet, cwd=directory)
        try:
            if not await _listens(_PROXY_PORT):
                return [missing(REQUESTS, proxy.name, "/s", f"does not start here; see what it says: {' '.join(argv)}")]
            return await _measure(
                proxy.name, ("127.0.0.1", _PROXY_PORT), repetitions, None, prefix=f"http://{g.MIRROR_NAME}"
            )
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


def _prepare(proxy: Proxy, directory: Path) -> list[str]:
    """Write its configuration; return its command line."""
    config = directory / "config"
    config.write_text(proxy.config.format(port=_PROXY_PORT), "ascii")
    return [
        _find(proxy.program) or proxy.program,
        *(word.format(port=_PROXY_PORT, config=config, directory=directory) for word in proxy.argv),
    ]


def _find(program: str) -> str | None:
    return shutil.which(program) or shutil.which(program, path=str(VENV_BIN))


async def _listens(port: int) -> bool:
    for _ in range(200):
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            await asyncio.sleep(0.05)
        else:
            writer.close()
            return True
    return False
