"""The gateway's HTTP servers over a socket pair, with a desk that keeps what it was given."""

from __future__ import annotations

import asyncio
import socket
import tracemalloc

import h2.config
import h2.connection
import h2.events
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vallum.gateway.http.exchange import GuestGoneError, MalformedFlowError
from vallum.gateway.http.head import Place
from vallum.gateway.http.server1 import Server1
from vallum.gateway.http.server2 import Server2
from vallum.gateway.stream import SocketStream

CLEAR = Place(scheme="http", port=80)


class Desk:
    """Answers every exchange with 200 and what it was given; keeps the same."""

    def __init__(self, reply: bytes = b"", *, wait: asyncio.Event | None = None, reads: bool = True) -> None:
        self.seen: list[tuple[str, str, str, bytes]] = []
        self.turned_away: list[str] = []
        self.broken = 0
        self.at_once = 0
        self.most = 0
        self._reply = reply
        self._wait = wait
        self._reads = reads

    async def answer(self, exchange) -> None:
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        try:
            body = await exchange.read_body(1 << 20) if self._reads else b""
            self.seen.append((exchange.head.method, exchange.head.host, exchange.head.target, body))
            if self._wait is not None:
                await self._wait.wait()
            reply = self._reply or body or b"ok"
            await exchange.start(200, ((b"content-type", b"text/plain"),), length=len(reply))
            await exchange.send(reply)
            await exchange.end()
        except GuestGoneError:
            self.broken += 1
            await exchange.abort("gone")
        finally:
            self.at_once -= 1

    async def turn_away(self, decision) -> None:
        self.turned_away.append(decision.rule)


def make_ends() -> tuple[socket.socket, socket.socket]:
    ends = socket.socketpair()
    for end in ends:
        end.setblocking(False)
    return ends


async def talk(data: bytes, desk: Desk, *, step: int = 0) -> bytes:
    """Send ``data`` to a server (in pieces of ``step``), end, and return all that it says."""
    guest, ours = make_ends()
    server = asyncio.create_task(Server1(SocketStream(ours), None, CLEAR, desk).serve())
    loop = asyncio.get_running_loop()
    said = b""

    async def listen() -> None:
        nonlocal said
        while piece := await loop.sock_recv(guest, 65536):
            said += piece

    listener = asyncio.create_task(listen())
    try:
        for at in range(0, len(data), step or len(data) or 1):
            await loop.sock_sendall(guest, data[at : at + (step or len(data))])
            if step:
                await asyncio.sleep(0)
        guest.shutdown(socket.SHUT_WR)
        await asyncio.wait_for(server, 10)
        ours.close()
        await asyncio.wait_for(listener, 5)
    except OSError:
        listener.cancel()
    finally:
        server.cancel()
        guest.close()
        ours.close()
    return said


HOST = b"Host: a.test\r\n"
GET = b"GET / HTTP/1.1\r\n" + HOST + b"\r\n"
SMUGGLED = b"GET /smuggled HTTP/1.1\r\n" + HOST + b"\r\n"
REFUSED = {
    "length and chunked": b"POST / HTTP/1.1\r\n"
    + HOST
    + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked and length": b"POST / HTTP/1.1\r\n"
    + HOST
    + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n",
    "two lengths": b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 0\r\nContent-Length: 4\r\n\r\n",
    "the same length twice": b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 4\r\nContent-Length: 4\r\n\r\nabcd",
    "a list of lengths": b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 4, 4\r\n\r\nabcd",
    "a signed length": b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: +4\r\n\r\nabcd",
    "a hexadecimal length": b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 0x4\r\n\r\nabcd",
    "chunked in HTTP/1.0": b"POST / HTTP/1.0\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "another coding": b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "chunked twice": b"POST / HTTP/1.1\r\n"
    + HOST
    + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: x\r\n\r\n0\r\n\r\n",
    "a padded coding": b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    "a blank before the colon": b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    "a folded header": b"GET / HTTP/1.1\r\n" + HOST + b"X: a\r\n b\r\n\r\n",
    "a folded coding": b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n",
    "bare LF": b"GET / HTTP/1.1\nHost: a.test\n\n",
    "bare LF in a head": b"GET / HTTP/1.1\r\n" + HOST + b"X: a\nY: b\r\n\r\n",
    "bare CR in a head": b"GET / HTTP/1.1\r\n" + HOST + b"X: a\rY: b\r\n\r\n",
    "NUL": b"GET / HTTP/1.1\r\n" + HOST + b"X: a\0b\r\n\r\n",
    "two hosts": b"GET / HTTP/1.1\r\n" + HOST + b"Host: b.test\r\n\r\n",
    "no host": b"GET / HTTP/1.1\r\n\r\n",
    "host with a path": b"GET / HTTP/1.1\r\nHost: a.test/x\r\n\r\n",
    "host with a user": b"GET / HTTP/1.1\r\nHost: x@a.test\r\n\r\n",
    "another host in the target": b"GET http://b.test/ HTTP/1.1\r\n" + HOST + b"\r\n",
    "another port in Host": b"GET / HTTP/1.1\r\nHost: a.test:8080\r\n\r\n",
    "another scheme": b"GET https://a.test/ HTTP/1.1\r\n" + HOST + b"\r\n",
    "CONNECT": b"CONNECT a.test:443 HTTP/1.1\r\n" + HOST + b"\r\n",
    "a fragment": b"GET /a#b HTTP/1.1\r\n" + HOST + b"\r\n",
    "a target without a slash": b"GET a HTTP/1.1\r\n" + HOST + b"\r\n",
    "a tab in the request line": b"GET\t/ HTTP/1.1\r\n" + HOST + b"\r\n",
    "a small method": b"get / HTTP/1.1\r\n" + HOST + b"\r\n",
    "HTTP/2.0 in words": b"GET / HTTP/2.0\r\n" + HOST + b"\r\n",
    "HTTP/0.9": b"GET /\r\n\r\n",
    "too many headers": b"GET / HTTP/1.1\r\n" + HOST + b"a: b\r\n" * 300 + b"\r\n",
    "a head without end": b"GET / HTTP/1.1\r\n" + HOST + b"X: " + b"a" * 70_000,
}


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("name", REFUSED)
async def test_what_can_be_read_in_two_ways_is_refused_and_nothing_after_it_is_read(name: str, step: int) -> None:
    if step and len(REFUSED[name]) > 10_000:
        step = 1000
    desk = Desk()
    said = await talk(REFUSED[name] + SMUGGLED, desk, step=step)
    assert desk.seen == []
    assert len(desk.turned_away) == 1
    assert said[:12] in {b"HTTP/1.1 400", b"HTTP/1.1 421"}
    assert b"vallum: blocked by rule" in said


BODIES = {
    "a chunk size that is none": b"g\r\nabc\r\n0\r\n\r\n",
    "a signed chunk size": b"+3\r\nabc\r\n0\r\n\r\n",
    "a chunk size in 0x": b"0x3\r\nabc\r\n0\r\n\r\n",
    "a chunk size without end": b"f" * 30 + b"\r\n",
    "a chunk longer than said": b"3\r\nabcd\r\n0\r\n\r\n",
    "a chunk line that ends in LF": b"3\nabc\n0\n\n",
}


@pytest.mark.parametrize("name", BODIES)
async def test_a_malformed_chunk_ends_the_connection(name: str) -> None:
    desk = Desk()
    head = b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n"
    await talk(head + BODIES[name] + SMUGGLED, desk)
    assert (desk.seen, desk.broken) == ([], 1)


@pytest.mark.parametrize("step", [0, 1, 7])
async def test_what_can_be_read_in_one_way_is_read(step: int) -> None:
    desk = Desk()
    data = (
        GET
        + b"\r\nGET http://A.test:80/x?y HTTP/1.1\r\n"
        + HOST
        + b"\r\nPOST /in HTTP/1.1\r\n"
        + HOST
        + b"Transfer-Encoding: chunked\r\n\r\n3;x=y\r\nabc\r\n1\r\nd\r\n0\r\nTrailer: t\r\n\r\n"
        + b"POST /len HTTP/1.1\r\n"
        + HOST
        + b"Content-Length: 3\r\n\r\nabcOPTIONS * HTTP/1.1\r\n"
        + HOST
        + b"\r\n"
    )
    said = await talk(data, desk, step=step)
    assert desk.seen == [
        ("GET", "a.test", "/", b""),
        ("GET", "a.test", "/x?y", b""),
        ("POST", "a.test", "/in", b"abcd"),
        ("POST", "a.test", "/len", b"abc"),
        ("OPTIONS", "a.test", "*", b""),
    ]
    assert said.count(b"HTTP/1.1 200") == 5


async def test_headers_of_the_connection_do_not_go_on() -> None:
    kept = []

    class Keeping(Desk):
        async def answer(self, exchange) -> None:
            kept.extend(exchange.head.headers)
            await super().answer(exchange)

    head = (
        b"GET / HTTP/1.1\r\n"
        + HOST
        + b"Connection: X-Secret, Upgrade\r\nX-Secret: 1\r\nUpgrade: h2c\r\nHTTP2-Settings: AA\r\n"
        b"TE: trailers\r\nProxy-Authorization: x\r\nKeep-Alive: 5\r\nAccept: text/plain\r\n\r\n"
    )
    await talk(head, Keeping())
    assert kept == [(b"accept", b"text/plain")]


async def test_expect_is_answered_when_the_body_is_asked_for() -> None:
    head = b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 3\r\nExpect: 100-continue\r\n\r\nabc"
    said = await talk(head, Desk())
    assert said.startswith(b"HTTP/1.1 100 \r\n\r\nHTTP/1.1 200")
    refusing = Desk(reads=False)
    said = await talk(head, refusing)
    assert b"HTTP/1.1 100" not in said and b"connection: close" in said.lower()


@given(st.binary(max_size=400), st.integers(0, 40), st.integers(1, 9))
@example(b"\r\n\r\n", 0, 1)
@settings(max_examples=150, deadline=None)
def test_whatever_comes_the_server_only_reads_requests_or_ends(noise: bytes, at: int, step: int) -> None:
    async def scenario() -> None:
        desk = Desk()
        data = bytearray(b"POST /in HTTP/1.1\r\n" + HOST + b"Content-Length: 3\r\n\r\nabc" + GET)
        data[at:at] = noise
        said = await talk(bytes(data), desk, step=step * 10)
        assert said.count(b"HTTP/1.1 200") + said.count(b"HTTP/1.1 4") <= len(desk.seen) + len(desk.turned_away)
        for method, host, target, _ in desk.seen:
            assert method.isupper() and host and (target.startswith("/") or target == "*")

    asyncio.run(scenario())


# -- HTTP/2 ----------------------------------------------------------------------------------------------


class Guest2:
    """An HTTP/2 client that can misbehave."""

    def __init__(self, desk: Desk) -> None:
        self.sock, self._ours = make_ends()
        self.conn = h2.connection.H2Connection(
            h2.config.H2Configuration(validate_outbound_headers=False, normalize_outbound_headers=False)
        )
        self.server = asyncio.create_task(Server2(SocketStream(self._ours), None, CLEAR, desk).serve())
        self.conn.initiate_connection()

    async def send(self, raw: bytes = b"") -> None:
        await asyncio.get_running_loop().sock_sendall(self.sock, self.conn.data_to_send() + raw)

    async def receive(self) -> list[h2.events.Event]:
        data = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(self.sock, 1 << 20), 5)
        return self.conn.receive_data(data) if data else []

    def ask(self, *extra: tuple[str, str], method: str = "GET", path: str = "/", end: bool = True) -> int:
        stream = self.conn.get_next_available_stream_id()
        fields = [(":method", method), (":scheme", "http"), (":authority", "a.test"), (":path", path), *extra]
        self.conn.send_headers(stream, fields, end_stream=end)
        return stream

    async def ended(self) -> BaseException | None:
        """How the server ended."""
        done, _ = await asyncio.wait({self.server}, timeout=10)
        assert done, "the server goes on"
        return self.server.exception()

    async def close(self) -> None:
        self.server.cancel()
        await asyncio.wait({self.server})
        self.sock.close()
        self._ours.close()


async def test_streams_are_answered_at_once() -> None:
    wait = asyncio.Event()
    desk = Desk(wait=wait)
    guest = Guest2(desk)
    streams = [guest.ask(path=f"/{n}") for n in range(100)]
    await guest.send()
    while desk.most < 100:
        await guest.receive() if desk.most == 0 else await asyncio.sleep(0.01)
    wait.set()
    ended = set()
    while len(ended) < 100:
        for event in await guest.receive():
            if isinstance(event, h2.events.StreamEnded):
                ended.add(event.stream_id)
        await guest.send()
    assert ended == set(streams)
    await guest.close()


async def test_a_hundred_streams_of_megabytes_stay_flat_in_memory() -> None:
    desk = Desk(reply=b"x" * 1_000_000)
    guest = Guest2(desk)
    tracemalloc.start()
    try:
        for n in range(100):
            guest.ask(path=f"/{n}")
        await guest.send()
        for _ in range(20):
            await guest.receive()  # read, but never make room: the connection's window is 64 KiB
            await asyncio.sleep(0.01)
            if desk.most == 100:
                break
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20_000_000, f"{peak} bytes for 100 MB of answers that nobody reads"
    await guest.close()


REFUSED2 = {
    "small method": [(":method", "get")],
    "another host": [("host", "b.test")],
    "no authority": [(":authority", None)],
    "another scheme": [(":scheme", "https")],
    "target without slash": [(":path", "x")],
    "another port": [(":authority", "a.test:81")],
    "CONNECT": [(":method", "CONNECT")],
    "line end in a value": [("x", "a\r\nb: c")],
    "NUL in a value": [("x", "a\0b")],
    "capital name": [("X-Y", "a")],
    "connection header": [("connection", "x")],
    "chunked": [("transfer-encoding", "chunked")],
    "two lengths": [("content-length", "3"), ("content-length", "4")],
    "blank in the path": [(":path", "/a b HTTP/1.1\r\nx: y")],
}


@pytest.mark.parametrize("name", REFUSED2)
async def test_streams_that_can_be_read_in_two_ways_are_refused(name: str) -> None:
    desk = Desk()
    guest = Guest2(desk)
    fields = {":method": "GET", ":scheme": "http", ":authority": "a.test", ":path": "/"}
    changed = [*fields.items()]
    for key, value in REFUSED2[name]:
        if key in fields:
            changed = [(k, value if k == key else v) for k, v in changed if not (k == key and value is None)]
        else:
            changed.append((key, value))
    guest.conn.send_headers(1, changed, end_stream=True)
    await guest.send()
    for _ in range(5):
        if desk.turned_away or guest.server.done():
            break
        await asyncio.sleep(0.05)
    assert desk.seen == []
    assert desk.turned_away or isinstance(guest.server.exception(), MalformedFlowError)
    await guest.close()


FRAMES = {
    "rapid reset": None,
    "settings": b"\0\0\0\x04\0\0\0\0\0",
    "ping": b"\0\0\x08\x06\0\0\0\0\0" + bytes(8),
    "priority": b"\0\0\x05\x02\0\0\0\0\x01" + b"\0\0\0\0\x10",
    "empty data": b"\0\0\0\0\0\0\0\0\x01",
    "window": b"\0\0\x04\x08\0\0\0\0\0\0\0\0\x01",
    "continuation": b"\0\0\x01\x09\0\0\0\0\x01\x00",
}


@pytest.mark.parametrize("name", FRAMES)
async def test_floods_end_the_connection(name: str) -> None:
    desk = Desk()
    guest = Guest2(desk)
    await guest.send()
    if name == "rapid reset":
        for _ in range(400):
            stream = guest.ask()
            guest.conn.reset_stream(stream)
        flood = guest.conn.data_to_send()
    elif name == "continuation":
        # HEADERS without END_HEADERS, then CONTINUATION for ever.
        flood = b"\0\0\x01\x01\0\0\0\0\x01\x82" + FRAMES[name] * 200
    else:
        guest.ask(method="POST", end=False)
        await guest.send()
        flood = FRAMES[name] * 3000
    sending = asyncio.create_task(guest.send(flood))
    error = None
    listening = asyncio.create_task(asyncio.sleep(0))
    try:
        loop = asyncio.get_running_loop()

        async def listen() -> None:
            while await loop.sock_recv(guest.sock, 65536):
                pass

        listening = asyncio.create_task(listen())
        error = await guest.ended()
    finally:
        sending.cancel()
        listening.cancel()
        await asyncio.wait({sending, listening})
    assert isinstance(error, MalformedFlowError), error
    assert len(desk.seen) <= 200
    await guest.close()


@given(st.binary(max_size=300))
@settings(max_examples=60, deadline=None)
def test_whatever_comes_http2_only_reads_requests_or_ends(noise: bytes) -> None:
    async def scenario() -> None:
        desk = Desk()
        guest = Guest2(desk)
        guest.ask()
        await guest.send(noise)
        guest.sock.shutdown(socket.SHUT_WR)
        error = await guest.ended()
        assert error is None or isinstance(error, MalformedFlowError | OSError), error
        await guest.close()

    asyncio.run(scenario())
