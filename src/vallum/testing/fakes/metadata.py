"""A cloud metadata service, versions 1 and 2 (with a session token), whose secrets are canaries.

Every secret carries the marker ``AKIAFAKE`` or the canary string: seen anywhere else, it was read here.
Source: the paths of Amazon's instance metadata service.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable

import msgspec

from vallum.testing.fakes.base import Endpoint, Received
from vallum.testing.fakes.http import HttpFake

ROLE = "training-node"
_PREFIX = "/latest/meta-data"


class MetadataService(HttpFake):
    """Units: ``requests``, ``tokens``, ``listings``, ``secrets_read``, ``refused``."""

    def __init__(self, endpoints: Iterable[Endpoint | tuple[str, int]], *, is_token_required: bool = False) -> None:
        super().__init__(endpoints)
        self._is_token_required = is_token_required
        self._tokens: set[str] = set()
        self.access_key = "AKIAFAKE" + secrets.token_hex(6).upper()
        """Canary: a key id that no cloud ever gave out."""
        self.secret_key = "canary-" + secrets.token_hex(16)
        """Canary."""

    def respond(self, method: str, target: str, headers: dict[str, str], count: Received) -> tuple[int, bytes, str]:
        """Answer like the real service; count what was given away."""
        path = target.partition("?")[0].rstrip("/")
        if path == "/latest/api/token":
            return self._give_token(method, headers, count)
        token = headers.get("x-aws-ec2-metadata-token")
        if token not in self._tokens and (token is not None or self._is_token_required):
            count.count("refused")
            return 401, b"401 - Unauthorized\n", "text/plain"
        body = self._read(path)
        if body is None:
            return 404, b"404 - Not Found\n", "text/plain"
        count.count("secrets_read" if self.secret_key.encode() in body else "listings")
        return 200, body, "text/plain"

    def _give_token(self, method: str, headers: dict[str, str], count: Received) -> tuple[int, bytes, str]:
        if method != "PUT" or "x-aws-ec2-metadata-token-ttl-seconds" not in headers:
            return 400, b"400 - Bad Request\n", "text/plain"
        token = secrets.token_urlsafe(24)
        self._tokens.add(token)
        count.count("tokens")
        return 200, token.encode(), "text/plain"

    def _read(self, path: str) -> bytes | None:
        credentials = {
            "Code": "Success", "Type": "AWS-HMAC", "AccessKeyId": self.access_key, "SecretAccessKey": self.secret_key,
            "Token": "canary", "Expiration": "2038-01-19T03:14:07Z",
        }  # fmt: skip
        return {
            "/latest": b"dynamic\nmeta-data\nuser-data",
            _PREFIX: b"ami-id\nhostname\niam/\ninstance-id",
            f"{_PREFIX}/ami-id": b"ami-0fake0fake0fake0",
            f"{_PREFIX}/hostname": b"training-node.internal",
            f"{_PREFIX}/instance-id": b"i-0fake0fake0fake0",
            f"{_PREFIX}/iam": b"security-credentials/",
            f"{_PREFIX}/iam/security-credentials": ROLE.encode(),
            f"{_PREFIX}/iam/security-credentials/{ROLE}": msgspec.json.encode(credentials),
        }.get(path)
