"""The gateway process between a real cell network and fakes that count. Every denial has an allowed twin."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
import ssl
import sys
from pathlib import Path

import dns.rcode
import pytest

from vallum.rules.files import parse_ruleset
from vallum.rules.grants import Ruleset, parse_grant

pytestmark = pytest.mark.root
if os.geteuid() != 0:
    pytest.skip("needs root: network namespaces", allow_module_level=True)

_spec = importlib.util.spec_from_file_location("gateway_world_priv", Path(__file__).with_name("gateway_world_priv.py"))
assert _spec is not None and _spec.loader is not None
world_module = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = world_module
_spec.loader.exec_module(world_module)
run_in_world, World = world_module.run_in_world, world_module.World

HTTP_OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
SUBSCRIBE = b'{"id": 1, "method": "mining.subscribe", "params": ["cpuminer/2.5"]}\n'


def grants(*texts: str) -> Ruleset:
    return Ruleset(allow=tuple(parse_grant(text) for text in texts))


def get(host: str, path: str = "/") -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()


def client_hello(name: str | None) -> bytes:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    outgoing = ssl.MemoryBIO()
    tls = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


def shortened(hello: bytes) -> bytes:
    """With a handshake length of one byte less, so that a byte follows the message in its record."""
    length = int.from_bytes(hello[6:9], "big") - 1
    return hello[:6] + length.to_bytes(3, "big") + hello[9:]


async def address(world: World, name: str) -> str:
    answer = (await world.ask(name)).answer
    return answer[0][0].address


def test_denied_http_gets_a_readable_403_and_nothing_leaves(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        async with world.tap("203.0.113.10", 80, HTTP_OK) as tap:
            reply = await world.say("203.0.113.10", 80, get("203.0.113.10"))
            assert reply.startswith(b"HTTP/1.1 403 Forbidden\r\n")
            assert b"vallum: blocked by rule default-deny: no rule grants 203.0.113.10:80" in reply
            (event,) = await world.settled(1)
            assert (event.state, event.verdict, event.rule, event.bytes_out) == ("denied", "deny", "default-deny", 0)
            assert (event.dst_ip, event.dst_port, event.protocol, event.scope.step) == ("203.0.113.10", 80, "http", 3)
            assert event.first_bytes.startswith("GET / HTTP/1.1")
            assert (tap.connections, tap.received) == (0, b"")

    run_in_world(tmp_path, Ruleset(), scenario)


def test_allowed_http_by_name_passes_and_is_counted(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        async with world.tap("192.0.2.20", 80, HTTP_OK) as tap:
            ip = await address(world, "mirror.test")
            reader, writer = await world.connect(ip, 80)
            writer.write(get("mirror.test"))
            assert await asyncio.wait_for(reader.readexactly(len(HTTP_OK)), 3) == HTTP_OK
            writer.close()
            opened, closed = await world.settled(2)
            assert (opened.state, opened.verdict, opened.rule, opened.dst_host) == (
                *("opened", "allow", "allow:mirror.test", "mirror.test"),
            )
            assert (closed.state, closed.flow) == ("closed", opened.flow)
            assert (closed.bytes_out, closed.bytes_in) == (len(get("mirror.test")), len(HTTP_OK))
            assert bytes(tap.received) == get("mirror.test")
            # The name is granted, the address is not: dialled by who never asked for the name, it stays closed.
            assert (await world.ask("other.test")).rcode() == dns.rcode.NXDOMAIN

    run_in_world(tmp_path, grants("mirror.test"), scenario)


def test_fronting_on_a_kept_alive_connection_is_not_delivered(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        async with world.tap("192.0.2.20", 80, HTTP_OK) as tap:
            ip = await address(world, "mirror.test")
            reader, writer = await world.connect(ip, 80)
            writer.write(get("mirror.test"))
            assert await asyncio.wait_for(reader.readexactly(len(HTTP_OK)), 3) == HTTP_OK
            writer.write(get("other.test", "/secret"))
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await asyncio.wait_for(reader.readexactly(1), 3)
            writer.close()
            events = await world.settled(3)
            assert [e.state for e in events] == ["opened", "denied", "closed"]
            assert events[1].rule == "host-mismatch"
            assert "/secret" in events[1].first_bytes
            assert bytes(tap.received) == get("mirror.test")

    run_in_world(tmp_path, grants("mirror.test"), scenario)


@pytest.mark.parametrize(
    ("first", "rule"),
    [
        (b"SSH-2.0-OpenSSH_9.2p1\r\n", "protocol-mismatch"),
        (SUBSCRIBE, "protocol-mismatch"),
        (b"\x05\x01\x00", "protocol-mismatch"),
        (client_hello("other.test"), "sni-mismatch"),
        (client_hello(None), "sni-mismatch"),
        (shortened(client_hello("mirror.test")), "malformed"),
        (get("mirror.test"), "protocol-mismatch"),
    ],
    ids=["ssh", "stratum", "socks", "other-sni", "no-sni", "malformed", "http"],
)
def test_on_a_granted_https_port_only_that_name_passes(tmp_path: Path, first: bytes, rule: str) -> None:
    async def scenario(world: World) -> None:
        async with world.tap("192.0.2.20", 443) as tap:
            ip = await address(world, "mirror.test")
            reply = await world.say(ip, 443, first)
            assert reply == b"RST" or reply.startswith(b"HTTP/1.1 403")
            (event,) = await world.settled(1)
            assert (event.state, event.rule, event.bytes_out) == ("denied", rule, 0)
            assert (tap.connections, tap.received) == (0, b"")
            # The twin.
            hello = client_hello("mirror.test")
            await world.say(ip, 443, hello, wait_s=0.3)
            assert bytes(tap.received) == hello

    run_in_world(tmp_path, grants("mirror.test"), scenario)


def test_stratum_dripped_byte_by_byte_on_an_unknown_port(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        async with world.tap("203.0.113.10", 3333) as tap:
            ip = await address(world, "pool.test")
            reader, writer = await world.connect(ip, 3333)
            try:
                for byte in b"\n " + SUBSCRIBE:
                    writer.write(bytes([byte]))
                    await writer.drain()
                    await asyncio.sleep(0.004)
                assert await asyncio.wait_for(reader.read(1), 3) == b""
            except ConnectionError:
                pass
            writer.close()
            (event,) = await world.settled(1)
            assert (event.protocol, event.rule, event.bytes_out) == ("stratum", "protocol-mismatch", 0)
            assert (tap.connections, tap.received) == (0, b"")
            # After something harmless it is cut as well.
            reply = await world.say(ip, 3333, b"HELLO\n" + b" " * 100 + SUBSCRIBE)
            assert reply == b"RST"
            assert bytes(tap.received) == b""
            # The twin: an unknown protocol on that port is granted.
            await world.say(ip, 3333, b"\x00\x01binary", wait_s=0.3)
            assert bytes(tap.received) == b"\x00\x01binary"

    run_in_world(tmp_path, grants("pool.test:3333"), scenario)


def test_a_server_that_speaks_first_is_heard_but_the_guest_is_held_back(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        async with world.tap("203.0.113.10", 2525, banner=b"220 ready\r\n") as tap:
            ip = await address(world, "pool.test")
            reader, writer = await world.connect(ip, 2525)
            assert await asyncio.wait_for(reader.readline(), 3) == b"220 ready\r\n"
            writer.write(SUBSCRIBE)
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await asyncio.wait_for(reader.readexactly(1), 3)
            events = await world.settled(3)
            assert [e.state for e in events] == ["opened", "denied", "closed"]
            assert bytes(tap.received) == b""
            reader, writer = await world.connect(ip, 2525)
            await asyncio.wait_for(reader.readline(), 3)
            writer.write(b"EHLO me\r\n")
            await asyncio.sleep(0.3)
            assert bytes(tap.received) == b"EHLO me\r\n"
            writer.close()

    run_in_world(tmp_path, grants("pool.test:2525"), scenario)


def test_metadata_private_and_own_addresses_need_to_be_named(tmp_path: Path) -> None:
    wide = """
    [[allow]]
    cidr = "0.0.0.0/0"
    ports = [80]
    [[allow]]
    cidr = "::/0"
    ports = [80]
    [[allow]]
    host = "*"
    """

    async def scenario(world: World) -> None:
        targets = {
            "169.254.169.254": "metadata",
            "fd00:ec2::254": "metadata",
            "::ffff:169.254.169.254": "metadata",
            "10.77.0.5": "private-range",
            "100.127.0.1": "own-address",
            "2001:db8:ffff::1": "own-address",
            "64:ff9b::a4d:5": "private-range",
        }
        for count, (ip, rule) in enumerate(targets.items(), 1):
            async with world.tap("169.254.169.254", 80, HTTP_OK) as meta, world.tap("10.77.0.5", 80, HTTP_OK) as inside:
                reply = await world.say(ip, 80, get("x.test"))
                assert f"blocked by rule {rule}:".encode() in reply, ip
                event = (await world.settled(count))[-1]
                assert (event.state, event.rule) == ("denied", rule)
                assert not meta.connections and not inside.connections
        for name in ("inside.test", "meta.test", "rebind.wild.test", "metadata.google.internal"):
            assert (await world.ask(name)).rcode() == dns.rcode.NXDOMAIN, name
        # Twins: public addresses of both families under the same rules.
        async with world.tap("203.0.113.10", 80, HTTP_OK) as four, world.tap("2001:db8::20", 80, HTTP_OK) as six:
            await world.say("203.0.113.10", 80, get("203.0.113.10"), wait_s=0.3)
            await world.say("2001:db8::20", 80, get("[2001:db8::20]"), wait_s=0.3)
            assert four.received and six.received

    run_in_world(tmp_path, parse_ruleset(wide, "wide"), scenario)


def test_exactly_named_private_and_metadata_addresses_pass(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        async with world.tap("169.254.169.254", 80, HTTP_OK) as meta, world.tap("10.77.0.5", 80, HTTP_OK) as inside:
            await world.say("169.254.169.254", 80, get("169.254.169.254"), wait_s=0.3)
            await world.say(await address(world, "inside.test"), 80, get("inside.test"), wait_s=0.3)
            assert meta.received and inside.received

    run_in_world(tmp_path, grants("169.254.169.254:80", "inside.test:80"), scenario)


def test_v6_by_name(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        async with world.tap("2001:db8::20", 443) as tap:
            answer = await world.ask("six.test", "AAAA", server="2620:fe::fe")
            assert answer.answer[0][0].address == "2001:db8::20"
            assert await world.say("2001:db8::20", 443, b"SSH-2.0-x\r\n") == b"RST"
            assert not tap.connections
            hello = client_hello("six.test")
            await world.say("2001:db8::20", 443, hello, wait_s=0.3)
            assert bytes(tap.received) == hello

    run_in_world(tmp_path, grants("six.test"), scenario)


def test_a_name_not_granted_is_never_asked_outside(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        for tcp in (False, True):
            for name in ("c2VjcmV0.exfil.example", "up.test.evil.example", "xup.test", "2130706433"):
                answer = await world.ask(name, tcp=tcp)
                assert answer.rcode() == dns.rcode.NXDOMAIN
        txt = await world.ask("up.test", "TXT")
        assert (txt.rcode(), txt.answer, world.queries) == (dns.rcode.NOERROR, [], [])
        # The twin is asked, over both transports.
        assert await address(world, "up.test") == "192.0.2.20"
        assert (await world.ask("UP.test", tcp=True)).answer
        assert set(world.queries) == {"up.test"}
        assert (await world.ask("loop.test")).rcode() == dns.rcode.NXDOMAIN
        events = await world.settled(12, "dns.query")
        denied = [e for e in events if e.verdict == "deny"]
        assert {e.rule for e in denied} == {"default-deny", "bad-name", "loopback"}
        assert {e.transport for e in denied} == {"udp", "tcp"}
        assert await world.say("8.8.8.8", 53, b"SSH-2.0-tunnel\r\n") == b"RST"

    run_in_world(tmp_path, grants("up.test", "loop.test"), scenario)


def test_a_name_of_the_hosts_loopback_gets_a_stand_in(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        got = bytearray()

        async def handle(reader, writer) -> None:
            got.extend(await reader.readuntil(b"\r\n\r\n"))
            writer.write(HTTP_OK)
            writer.close()

        server = await asyncio.start_server(handle, "127.0.0.1", 8080)
        ip = await address(world, "local.test")
        assert ip.startswith("198.18.")
        assert (await world.say(ip, 8080, get("local.test"))).endswith(b"hello")
        assert await world.say(ip, 8081, b"x") == b"RST"
        server.close()

    run_in_world(tmp_path, grants("local.test:8080"), scenario)


def test_the_gateways_own_door_is_no_way_out(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        assert await world.say("127.0.0.1", world_module.PORT, b"x") == b"RST"
        (event,) = await world.settled(1)
        assert event.rule == "gateway-door"

    run_in_world(tmp_path, grants("127.0.0.1", "0.0.0.0/0"), scenario)


@pytest.mark.parametrize("failing", ["records_fail", "attribution_fails"])
def test_a_flow_that_cannot_be_recorded_or_attributed_is_denied(tmp_path: Path, failing: str) -> None:
    async def scenario(world: World) -> None:
        async with world.tap("192.0.2.20", 80, HTTP_OK) as tap:
            ip = await address(world, "mirror.test")
            setattr(world, failing, True)
            assert await world.say(ip, 80, get("mirror.test")) == b"RST"
            assert (tap.connections, tap.received) == (0, b"")
            assert (await world.ask("mirror.test")).rcode() == dns.rcode.SERVFAIL
            setattr(world, failing, False)
            await world.say(ip, 80, get("mirror.test"), wait_s=0.3)
            assert tap.received

    run_in_world(tmp_path, grants("mirror.test"), scenario)


def test_new_rules_cut_open_flows(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        async with world.tap("192.0.2.20", 80, HTTP_OK):
            ip = await address(world, "mirror.test")
            reader, writer = await world.connect(ip, 80)
            writer.write(get("mirror.test"))
            await asyncio.wait_for(reader.readexactly(len(HTTP_OK)), 3)
            await world.link.update_rules("c1", Ruleset())
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await asyncio.wait_for(reader.readexactly(1), 3)
            writer.close()
            events = await world.settled(3)
            assert [(e.state, e.verdict) for e in events][1:] == [("denied", "deny"), ("closed", "deny")]
            assert b"403" in await world.say(ip, 80, get("mirror.test"))

    run_in_world(tmp_path, grants("mirror.test"), scenario)


def test_removing_a_cell_closes_its_doors_and_records_its_flows(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        async with world.tap("192.0.2.20", 80, HTTP_OK):
            ip = await address(world, "mirror.test")
            reader, writer = await world.connect(ip, 80)
            writer.write(get("mirror.test"))
            await asyncio.wait_for(reader.readexactly(len(HTTP_OK)), 3)
            await world.link.remove_cell("c1")
            assert [e.state for e in await world.settled(2)] == ["opened", "closed"]
            with pytest.raises(ConnectionRefusedError):
                await world.connect("203.0.113.10", 80)
            writer.close()
            await world.link.ping()

    run_in_world(tmp_path, grants("mirror.test"), scenario)


def test_an_attempt_that_was_not_judged_yet_is_recorded_when_the_cell_closes(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        async with world.tap("192.0.2.20", 443) as tap:
            ip = await address(world, "mirror.test")
            _, writer = await world.connect(ip, 443)
            writer.write(client_hello("mirror.test")[:50])
            await asyncio.sleep(0.1)
            await world.link.remove_cell("c1")
            (event,) = await world.settled(1)
            assert (event.state, event.rule, event.bytes_out) == ("denied", "cell-closed", 0)
            assert not tap.connections
            writer.close()

    run_in_world(tmp_path, grants("mirror.test"), scenario)


def test_when_the_gateway_is_killed_the_guest_is_refused(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        async with world.tap("192.0.2.20", 80, HTTP_OK):
            ip = await address(world, "mirror.test")
            reader, writer = await world.connect(ip, 80)
            writer.write(get("mirror.test"))
            await asyncio.wait_for(reader.readexactly(len(HTTP_OK)), 3)
            os.kill(world.link.pid, signal.SIGKILL)
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await asyncio.wait_for(reader.readexactly(1), 3)
            writer.close()
            await asyncio.sleep(0.1)
            with pytest.raises(ConnectionRefusedError):
                await world.connect(ip, 80)
            assert len(world.deaths) == 1

    run_in_world(tmp_path, grants("mirror.test"), scenario)


def test_the_process_has_no_privilege(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        status = Path(f"/proc/{world.link.pid}/status").read_text()
        fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        assert fields["Uid"].split() == ["65534"] * 4
        assert fields["Gid"].split() == ["65534"] * 4
        assert fields["Groups"].strip() == ""
        assert {fields[f"Cap{kind}"] for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}
        assert fields["NoNewPrivs"] == "1"

    run_in_world(tmp_path, Ruleset(), scenario)


def test_a_flood_of_connections_is_bounded_and_each_is_recorded(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        async def one(number: int) -> bytes:
            return await world.say("203.0.113.10", 1000 + number, b"x", wait_s=20)

        replies = await asyncio.gather(*(one(number) for number in range(300)))
        assert set(replies) == {b"RST"}
        assert len(await world.settled(300)) == 300

    run_in_world(tmp_path, Ruleset(), scenario)
