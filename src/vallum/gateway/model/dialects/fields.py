"""Reading JSON that somebody else wrote: each access checks what it finds and names where."""

from __future__ import annotations

from typing import Any

import msgspec

from vallum.gateway.model.dialects.contract import DialectError, Json

_encode = msgspec.json.Encoder().encode


def parse_object(data: bytes | str, where: str) -> Json:
    """A JSON object. Raises DialectError."""
    try:
        value = msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise DialectError(f"{where} is not JSON ({str(error)[:200]})") from None
    return obj(value, where)


def obj(value: Any, where: str) -> Json:
    """An object."""
    if not isinstance(value, dict):
        raise DialectError(f"{where} has to be an object")
    return value


def arr(value: Any, where: str) -> list[Any]:
    """A list; nothing is an empty one."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise DialectError(f"{where} has to be a list")
    return value


def objects(value: Any, where: str) -> list[Json]:
    """A list of objects."""
    return [obj(item, f"{where}[{index}]") for index, item in enumerate(arr(value, where))]


def string(value: Any, where: str) -> str:
    """A string; nothing is an empty one."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DialectError(f"{where} has to be a string")
    return value


def required(value: Any, where: str) -> str:
    """A string that is not empty."""
    if not isinstance(value, str) or not value:
        raise DialectError(f"{where} has to be a string that is not empty")
    return value


def integer(value: Any, where: str) -> int | None:
    """A whole number, or None."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        raise DialectError(f"{where} has to be a whole number")
    return int(value)


def number(value: Any, where: str) -> float | None:
    """A number, or None."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DialectError(f"{where} has to be a number")
    return float(value)


def count(value: Any) -> int | None:
    """A number of tokens as an upstream tells it; what is none is nothing."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 53 else None


def ids(value: Any) -> list[int] | None:
    """Token ids, or None."""
    if isinstance(value, list) and all(isinstance(item, int) and not isinstance(item, bool) for item in value):
        return value
    return None


def dump(value: Any) -> str:
    """JSON text."""
    return _encode(value).decode()


def loads(text: str) -> Any:
    """What JSON text says; the text itself under ``text`` where it is none."""
    try:
        return msgspec.json.decode(text or "{}")
    except (msgspec.DecodeError, RecursionError):
        return {"text": text}


def names(words: str) -> frozenset[str]:
    """A set of names that are written with spaces between."""
    return frozenset(words.split())
