"""Coverage-guided fuzzing of the ClientHello reader.

The first byte cuts the input in two, so that a hello in pieces has to give what it gives in one.
"""

from __future__ import annotations

from vallum.gateway.tls.clienthello import HelloReader, MalformedError, NotTlsError
from vallum.gateway.tls.ja4 import fingerprint


def read(pieces: list[bytes]) -> object:
    reader = HelloReader()
    data = b""
    for piece in pieces:
        data += piece
        try:
            found = reader.read(data)
        except (NotTlsError, MalformedError) as error:
            return type(error)
        if found is not None:
            return fingerprint(found)
    return None


def fuzz(data: bytes) -> None:
    if not data:
        return
    cut, rest = data[0] * len(data) // 256, data[1:]
    assert read([rest]) == read([rest[:cut], rest[cut:]])
