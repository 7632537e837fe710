"""The question of `vallum run`, when a rule holds something: asked on the terminal that the command itself uses.

Covered: what the command writes waits while a question stands, so that it cannot paint over it; what the terminal itself answers
(to an escape sequence of the command's) is no answer of the person's. Not covered: what the command wrote before, further up.
"""

from __future__ import annotations

import asyncio
import os
import sys
import termios
from collections.abc import Callable
from typing import Literal

import click

from vallum.cli.program import program
from vallum.client.approvals import Answer, Approval
from vallum.core.text import show

MAX_KEPT_BYTES = 8 * 1024 * 1024
MAX_LINE_BYTES = 1000
_RESET = "\x1b[0m\x1b[?25h"
"""Colours off, cursor shown."""

Word = Answer | Literal["again"]


def read_answer(line: bytes, *, can_always: bool) -> Word:
    """What a typed line means. One with any control character in it is none of a person's. Pure."""
    word = line.strip().lower()
    if word in (b"y", b"yes"):
        return "allow"
    if word in (b"n", b"no"):
        return "deny"
    if word in (b"a", b"always") and can_always:
        return "always"
    return "again"


class Prompt:
    """Asks one question after the other; between them bytes pass it by."""

    def __init__(self, write: Callable[[str, bytes], None], *, is_quiet: bool) -> None:
        """``write`` puts out what the command writes."""
        self._write = write
        self.is_raw = False
        """Whether the terminal neither echoes nor gathers lines now."""
        self._is_quiet = is_quiet
        self._can_ask = sys.stdin.isatty() and sys.stderr.isatty()
        self._answer: asyncio.Future[Word] | None = None
        self._can_always = False
        self._line = bytearray()
        self._kept: list[tuple[str, bytes]] = []
        self._kept_bytes = 0
        self._left_out = 0

    @property
    def is_asking(self) -> bool:
        """Whether what is typed is an answer, and no input of the command."""
        return self._answer is not None

    async def __call__(self, approval: Approval) -> Answer | None:
        """Ask; None where there is no terminal to ask on."""
        if not self._can_ask:
            if not self._is_quiet:
                self._say(f"vallum: waits for {program()} approve {approval.id}: {show(approval.subject)}")
            return None
        choices = "[y]es, [n]o" + (", [a]lways in this run" if approval.can_always else "")
        step = "?" if approval.step is None else approval.step
        self._can_always = approval.can_always
        self._line.clear()
        termios.tcflush(0, termios.TCIFLUSH)
        self._say(
            f"{_RESET}\n-- vallum: step {step} asks for {show(approval.subject, 500)}\n   rule {show(approval.rule)}"
        )
        try:
            async with asyncio.timeout(approval.timeout_s):
                while True:
                    self._answer = asyncio.get_running_loop().create_future()
                    self._say(f"   allow it? {choices}, then Enter ({approval.timeout_s:.0f} s): ", end="")
                    answer = await self._answer
                    if answer != "again":
                        return answer
        except TimeoutError:
            self._say("\n   nobody answered, so it is denied")
            return None
        finally:
            self._answer = None
            self._let_go()

    def take(self, data: bytes) -> None:
        """What was typed while a question stands."""
        for byte in data:
            if self._answer is None or self._answer.done():
                return  # what follows the answer is not for the command either
            if byte in b"\r\n":
                line, self._line = bytes(self._line), bytearray()
                self._echo(b"\r\n")
                self._answer.set_result(read_answer(line, can_always=self._can_always))
            elif byte == 0x03:
                self._echo(b"^C\r\n")
                self._answer.set_result("deny")
            elif byte in b"\x7f\x08":
                if self._line:
                    self._line.pop()
                    self._echo(b"\x08 \x08")
            elif len(self._line) < MAX_LINE_BYTES:
                self._line.append(byte)
                self._echo(bytes([byte]) if 0x20 <= byte < 0x7F else b"?")

    def write(self, stream: str, data: bytes) -> None:
        """What the command writes: put out, or kept until the question is answered."""
        if not self.is_asking:
            self._write(stream, data)
        elif self._kept_bytes + len(data) <= MAX_KEPT_BYTES:
            self._kept.append((stream, data))
            self._kept_bytes += len(data)
        else:
            self._left_out += len(data)

    def _let_go(self) -> None:
        kept, self._kept, self._kept_bytes = self._kept, [], 0
        for stream, data in kept:
            self._write(stream, data)
        if self._left_out:
            self._say(f"vallum: {self._left_out} bytes that were written meanwhile are left out")
            self._left_out = 0

    def _echo(self, data: bytes) -> None:
        if self.is_raw:
            os.write(2, data)

    def _say(self, text: str, end: str = "\n") -> None:
        text += end
        click.echo(text.replace("\n", "\r\n") if self.is_raw else text, err=True, nl=False)
