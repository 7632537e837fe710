"""Held actions as the face gives them: what waits for a person, and who answers for an SDK user."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal

from vallum.client import wire
from vallum.client.connection import Connection
from vallum.core.errors import InvalidInput, VallumError

log = logging.getLogger(__name__)

WAIT_S = 300.0
Answer = Literal["allow", "deny", "always"]
"""``always``: allow, and the rule asks no more in this run."""


@dataclass(frozen=True)
class Approval:
    """An action that waits: nothing of it has left. The guest chose what is in ``subject``."""

    id: str
    sandbox: str
    run: str
    episode: str
    step: int | None
    """The step that asked, where that is known."""
    subject: str
    """What is asked, in one line, without control characters."""
    rule: str
    flow: str
    asked_ns: int
    """Wall clock, nanoseconds since the epoch."""
    timeout_s: float
    """It is denied then."""
    can_always: bool
    """Whether it may be answered with ``always``."""


OnApproval = Callable[[Approval], "Answer | Awaitable[Answer | None] | None"]
"""Decides; None leaves it to somebody else (``vallum approve``) or the timeout."""


def read_approval(info: wire.ApprovalInfo) -> Approval:
    """From the wire."""
    return Approval(**{name: getattr(info, name) for name in info.__struct_fields__})


async def list_approvals(
    connection: Connection, sandbox: str | None = None, *, seen: int = -1, wait_s: float = 0.0
) -> tuple[int, list[Approval]]:
    """A revision and what waits; with ``seen`` (a revision) at the latest after ``wait_s``, when it has changed."""
    request = wire.ListApprovals(seq=connection.next_seq(), sandbox=sandbox, seen=seen, wait_s=wait_s)
    page = await connection.call(request, wire.ApprovalPage)
    return page.revision, [read_approval(one) for one in page.pending]


async def decide(connection: Connection, approval: str, answer: Answer, why: str = "") -> Approval:
    """Answer one.

    Raises:
        InvalidInput: nothing of that id waits any more, or it cannot be answered so.
    """
    if answer not in ("allow", "deny", "always"):
        raise InvalidInput(f"{answer!r} is no answer: give 'allow', 'deny' or 'always'")
    request = wire.Decide(
        seq=connection.next_seq(), approval=approval, verdict="deny" if answer == "deny" else "allow", why=why,
        always=answer == "always",
    )  # fmt: skip
    return read_approval(await connection.call(request, wire.ApprovalInfo))


async def answer_all(connection: Connection, sandbox: str, on_approval: OnApproval) -> None:
    """Put whatever is held in a cell before ``on_approval``, one after the other, until cancelled.

    A callback that raises denies what it was asked, and is told in the log.
    """
    revision, asked = -1, set[str]()
    while True:
        try:
            revision, pending = await list_approvals(connection, sandbox, seen=revision, wait_s=WAIT_S)
        except VallumError:
            return  # the node has gone, and the cell with it
        asked &= {one.id for one in pending}
        for one in pending:
            if one.id in asked:
                continue
            asked.add(one.id)
            answer, why = await _ask(on_approval, one)
            if answer is None:
                continue
            try:
                await decide(connection, one.id, answer, why)
            except InvalidInput as error:
                log.info("approval %s: %s", one.id, error)  # decided or gone meanwhile
            except VallumError as error:
                log.warning("approval %s could not be answered: %s", one.id, error)
                return


async def _ask(on_approval: OnApproval, one: Approval) -> tuple[Answer | None, str]:
    try:
        given = on_approval(one)
        return (await given if inspect.isawaitable(given) else given), "on_approval"
    except Exception as error:  # the caller's own code: its failure denies
        log.exception("on_approval failed for %s, which is denied", one.id)
        return "deny", f"on_approval raised {type(error).__name__}"
