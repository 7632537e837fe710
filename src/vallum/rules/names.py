"""Host names as rules compare them: lower case, ASCII, no trailing dot, nothing a resolver could read as an address."""

from __future__ import annotations

import re

_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMERIC = re.compile(r"(?:0x[0-9a-f]*|[0-9]+)")

METADATA_NAMES = frozenset(
    {
        "metadata.google.internal",
        "metadata.goog",
        "metadata",
        "instance-data",
        "instance-data.ec2.internal",
        "metadata.tencentyun.com",
        "metadata.azure.internal",
    }
)
"""Names under which clouds offer instance metadata. Source: the clouds' own documentation."""


def normalise_name(text: str) -> str | None:
    """The name in the form rules compare, or None when it is not a host name.

    A name whose last label is a number (``2130706433``, ``0x7f.1``) is refused: ``getaddrinfo`` reads it as an address.
    """
    name = text.lower().removesuffix(".")
    if not name or len(name) > 253:
        return None
    labels = name.split(".")
    if not all(_LABEL.fullmatch(label) for label in labels) or _NUMERIC.fullmatch(labels[-1]):
        return None
    return name


def encode_name(text: str) -> str | None:
    """As :func:`normalise_name`, for text that a person wrote: letters beyond ASCII become their IDNA form."""
    if text.isascii():
        return normalise_name(text)
    try:
        return normalise_name(text.encode("idna").decode("ascii"))
    except UnicodeError:
        return None


def is_under(name: str, parent: str) -> bool:
    """Whether ``name`` has one or more labels before ``parent``."""
    return name.endswith("." + parent) and len(name) > len(parent) + 1
