"""One connection to the node: requests out, answers matched by number, the node started when there is none."""

from __future__ import annotations

import asyncio
import itertools
import os
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from vallum.client import wire
from vallum.client.frames import FrameStream
from vallum.client.places import Places
from vallum.core.errors import BY_NAME, GuestFileError, InvalidInput, NodeError, StepTimeout, VallumError

START_TIMEOUT_S = 30.0
_PASSED_ON = (
    *("PATH", "LANG", "LC_ALL", "TZ", "TMPDIR", "SSL_CERT_FILE"),
    *("VALLUM_OTLP_ENDPOINT", "VALLUM_OTLP_CONTENT", "OTEL_EXPORTER_OTLP_HEADERS"),
)

T = TypeVar("T")
OnOutput = Callable[[str, bytes], None]


class Connection:
    """A client's connection. Its end ends the client's cells."""

    def __init__(self, stream: FrameStream) -> None:
        self._stream = stream
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[bytes]] = {}
        self._listeners: dict[int, OnOutput] = {}
        self._closed = False
        stream.on_frame = self._receive
        stream.ended.add_done_callback(self._see_end)

    @classmethod
    async def open(cls, places: Places, *, start: bool = True) -> Connection:
        """Connect to the owner's node, starting one when none is running (and ``start``).

        Raises:
            NodeError: it cannot be started or reached; names its log file.
        """
        sock = await _connect(places, start=start)
        made: list[Connection] = []
        await asyncio.get_running_loop().create_unix_connection(
            lambda: FrameStream(lambda stream: made.append(cls(stream))), sock=sock
        )
        return made[0]

    @property
    def is_open(self) -> bool:
        """Whether the node is still there and neither side has closed."""
        return not self._closed

    def next_seq(self) -> int:
        """A number for a request."""
        return next(self._numbers)

    def post(self, request: wire.AnyRequest) -> None:
        """Send a request that has no answer of its own."""
        if not self._closed:
            self._stream.write(wire.frame(request))

    async def call(self, request: wire.AnyRequest, answer: type[T], on_output: OnOutput | None = None) -> T:
        """Send a request and wait for its answer.

        Raises:
            VallumError: what the node said, as the class it named.
            NodeError: the node went away.
        """
        if self._closed:
            raise NodeError("the connection to the node is closed; open a new vallum.Node()")
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting[request.seq] = future
        if on_output is not None:
            self._listeners[request.seq] = on_output
        try:
            self._stream.write(wire.frame(request))
            await self._stream.drain()
            result = await future
        finally:
            self._waiting.pop(request.seq, None)
            self._listeners.pop(request.seq, None)
        return msgspec.msgpack.decode(result, type=answer)

    async def close(self) -> None:
        """End the connection, and with it every cell of this client."""
        self._closed = True
        self._stream.close()
        await self._stream.ended

    def _receive(self, body: bytes) -> None:
        self._take(wire.decode_message(body))

    def _see_end(self, ended: asyncio.Future[str]) -> None:
        self._closed = True
        reason = "the node went away; its cells are gone and what they had done is in the record"
        if ended.result():
            reason = f"the node sent something unreadable: {ended.result()}"
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(NodeError(reason))

    def _hand_on(self, message: wire.Output) -> None:
        """Give output to whoever asked for it. What it raises ends its own request, not the connection."""
        listener = self._listeners.get(message.seq)
        future = self._waiting.get(message.seq)
        if listener is None or future is None or future.done():
            return
        try:
            listener(message.stream, message.data)
        except Exception as error:  # noqa: BLE001 - the caller's own code: its error is the caller's answer
            future.set_exception(error)

    def _take(self, message: wire.AnyMessage) -> None:
        if isinstance(message, wire.Output):
            self._hand_on(message)
            return
        future = self._waiting.get(message.seq)
        if future is None or future.done():
            return
        if isinstance(message, wire.Reply):
            future.set_result(message.result)
        else:
            future.set_exception(rebuild(message))


def rebuild(failure: wire.Failure) -> VallumError:
    """The error that the node raised."""
    if failure.error == GuestFileError.__name__:
        return GuestFileError(failure.message, failure.errno_name)
    error = BY_NAME.get(failure.error, VallumError)(failure.message)
    if isinstance(error, StepTimeout) and failure.partial:
        error.partial = msgspec.msgpack.decode(failure.partial, type=wire.Ran)
    return error


async def _connect(places: Places, *, start: bool) -> socket.socket:
    prepare(places)
    loop = asyncio.get_running_loop()
    deadline = loop.time() + START_TIMEOUT_S
    while (sock := _try_connect(places.socket)) is None:
        if not start:
            raise NodeError(
                f"no node is running at {places.runtime}: it lives as long as its clients, so nothing is under way"
            )
        if loop.time() > deadline:
            raise NodeError(
                f"the node did not start within {START_TIMEOUT_S:.0f} s; its log is {places.runtime}/node.log"
            )
        word = await asyncio.to_thread(_start_node, places)
        if word.startswith(b"error "):
            raise NodeError(word[6:].decode("utf-8", "replace").strip())
        if word == b"":
            raise NodeError(f"the node ended before it was ready; its log is {places.runtime}/node.log")
        if word.startswith(b"running"):
            await asyncio.sleep(0.02)
    return sock


def prepare(places: Places) -> None:
    """Make the owner's directories, 0700.

    Raises:
        NodeError: a directory cannot be made, or belongs to someone else (somebody may have laid a trap in /tmp).
        InvalidInput: the socket's path is longer than the kernel takes.
    """
    if len(os.fsencode(places.socket)) > 100:
        raise InvalidInput(f"{places.socket} is too long for a Unix socket (100 bytes): choose a shorter VALLUM_HOME")
    for directory in (places.state, places.runtime):
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = directory.lstat()
            if found.st_uid != os.geteuid() or directory.is_symlink():
                raise NodeError(
                    f"{directory} belongs to uid {found.st_uid}, not to you: remove it or set VALLUM_HOME to a directory of your own"
                )
            if found.st_mode & 0o077:
                directory.chmod(0o700)
        except OSError as error:
            raise NodeError(
                f"cannot make {directory}: {error.strerror}; set VALLUM_HOME to a directory that you may write"
            ) from error


def _try_connect(path: Path) -> socket.socket | None:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.connect(str(path))
        _pid, uid, _gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    except (FileNotFoundError, ConnectionRefusedError, ConnectionResetError):
        sock.close()
        return None
    except OSError as error:
        sock.close()
        raise NodeError(f"cannot reach the node at {path}: {error.strerror}") from error
    if uid != os.geteuid():
        sock.close()
        raise NodeError(f"the process at {path} runs as uid {uid}, not as you: not talking to it")
    sock.setblocking(False)
    return sock


def _start_node(places: Places) -> bytes:
    """Start a node and wait for its first line: ``ready``, ``running`` or ``error ...``; empty when it died."""
    environ = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    log = os.open(
        places.runtime / "node.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
    )
    said, saying = os.pipe2(os.O_CLOEXEC)
    try:
        # What we start forks the node and ends, so that the node is nobody's child.
        subprocess.run(
            [sys.executable, "-I", "-m", "vallum.node", "--state", str(places.state), "--runtime", str(places.runtime)],
            stdin=subprocess.DEVNULL,
            stdout=saying,
            stderr=log,
            env=environ,
            cwd="/",
            start_new_session=True,
            check=False,
        )
        os.close(saying)
        saying = -1
        word = b""
        deadline = time.monotonic() + START_TIMEOUT_S
        while not word.endswith(b"\n"):
            ready, _, _ = select.select([said], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                return b"error the node did not start within %d s; its log is %s/node.log" % (
                    START_TIMEOUT_S,
                    os.fsencode(places.runtime),
                )
            data = os.read(said, 4096)
            if not data:
                break
            word += data
        return word
    finally:
        os.close(log)
        os.close(said)
        if saying >= 0:
            os.close(saying)


def view(line: bytes) -> dict[str, Any]:
    """One event as the dictionary that ``vallum events --json`` prints."""
    value = msgspec.json.decode(line)
    assert isinstance(value, dict)
    return value
