"""Which conversation a request goes on with. Pure.

An agent tells every time all that was said before. The digests of each beginning of it (a chain, as of commits) say
which earlier call it goes on from: the same conversation keeps its branch; where an agent has compacted its history,
started a sub-agent or gone back, another branch begins. Agents that rewrite old messages are found by the ids of the
tool calls whose results they bring.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable
from typing import TypeVar

import msgspec

from vallum.core.messages import Message, ToolCall, ToolResult, chain_digests, digest_message

MAX_LINKS = 65536
MAX_IDS = 16384

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


class Link(msgspec.Struct, frozen=True):
    """Where a chain of messages was seen."""

    branch: str
    call: str
    answered: bool
    """The chain includes the reply of ``call``; otherwise it is what ``call`` asked."""


class Placement(msgspec.Struct, frozen=True, kw_only=True):
    """Where a request belongs."""

    branch: str
    is_new: bool
    parent: str
    """Call whose reply it goes on from; empty at the start."""
    known: int
    """How many of its messages were known from ``parent`` and its reply."""
    goes_on: str
    """Branch whose steps are over with it; empty when there is none."""
    digest: bytes
    """The chain at its end."""


class Branches:
    """The conversations of one cell."""

    def __init__(self) -> None:
        self._links: OrderedDict[bytes, Link] = OrderedDict()
        self._tips: dict[str, str] = {}
        self._parents: OrderedDict[str, str] = OrderedDict()
        self._ids: OrderedDict[str, Link] = OrderedDict()
        self._count = 0

    def place(self, call: str, messages: tuple[Message, ...], *, seed: str, with_ids: bool) -> Placement:
        """Find the place of a request, and remember that ``call`` asked it.

        Args:
            seed: what tells agents apart that say the same (their own headers).
            with_ids: whether the dialect gives tool calls ids that come back.
        """
        chain = chain_digests(seed, messages, with_ids=with_ids)
        placement = self._find(chain, messages, with_ids=with_ids)
        self._tips[placement.branch] = call
        _remember(self._parents, call, placement.parent, MAX_LINKS)
        _remember(self._links, chain[-1], Link(placement.branch, call, answered=False), MAX_LINKS)
        return placement

    def _find(self, chain: list[bytes], messages: tuple[Message, ...], *, with_ids: bool) -> Placement:
        for length in range(len(chain), 0, -1):
            link = self._links.get(chain[length - 1])
            if link is None or messages[length - 1].role == "system":
                continue
            is_tip = self._tips.get(link.branch) == link.call
            if link.answered:
                return self._at(link.branch if is_tip else "", link.call, length, chain[-1])
            if length == len(chain):
                # Asked again, in another way: it stands beside the call that asked it first.
                return self._at(link.branch if is_tip else "", self._parents.get(link.call, ""), length, chain[-1])
            if messages[length].role == "assistant":
                # The reply in the agent's own words.
                return self._at(link.branch if is_tip else "", link.call, length, chain[-1])
            break
        if with_ids and (link := self._by_results(messages)) is not None:
            is_tip = self._tips.get(link.branch) == link.call
            placement = self._at("", link.call, 0, chain[-1])
            return msgspec.structs.replace(placement, goes_on=link.branch if is_tip else "")
        return self._at("", "", 0, chain[-1])

    def _at(self, branch: str, parent: str, known: int, digest: bytes) -> Placement:
        is_new = not branch
        if is_new:
            self._count += 1
            branch = f"b{self._count}"
        goes_on = "" if is_new else branch
        return Placement(branch=branch, is_new=is_new, parent=parent, known=known, goes_on=goes_on, digest=digest)

    def _by_results(self, messages: tuple[Message, ...]) -> Link | None:
        for message in reversed(messages):
            for part in message.parts:
                if isinstance(part, ToolResult) and (link := self._ids.get(part.call)) is not None:
                    return link
        return None

    def answered(self, placement: Placement, call: str, reply: Message, *, with_ids: bool) -> None:
        """``call`` got ``reply``: what goes on from both goes on in its branch."""
        link = Link(placement.branch, call, answered=True)
        digest = hashlib.sha256(placement.digest + digest_message(reply, with_ids=with_ids)).digest()
        _remember(self._links, digest, link, MAX_LINKS)
        for call_id in _ids(reply.parts):
            _remember(self._ids, call_id, link, MAX_IDS)


def _remember(kept: OrderedDict[_Key, _Value], key: _Key, value: _Value, limit: int) -> None:
    kept[key] = value
    kept.move_to_end(key)
    while len(kept) > limit:
        kept.popitem(last=False)


def _ids(parts: Iterable[object]) -> list[str]:
    return [part.id for part in parts if isinstance(part, ToolCall) and part.id]
