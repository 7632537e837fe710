"""Children of a cell's PID 1 as the node knows them: one that was asked for, and one that waits for its command."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar, cast

from vallum.sandbox.ns.channel import Channel, close_all

T = TypeVar("T")


@dataclass(frozen=True)
class Failure:
    """Why a child did not come to do what it was forked for: a stage of native/proto.h, and an errno."""

    stage: int
    number: int


class Outcome(Generic[T]):
    """Something that is told once, to any number of waiters. One that is cancelled takes nothing from the others.

    A waiter goes on in the very next turn of the loop (:func:`asyncio.shield` takes one more).
    """

    def __init__(self) -> None:
        self._value: T | None = None
        self._error: Exception | None = None
        self._is_told = False
        self._waiters: list[asyncio.Future[None]] = []

    def done(self) -> bool:
        """Whether it was told."""
        return self._is_told

    def settle(self, value: T) -> None:
        """Tell; nothing when it was told before."""
        if not self._is_told:
            self._value = value
            self._tell()

    def refuse(self, error: Exception) -> None:
        """It will not come: everybody who waits or will wait gets ``error``; nothing when it was told before."""
        if not self._is_told:
            self._error = error
            self._tell()

    def _tell(self) -> None:
        self._is_told = True
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def wait(self) -> T:
        """What was told."""
        if not self._is_told:
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            try:
                await waiter
            finally:
                if waiter in self._waiters:
                    self._waiters.remove(waiter)
        if self._error is not None:
            raise self._error
        return cast("T", self._value)

    def then(self, action: Callable[[], None]) -> None:
        """Do it when it is told."""
        waiter = asyncio.get_running_loop().create_future()
        waiter.add_done_callback(lambda _: action())
        self._waiters.append(waiter)
        if self._is_told:
            self._tell()


@dataclass
class Job:
    """One child of PID 1 (or of a keeper), from the request until its exit."""

    id: int
    channel: Channel
    begun: Outcome[Failure | None] = field(default_factory=Outcome)
    ended: Outcome[Failure | int] = field(default_factory=Outcome)
    told: Outcome[None] = field(default_factory=Outcome)
    pid: int = 0
    fds: list[int] = field(default_factory=list)
    """Ours to close until somebody takes them."""

    def take_fds(self) -> list[int]:
        """Hand them over."""
        taken, self.fds = self.fds, []
        return taken


@dataclass(frozen=True)
class Waiting:
    """A child in the cgroup of a step that is to come, which becomes that step's command by one message to it.

    It runs our own code until then, as PID 1's user, and ends by itself when nobody holds its socket any more. So it is no
    process of the step: whoever counts those leaves it out.
    """

    job: Job
    step: int
    user: str
    """For whom its pipes were made; it refuses any other, and one of whom ``/etc/passwd`` says otherwise by then."""

    def is_for(self, step: int, user: str) -> bool:
        """Whether it can become a command of ``step`` as ``user``, as far as is known."""
        return self.step == step and self.user == user and len(self.job.fds) == 4 and not self.job.ended.done()

    def give(self, word: bytes) -> bool:
        """Make it the command of a payload of at most ``MAX_WORD`` bytes; whether it took it. If not, it is dismissed."""
        go, *pipes = self.job.take_fds()
        try:
            taken = os.write(go, word) == len(word)
        except OSError:  # it has ended: killed for memory, or with the processes of its step
            taken = False
        finally:
            os.close(go)
        if taken:
            self.job.fds = pipes
        else:
            close_all(pipes)
        return taken

    def dismiss(self) -> None:
        """Let go of it: it ends."""
        close_all(self.job.take_fds())
