"""What `test_tls_cells.py` runs in a network and mount namespace of its own: TLS servers, a node, cells with real clients.

``python tls_cells.py DIRECTORY`` prints one JSON object.
"""

from __future__ import annotations

import asyncio
import json
import os
import ssl
import sys
from pathlib import Path

import requests

import vallum
from vallum.testing.certificates import PrivateAuthority

RULES = """
[[allow]]
host = "read.test"
ports = [443]
methods = ["GET", "HEAD"]

[[allow]]
host = "expired-read.test"
ports = [443]
methods = ["GET"]
""" + "".join(
    f'\n[[allow]]\nhost = "{name}"\nports = [443]\n'
    for name in ("relay.test", "wrong.test", "expired.test", "self.test", "plain.test")
)

JAVA = """
import java.net.*; import java.net.http.*;
public class Get { public static void main(String[] a) throws Exception {
  var answer = HttpClient.newHttpClient().send(HttpRequest.newBuilder(URI.create(a[0])).build(),
    HttpResponse.BodyHandlers.ofString());
  System.out.println(answer.body()); } }
"""

CLIENTS = {
    "curl": "curl -sS https://{host}/",
    "wget": "wget -qO- https://{host}/",
    "openssl": "printf 'GET / HTTP/1.0\\r\\nHost: {host}\\r\\n\\r\\n' | openssl s_client -quiet -verify_return_error "
    "-servername {host} -connect {host}:443",
    "git": "git ls-remote https://{host}/x.git",
    "urllib": "python3 -c \"import urllib.request as r; print(r.urlopen('https://{host}/').read())\"",
    "requests": "PYTHONPATH=/opt/site python3 -c \"import requests as r; print(r.get('https://{host}/').text)\"",
    "httpx": "PYTHONPATH=/opt/site python3 -c \"import httpx as r; print(r.get('https://{host}/').text)\"",
    "node": "node -e \"fetch('https://{host}/').then(r => r.text()).then(console.log, e => {{ console.log(e.cause); process.exit(1) }})\"",
    "java": "java /tmp/Get.java https://{host}/",
}
SEARCH_MEMORY = """
import os, re
words, looked = (b"PRIVATE" + b" KEY"), 0
for pid in filter(str.isdigit, os.listdir("/proc")):
    if int(pid) == os.getpid(): continue
    try:
        maps, memory = open(f"/proc/{pid}/maps").read(), open(f"/proc/{pid}/mem", "rb", 0)
    except OSError: continue
    for start, end in re.findall("^([0-9a-f]+)-([0-9a-f]+) r", maps, re.M):
        try:
            memory.seek(int(start, 16)); data = memory.read(int(end, 16) - int(start, 16))
        except (OSError, ValueError, OverflowError): continue
        looked += len(data)
        if words in data: print("FOUND", pid, start)
print("looked", looked)
"""
"""What a guest can read of the memory of others."""
SITE = Path(requests.__file__).parents[1]
NO_VARIABLES = "unset SSL_CERT_FILE REQUESTS_CA_BUNDLE CURL_CA_BUNDLE GIT_SSL_CAINFO PIP_CERT; "


class Server:
    """Answers every request with ``hello NAME``; keeps what was said to it."""

    def __init__(self, name: str, context: ssl.SSLContext | None) -> None:
        self.name, self.context, self.heard = name, context, bytearray()

    async def start(self, ip: str) -> None:
        self.running = await asyncio.start_server(self.serve, ip, 443, ssl=self.context)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n") if self.context else await reader.read(4096)
            self.heard += head
            body = f"hello {self.name}\n".encode()
            writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


def make_servers(authority: PrivateAuthority) -> list[Server]:
    return [
        Server("read.test", authority.serve("read.test")),
        Server("relay.test", authority.serve("relay.test")),
        Server("wrong.test", authority.serve("other.test")),
        Server("expired.test", authority.serve("expired.test", valid_days=(-9, -8))),
        Server("expired-read.test", authority.serve("expired-read.test", valid_days=(-9, -8))),
        Server("self.test", authority.serve("self.test", is_self_signed=True)),
        Server("plain.test", None),
    ]


def find_keys() -> list[str]:
    """Where a private key is written: files of the node, and what its processes were started with."""
    key, found = b"BEGIN PRIVATE KEY", []
    for parent, _, names in os.walk(os.environ["VALLUM_HOME"]):
        for path in (Path(parent, name) for name in names):
            try:
                if path.is_file() and not path.is_symlink() and key in path.read_bytes():
                    found.append(str(path))
            except OSError:
                continue  # gone meanwhile
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"vallum" in path.read_bytes() and key in path.read_bytes() + path.with_name("environ").read_bytes():
                found.append(str(path))
            found += [str(fd) for fd in path.with_name("fd").iterdir() if "memfd:leaf" in str(fd.readlink())]
        except OSError:
            continue
    return found


async def main(directory: Path) -> dict:
    authority = PrivateAuthority()
    servers = make_servers(authority)
    for number, server in enumerate(servers):
        await server.start(f"192.0.2.{20 + number}")
    (directory / "upstream.pem").write_bytes(authority.certificate_pem)
    (directory / "rules.toml").write_text(RULES)
    said: dict[str, dict] = {}
    async with vallum.Node() as node:
        async with node.sandbox(
            rules=directory / "rules.toml", upstream_ca=directory / "upstream.pem", mounts=[f"{SITE}:/opt/site:ro"]
        ) as sb:
            await sb.write_file("/tmp/Get.java", JAVA.encode())

            async def sh(name: str, line: str) -> None:
                done = await sb.exec(["sh", "-c", line], timeout_s=60)
                said[name] = {"code": done.exit_code, "out": (done.stdout + done.stderr).decode("utf-8", "replace")}

            for name, line in CLIENTS.items():
                await sh(name, line.format(host="read.test"))
            for name in ("curl", "wget", "openssl", "git", "urllib"):
                await sh(f"{name}-without-variables", NO_VARIABLES + CLIENTS[name].format(host="read.test"))
            await sh("refused", "curl -sSi -d x https://read.test/")
            for name in ("relay", "wrong", "expired", "expired-read", "self", "plain"):
                await sh(name, CLIENTS["curl"].format(host=f"{name}.test"))
            await sh("distrust", "curl -sS --cacert /tmp/Get.java --capath /nonexistent https://read.test/")
            await sh(
                "files",
                "ls -la /etc/vallum; grep -rl 'PRIVATE KEY' /etc/vallum /etc/ssl/certs; echo changed >> /etc/vallum/ca.pem",
            )
            await sh("environ", "env; cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' '\\n'")
            await sh("self-written", "curl -sS https://read.test/")
            await sh("memory", f"sleep 30 & python3 -c '{SEARCH_MEMORY}'")
            keys = find_keys()
            events = await node.events(run=sb.run, episode=sb.episode)
        async with node.sandbox(allow=["relay.test:443"]) as sb:
            done = await sb.exec(["sh", "-c", "ls /etc/vallum; env"])
            said["unequipped"] = {"code": done.exit_code, "out": (done.stdout + done.stderr).decode()}
    return {
        "said": said,
        "heard": {server.name: server.heard.decode("latin-1") for server in servers},
        "keys": keys,
        "flows": [event for event in events if event["kind"] == "net.flow"],
        "requests": [event for event in events if event["kind"] == "http.request"],
    }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(Path(sys.argv[1])))))
