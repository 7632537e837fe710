"""TLS ended at the gateway, and started by it: real handshakes over socket pairs and loopback."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable

import pytest

from vallum.core.errors import GatewayError
from vallum.gateway.kit import Authority
from vallum.gateway.stream import SocketStream
from vallum.gateway.tls import leaves, termination
from vallum.gateway.tls.leaves import MAX_LEAVES, Leaves, leaves_of
from vallum.gateway.tls.stream import TlsStream
from vallum.gateway.tls.termination import HandshakeError, terminate
from vallum.gateway.tls.upstream import Vetting, connect_tls
from vallum.node.authority import make_authority
from vallum.testing.certificates import PrivateAuthority

AUTHORITY = make_authority("r1")
PRIVATE = PrivateAuthority()


def trusting(pem: bytes = AUTHORITY.certificate_pem, alpn: tuple[str, ...] = ()) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=pem.decode())
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    if alpn:
        context.set_alpn_protocols(list(alpn))
    return context


def pair() -> tuple[socket.socket, socket.socket]:
    ours, theirs = socket.socketpair()
    for sock in (ours, theirs):
        sock.setblocking(False)
    return ours, theirs


async def meet(
    context: ssl.SSLContext, name: str | None = "a.example", judged: str = "a.example", below: type = SocketStream
) -> tuple[TlsStream | HandshakeError, TlsStream | OSError, Callable[[], None]]:
    """A guest's handshake and ours: what each of them got."""
    ours, theirs = pair()
    guest = TlsStream(below(theirs), context, server_name=name)
    if name is None:
        context.check_hostname = False
        guest = TlsStream(below(theirs), context, server_name="")
    results = await asyncio.gather(
        terminate(below(ours), AUTHORITY, server_name=judged), guest.shake_hands(), return_exceptions=True
    )

    def close() -> None:
        ours.close()
        theirs.close()

    gateway = results[0]
    assert isinstance(gateway, TlsStream | HandshakeError)
    if isinstance(results[1], OSError):
        return gateway, results[1], close
    assert results[1] is None, results[1]
    return gateway, guest, close


async def read(stream: TlsStream, size: int) -> bytes:
    got = bytearray()
    while len(got) < size:
        got += await stream.recv()
    return bytes(got)


class Dripping(SocketStream):
    """Gives and takes one byte at a time."""

    async def recv(self, limit: int = 1) -> bytes:
        return await super().recv(1)

    async def send(self, data: bytes) -> None:
        for at in range(len(data)):
            await super().send(data[at : at + 1])


@pytest.mark.parametrize(
    ("offered", "chosen"),
    [(("h2", "http/1.1"), "h2"), (("http/1.1",), "http/1.1"), ((), ""), (("acme-tls/1",), "")],
)
async def test_the_guest_verifies_us_as_the_granted_server(offered: tuple[str, ...], chosen: str) -> None:
    gateway, guest, close = await meet(trusting(alpn=offered))
    assert isinstance(gateway, TlsStream)
    assert isinstance(guest, TlsStream)
    assert (gateway.alpn, guest.alpn, gateway.version) == (chosen, chosen, "TLSv1.3")
    await guest.send(b"GET / HTTP/1.1\r\n\r\n")
    assert await gateway.recv() == b"GET / HTTP/1.1\r\n\r\n"
    await gateway.send(b"ok")
    await gateway.finish()
    assert (await guest.recv(), await guest.recv()) == (b"ok", b"")
    close()


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_handshake_and_data_in_pieces_of_one_byte(version: ssl.TLSVersion) -> None:
    context = trusting()
    context.maximum_version = version
    gateway, guest, close = await meet(context, below=Dripping)
    assert isinstance(gateway, TlsStream)
    assert isinstance(guest, TlsStream)
    sent = await asyncio.gather(guest.send(b"x" * 100), read(gateway, 100), gateway.send(b"y" * 100), read(guest, 100))
    assert (sent[1], sent[3]) == (b"x" * 100, b"y" * 100)
    close()


async def test_both_directions_at_once_are_whole() -> None:
    gateway, guest, close = await meet(trusting())
    assert isinstance(gateway, TlsStream)
    assert isinstance(guest, TlsStream)
    data = bytes(range(256)) * 8192

    _, _, one, other = await asyncio.gather(
        guest.send(data), gateway.send(data), read(guest, len(data)), read(gateway, len(data))
    )
    assert one == other == data
    close()


async def test_another_name_in_the_handshake_than_was_judged() -> None:
    gateway, guest, close = await meet(trusting(), name="b.example")
    assert isinstance(gateway, HandshakeError)
    assert gateway.decision.rule == "sni-mismatch"
    assert isinstance(guest, ssl.SSLError)
    close()


async def test_an_address_gets_a_certificate_for_the_address() -> None:
    context = trusting()
    gateway, guest, close = await meet(context, name="192.0.2.7", judged="192.0.2.7")
    assert isinstance(gateway, TlsStream)
    assert isinstance(guest, TlsStream)
    close()


async def test_a_guest_that_does_not_trust_us_is_told_what_to_do() -> None:
    gateway, _, close = await meet(trusting(PRIVATE.certificate_pem))
    assert isinstance(gateway, HandshakeError)
    assert gateway.decision.verdict == "deny"
    assert gateway.decision.rule == "tls-handshake"
    assert "/etc/vallum/ca-bundle.pem" in gateway.decision.reason
    close()


OLD_HELLO = bytes.fromhex(
    "160301002d0100002903010101010101010101010101010101010101010101010101010101010101010101000002002f0100"
)


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1")
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
async def test_old_versions_are_refused(version: ssl.TLSVersion) -> None:
    context = trusting()
    context.minimum_version = context.maximum_version = version
    context.set_ciphers("ALL:@SECLEVEL=0")
    gateway, guest, close = await meet(context)
    assert isinstance(gateway, HandshakeError)
    assert "protocol" in gateway.decision.reason
    assert isinstance(guest, OSError)
    close()


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\xff\xff" + b"x" * 100,
        b"\x16\x03\x01\x00\x04\x02\x00\x00\x00",
        b"\x80\x2e\x01\x00\x02" + b"\0" * 64,
        b"\0" * 70000,
        b"",
    ],
)
async def test_garbage_ends_the_handshake(said: bytes) -> None:
    ours, theirs = pair()
    with ours, theirs:
        serving = asyncio.create_task(terminate(SocketStream(ours), AUTHORITY, server_name="a.example"))
        with contextlib.suppress(BrokenPipeError, BlockingIOError):
            theirs.send(said)
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(HandshakeError) as refused:
            await serving
        assert refused.value.decision.rule == "tls-handshake"


async def test_garbage_after_the_handshake_is_never_data() -> None:
    ours, theirs = pair()
    with ours, theirs:
        guest = TlsStream(SocketStream(theirs), trusting(), server_name="a.example")
        gateway, _ = await asyncio.gather(
            terminate(SocketStream(ours), AUTHORITY, server_name="a.example"), guest.shake_hands()
        )
        theirs.send(b"POST / HTTP/1.1\r\n" * 10)
        with pytest.raises(ssl.SSLError):
            await gateway.recv()


async def test_a_record_that_was_changed_on_its_way_is_never_data() -> None:
    ours, middle = pair()
    with ours, middle:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        guest = trusting().wrap_bio(incoming, outgoing, server_hostname="a.example")
        serving = asyncio.create_task(terminate(SocketStream(ours), AUTHORITY, server_name="a.example"))
        loop = asyncio.get_running_loop()
        for _ in range(8):
            try:
                guest.do_handshake()
                break
            except ssl.SSLWantReadError:
                await loop.sock_sendall(middle, outgoing.read())
                incoming.write(await loop.sock_recv(middle, 65536))
        await loop.sock_sendall(middle, outgoing.read())
        gateway = await serving
        guest.write(b"secret")
        record = bytearray(outgoing.read())
        record[-1] ^= 1
        await loop.sock_sendall(middle, bytes(record))
        with pytest.raises(ssl.SSLError):
            await gateway.recv()


async def test_a_guest_that_is_silent_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(termination, "HANDSHAKE_TIMEOUT_S", 0.05)
    ours, theirs = pair()
    with ours, theirs:
        theirs.send(OLD_HELLO[:20])
        with pytest.raises(HandshakeError, match="took longer"):
            await terminate(SocketStream(ours), AUTHORITY, server_name="a.example")


async def test_no_tickets_are_given() -> None:
    gateway, guest, close = await meet(trusting())
    assert isinstance(gateway, TlsStream)
    assert isinstance(guest, TlsStream)
    await gateway.send(b"x")
    assert await guest.recv() == b"x"
    session = guest._tls.session
    assert session is None or not session.has_ticket
    close()


async def test_memory_is_flat_over_many_handshakes() -> None:
    async def shake(count: int, version: ssl.TLSVersion) -> None:
        for _ in range(count):
            context.maximum_version = version
            gateway, guest, close = await meet(context)
            assert isinstance(gateway, TlsStream), gateway.decision
            assert isinstance(guest, TlsStream)
            close()

    context = trusting()
    await shake(150, ssl.TLSVersion.TLSv1_2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    await shake(300, ssl.TLSVersion.TLSv1_2)
    await shake(100, ssl.TLSVersion.TLSv1_3)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8 * 1024


def test_leaves_are_kept_and_bounded() -> None:
    own = Leaves(AUTHORITY)
    first = own.context("a.example", ("h2",))
    assert own.context("a.example", ("h2",)) is first
    assert own.context("a.example", ()) is not first
    for number in range(MAX_LEAVES):
        own._contexts[f"{number}.example", ()] = (first, 0)
    own.context("b.example", ())
    assert len(own._contexts) == MAX_LEAVES
    assert own.context("a.example", ("h2",)) is not first


def test_a_context_is_made_anew_before_it_holds_many_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaves, "MAX_USES", 3)
    own = Leaves(AUTHORITY)
    assert len({id(own.context("a.example", ())) for _ in range(3)}) == 1
    kept = own.context("a.example", ())
    assert len({id(kept), *(id(own.context("a.example", ())) for _ in range(3))}) == 2


def test_an_authority_that_is_none() -> None:
    other = make_authority("r2")
    for broken in (
        Authority(certificate_pem=b"no", key_pem=other.key_pem),
        Authority(certificate_pem=other.certificate_pem, key_pem=b"no"),
    ):
        with pytest.raises(GatewayError):
            leaves_of(broken)


# -- outwards ------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def server(context: ssl.SSLContext | None, say: bytes = b"") -> AsyncIterator[tuple[int, list[bytes]]]:
    """A server on loopback: its port, and what was said to it inside TLS, one item a connection."""
    heard: list[bytes] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            if say:
                writer.write(say)
                await writer.drain()
            heard.append(await reader.read())
        writer.close()

    running = await asyncio.start_server(handle, "127.0.0.1", 0, ssl=context)
    async with running:
        yield running.sockets[0].getsockname()[1], heard


async def dial(port: int) -> socket.socket:
    sock = socket.socket()
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
    return sock


async def test_a_server_with_the_right_certificate() -> None:
    async with server(PRIVATE.serve("a.example", alpn=["http/1.1"])) as (port, heard):
        with await dial(port) as sock:
            stream = await connect_tls(sock, server_name="a.example", roots_pem=PRIVATE.certificate_pem)
            assert stream.alpn == "http/1.1"
            await stream.send(b"hello")
            await stream.finish()
            assert await stream.recv() == b""
        assert heard == [b"hello"]


REFUSED = {
    "another-name": (lambda: PRIVATE.serve("b.example"), "certificate-mismatch", "mismatch"),
    "wildcard-of-another": (lambda: PRIVATE.serve("*.b.example"), "certificate-mismatch", "mismatch"),
    "wildcard-too-deep": (lambda: PRIVATE.serve("*.example.x"), "certificate-mismatch", "mismatch"),
    "expired": (lambda: PRIVATE.serve("a.example", valid_days=(-9, -8)), "upstream-certificate", "expired"),
    "not-yet": (lambda: PRIVATE.serve("a.example", valid_days=(8, 9)), "upstream-certificate", "not yet valid"),
    "self-signed": (lambda: PRIVATE.serve("a.example", is_self_signed=True), "upstream-certificate", "self-signed"),
    "of-another-authority": (lambda: PrivateAuthority().serve("a.example"), "upstream-certificate", "issuer"),
    "no-tls": (lambda: None, "upstream-certificate", "a.example showed no certificate"),
}


@pytest.mark.parametrize(("make", "rule", "said"), REFUSED.values(), ids=REFUSED)
async def test_a_server_with_a_wrong_certificate_hears_nothing(make: Callable, rule: str, said: str) -> None:
    context = make()
    async with server(context, say=b"" if context else b"HTTP/1.1 400 Bad\r\n\r\n") as (port, heard):
        with await dial(port) as sock, pytest.raises(HandshakeError) as refused:
            await connect_tls(sock, server_name="a.example", roots_pem=PRIVATE.certificate_pem)
        assert refused.value.decision.rule == rule
        assert said in refused.value.decision.reason
        await asyncio.sleep(0.01)
        if context is not None:
            assert not any(heard)


async def test_a_truncated_answer_is_an_error_outwards() -> None:
    ours, theirs = pair()
    with ours:
        answering = TlsStream(SocketStream(theirs), PRIVATE.serve("a.example"))
        stream, _ = await asyncio.gather(
            connect_tls(ours, server_name="a.example", roots_pem=PRIVATE.certificate_pem), answering.shake_hands()
        )
        await answering.send(b"half of it")
        theirs.close()  # no close_notify
        assert await stream.recv() == b"half of it"
        with pytest.raises(ssl.SSLError):
            await stream.recv()


async def test_vetting_asks_once_and_remembers() -> None:
    async with server(PRIVATE.serve("a.example")) as (port, heard):
        vetting = Vetting()
        roots = PRIVATE.certificate_pem
        assert not vetting.knows("a.example", "127.0.0.1", port, roots)
        await asyncio.gather(*(vetting.vet("a.example", "127.0.0.1", port, roots_pem=roots) for _ in range(20)))
        assert vetting.knows("a.example", "127.0.0.1", port, roots)
        with pytest.raises(HandshakeError) as refused:
            await vetting.vet("b.example", "127.0.0.1", port, roots_pem=roots)
        assert refused.value.decision.rule == "certificate-mismatch"
        assert not vetting.knows("b.example", "127.0.0.1", port, roots)
        with pytest.raises(HandshakeError):
            await vetting.vet("a.example", "127.0.0.1", port)  # the system does not trust it
        await asyncio.sleep(0.01)
        assert len(heard) <= 3
        assert not any(heard)


async def test_vetting_a_server_that_is_not_there() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(ConnectionRefusedError):
            await Vetting().vet("a.example", "127.0.0.1", closed.getsockname()[1])


# -- the authority ---------------------------------------------------------------------------------------------


def test_openssl_accepts_the_authority_as_one_of_servers_only(tmp_path) -> None:
    (tmp_path / "ca.pem").write_bytes(AUTHORITY.certificate_pem)
    said = subprocess.run(
        ["openssl", "x509", "-in", tmp_path / "ca.pem", "-noout", "-text"], capture_output=True, text=True, check=True
    ).stdout
    for words in ("CA:TRUE, pathlen:0", "Certificate Sign, CRL Sign", "TLS Web Server Authentication", "prime256v1"):
        assert words in said
    verified = subprocess.run(
        ["openssl", "verify", "-x509_strict", "-CAfile", tmp_path / "ca.pem", tmp_path / "ca.pem"], capture_output=True
    )
    assert verified.returncode == 0, verified.stderr
