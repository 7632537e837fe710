"""Bytes that must not leave: what the owner registered for a run, every stored secret, and false keys planted in a cell.

Covered: what the gateway can see of them leaving is cut before it left (``vallum.gateway.kit.Canary``), and the record says which,
never what. Not covered: what is inside of TLS that no rule has the gateway end, and encodings that it does not know.
"""

from __future__ import annotations

import base64
import secrets
import string
from collections.abc import Iterable, Mapping

from vallum.core.errors import InvalidInput
from vallum.core.scope import check_id
from vallum.gateway.kit import Canary, Credential
from vallum.node.redaction import Secret, parts_of

MIN_CANARY_BYTES = 8
MAX_CANARY_BYTES = 4096
MAX_CANARIES = 256
PLANTED_FILE = ".aws/credentials"
PLANTED_NAME = "planted-aws-key"
_KEY_ALPHABET = string.ascii_uppercase + "234567"


def check_canaries(canaries: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return them.

    Raises:
        InvalidInput: a name or value cannot be used; the value is not in the message.
    """
    if len(canaries) > MAX_CANARIES:
        raise InvalidInput(f"{len(canaries)} canaries are too many: at most {MAX_CANARIES}")
    for name, value in canaries.items():
        check_id(name, "the canary's name")
        if not MIN_CANARY_BYTES <= len(value) <= MAX_CANARY_BYTES:
            raise InvalidInput(
                f"the canary {name} has {len(value)} bytes: give {MIN_CANARY_BYTES} to {MAX_CANARY_BYTES} that are found nowhere else"
            )
    return dict(canaries)


def guard_secrets(credentials: Iterable[Credential]) -> tuple[Canary, ...]:
    """Stored secrets as canaries: whole, and each part that gives one away. Pure."""
    return tuple(
        Canary(name=f"credential.{credential.name}", value=part)
        for credential in credentials
        for part in parts_of(credential.secret)
    )


def secrets_of(credentials: Iterable[Credential], canaries: Iterable[Canary]) -> list[Secret]:
    """What has to be taken out of the record. Pure."""
    return [
        *(Secret(name=f"credential {one.name}", value=one.secret) for one in credentials),
        *(Secret(name=f"canary {one.name}", value=one.value) for one in canaries),
    ]


def make_planted() -> tuple[bytes, tuple[Canary, ...]]:
    """A file that looks like the keys of a cloud account, and the canaries in it. No provider knows these keys."""
    key_id = "AKIA" + "".join(secrets.choice(_KEY_ALPHABET) for _ in range(16))
    key = base64.b64encode(secrets.token_bytes(30)).decode()
    text = f"[default]\naws_access_key_id = {key_id}\naws_secret_access_key = {key}\nregion = eu-central-1\n"
    return text.encode(), tuple(Canary(name=PLANTED_NAME, value=value.encode()) for value in (key_id, key))
