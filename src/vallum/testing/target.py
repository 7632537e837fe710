"""A server that must not be reached: at an address of its own on this machine, counting what it receives.

The address is one of a documentation range (RFC 5737) on a veth pair that is made and removed with it; nothing outside of
this machine is contacted. Needs root.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import threading
from collections.abc import Iterator

ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\nconnection: close\r\n\r\nok\n"


@contextlib.contextmanager
def make_address(address: str = "192.0.2.77") -> Iterator[str]:
    """Give this machine an address for as long as the block runs.

    Raises:
        subprocess.CalledProcessError: it cannot be had (not root, no veth).
    """
    name = f"vt{os.getpid() % 0xFFFFFF:x}{secrets.token_hex(1)}"
    _run("link", "add", name, "type", "veth", "peer", "name", f"{name}p")
    try:
        _run("addr", "add", f"{address}/32", "dev", name)
        _run("link", "set", name, "up")
        yield address
    finally:
        _run("link", "del", name)


def _run(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Target:
    """Answers every connection with a short HTTP response."""

    def __init__(self, address: str) -> None:
        self.received: list[bytes] = []
        """First bytes of each connection that came."""
        self._listener = socket.create_server((address, 0))
        self.address = address
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """``http://ADDRESS:PORT``."""
        return f"http://{self.address}:{self.port}"

    def _serve(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                return
            with peer, contextlib.suppress(OSError):
                peer.settimeout(5)
                self.received.append(b"")
                self.received[-1] = peer.recv(4096)
                peer.sendall(ANSWER)

    def close(self) -> None:
        """Stop serving."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(10)
