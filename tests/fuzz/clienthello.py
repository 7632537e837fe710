"""Coverage-guided fuzzing of the ClientHello reader: ``python tests/fuzz/clienthello.py [-runs=N] [CORPUS]``.

The first byte cuts the input in two, so that a hello in pieces has to give what it gives in one.
"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports():
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


def run(data: bytes) -> None:
    if not data:
        return
    cut, rest = data[0] * len(data) // 256, data[1:]
    assert read([rest]) == read([rest[:cut], rest[cut:]])


if __name__ == "__main__":
    atheris.Setup(sys.argv, run)
    atheris.Fuzz()
