"""The language spoken with a persistent shell inside a cell. Pure.

The shell reads its script from descriptor 3, one command at a time, and writes ``<nonce> <status>``
to descriptor 4 after each; the command itself sees neither descriptor. The status is the guest's
own word about itself, as every exit code of a shell is: a result for the agent, never evidence.

Not covered: a command that ends the shell (``exit``, ``exec``) ends the session; that is reported.
"""

from __future__ import annotations

import secrets

SHELLS = ("/bin/bash", "/bin/sh")


def make_argv(shell: str) -> list[bytes]:
    """Arguments that start ``shell`` reading descriptor 3; a pinned path, no start-up files."""
    quiet = [b"--norc", b"--noprofile"] if shell.endswith("bash") else []
    return [shell.encode(), *quiet, b"/dev/fd/3"]


def make_nonce() -> str:
    """A word that a command cannot have seen before it ran."""
    return secrets.token_hex(8)


def quote(text: str) -> bytes:
    """``text`` as one word of the shell."""
    return b"'" + text.encode("utf-8", "surrogateescape").replace(b"'", b"'\\''") + b"'"


def make_script(command: str, nonce: str) -> bytes:
    """Script that runs ``command`` in the shell itself, then reports its status under ``nonce``.

    ``command eval`` keeps a POSIX shell alive over a syntax error; descriptors 3 and 4 are closed for the command.
    """
    return b"command eval " + quote(command) + b" 3<&- 4>&-\nprintf '%s %s\\n' " + nonce.encode() + b' "$?" >&4\n'


def parse_status(buffer: bytes, nonce: str) -> int | None:
    """The status reported under ``nonce`` so far, None when it has not come.

    Other lines (of a child that kept descriptor 4, or forged) are ignored.
    """
    wanted = nonce.encode() + b" "
    for line in buffer.split(b"\n")[:-1]:
        if line.startswith(wanted):
            word = line[len(wanted) :].strip()
            if word.isdigit() and len(word) <= 3:
                return int(word)
    return None
