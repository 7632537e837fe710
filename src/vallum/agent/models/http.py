"""A model behind any server of chat completions, asked directly: no wall, no budget and no record between.

For a server of your own. Where the calls shall be judged, counted and recorded, use :mod:`vallum.agent.models.gateway`.
"""

from __future__ import annotations

import asyncio
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

from vallum.agent.messages import Message, Reply, ToolSpec
from vallum.agent.models.base import ModelError
from vallum.agent.models.chat import read_reply, write_request
from vallum.core.errors import InvalidInput

MAX_ANSWER_BYTES = 64 * 1024 * 1024
AGAIN = frozenset({408, 429, 500, 502, 503, 504})
"""Statuses after which the same request may be sent again."""


class HttpModel:
    """Posts to ``base_url``/chat/completions.

    Args:
        base_url: ``http://`` or ``https://``, with ``/v1`` where the server wants it.
        key: sent as ``Authorization: Bearer``; None sends none.
        options: further fields of the body (temperature, seed, max_tokens...).
        tries: how often one request is sent at most; the pause doubles from one second.
    """

    def __init__(
        self,
        base_url: str,
        name: str,
        *,
        key: str | None = None,
        options: dict[str, Any] | None = None,
        timeout_s: float = 600.0,
        tries: int = 3,
    ) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise InvalidInput(f"the model's URL {base_url!r} is not usable: give http:// or https://")
        self.name = name
        self._url = base_url.rstrip("/") + "/chat/completions"
        self._key = key
        self._options = options
        self._timeout_s = timeout_s
        self._tries = tries

    async def reply(self, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> Reply:
        """Ask the server.

        Raises:
            ModelError: it cannot be reached, refused, or answered something else.
        """
        body = write_request(self.name, messages, tools, self._options)
        for left in reversed(range(self._tries)):
            status, answer = await asyncio.to_thread(self._post, body)
            if status not in AGAIN or not left:
                break
            await asyncio.sleep(2.0 ** (self._tries - 1 - left))
        return read_reply(status, answer)

    def _post(self, body: bytes) -> tuple[int, bytes]:
        headers = {"content-type": "application/json"}
        if self._key is not None:
            headers["authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self._url, body, headers)  # noqa: S310 - the scheme was checked
        try:
            with urllib.request.urlopen(request, timeout=self._timeout_s) as answer:  # noqa: S310
                raw = answer.read(MAX_ANSWER_BYTES + 1)
                status = int(answer.status)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read(4096)
        except (OSError, ValueError) as error:
            raise ModelError(f"the model's server {self._url} cannot be reached ({error}): is it running?") from error
        if len(raw) > MAX_ANSWER_BYTES:
            raise ModelError(f"the model's server {self._url} sent more than {MAX_ANSWER_BYTES} bytes")
        return status, raw
