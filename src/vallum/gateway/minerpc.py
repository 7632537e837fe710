"""Recognises what miners say: stratum, XMRig's login, block templates. Pure.

A message counts by its method name or, for ``login``, by keys that stand together only there, so that an ordinary
JSON-RPC login is not one.

Source: the stratum v1 protocol of Bitcoin miners, XMRig's ``login``, Bitcoin Core's RPC, EthereumStratum.
"""

from __future__ import annotations

import json
import re
from typing import Any

_METHODS = frozenset(
    {
        *(f"mining.{verb}" for verb in ("subscribe", "authorize", "configure", "submit", "extranonce.subscribe")),
        *(f"mining.{verb}" for verb in ("suggest_difficulty", "suggest_target", "hello", "noop", "capabilities")),
        *("getblocktemplate", "submitblock", "getwork", "eth_submitLogin", "eth_getWork", "eth_submitWork"),
        *("eth_submitHashrate", "getjobtemplate", "keepalived"),
    }
)
_METHOD_TEXT = re.compile(
    rb"[\"'](?:" + b"|".join(re.escape(method.encode()) for method in sorted(_METHODS - {"keepalived"})) + rb")[\"']"
)
_MARKS = (b"mining.", b"getblocktemplate", b"submitblock", b"getwork", b"getWork", b"eth_submit", b"getjobtemplate")
_LOGIN_TEXT = re.compile(rb"[\"'](login|pass|agent|algo|rigid)[\"']\s*:")
_ESCAPE = re.compile(rb"\\u00([0-7][0-9a-fA-F])")
_decoder = json.JSONDecoder(strict=False)
_MAX_VALUES = 64
_MARK = re.compile(rb'["\\[\]{}]')


class Nesting:
    """Follows JSON text as it comes and tells where its outermost value may have ended. Each byte is looked at once."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped_at = -1
        self._seen = 0

    def feed(self, fresh: bytes | bytearray) -> bool:
        """Whether a bracket in these bytes closed the outermost value (or one that was never opened)."""
        closed = False
        for match in _MARK.finditer(fresh):
            at, mark = self._seen + match.start(), match.group()
            if at == self._escaped_at:
                continue
            if mark == b"\\":
                self._escaped_at = at + 1
            elif mark == b'"':
                self._in_string = not self._in_string
            elif not self._in_string:
                self._depth += 1 if mark in b"[{" else -1
                closed |= self._depth <= 0
        self._seen += len(fresh)
        return closed


def is_miner_text(raw: bytes) -> bool:
    """Whether the bytes hold a miner's message, well-formed JSON or not (a fragment, another message around it)."""
    if b"\\u" in raw:
        raw = _ESCAPE.sub(lambda m: bytes([int(m[1], 16)]), raw)
    # Plain searches first: they run at memory speed over traffic that has nothing to do with mining.
    if any(mark in raw for mark in _MARKS) and _METHOD_TEXT.search(raw):
        return True
    if b"login" not in raw or b"pass" not in raw:
        return False
    keys = set(_LOGIN_TEXT.findall(raw))
    return {b"login", b"pass"} <= keys and bool(keys & {b"agent", b"algo", b"rigid"})


def _is_miner_call(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(_is_miner_call, value[:_MAX_VALUES]))
    if not isinstance(value, dict):
        return False
    method = value.get("method")
    if isinstance(method, str) and method in _METHODS:
        return True
    params = value.get("params")
    return (
        method == "login"
        and isinstance(params, dict)
        and {"login", "pass"} <= params.keys()
        and bool({"agent", "algo", "rigid"} & params.keys())
    )


def read_messages(raw: bytes) -> bool | None:
    """Whether one of the JSON values at the start of ``raw`` is a miner's; None while the first is not complete."""
    text = raw.decode("utf-8", "replace")
    position = 0
    for count in range(_MAX_VALUES):
        while position < len(text) and text[position] in " \t\r\n\0,":
            position += 1
        if position == len(text):
            return is_miner_text(raw) if count else None
        try:
            value, position = _decoder.raw_decode(text, position)
            if _is_miner_call(value):
                return True
        except (ValueError, RecursionError) as error:
            if is_miner_text(raw):
                return True
            return None if _is_unfinished(error, text) else False
    return is_miner_text(raw)


def _is_unfinished(error: Exception, text: str) -> bool:
    """Whether more text could make it JSON. Too deep counts as unfinished: it is then refused at the caller's bound."""
    if not isinstance(error, json.JSONDecodeError):
        return True
    # A cut-off string is reported where it starts, a cut-off literal, escape or number a few characters early.
    return error.msg.startswith("Unterminated string") or error.pos >= len(text) - 8
