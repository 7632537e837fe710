"""What a command line asks for: which program it is, and what ``ssh`` would understand. Pure.

Covered: clustered flags (``-fNR``), values that follow or stick to their flag, options behind the destination,
``-o`` in every spelling ssh accepts, interpreters and their script.
Not covered: configuration files (``ssh -F``, ``~/.ssh/config``) and what a program does later; the gateway sees that.
Source: ssh.c and readconf.c of OpenSSH 9.2.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from vallum.core.events import Process

_SSH_WITH_VALUE = frozenset("bceilmopBDEFIJLOPQRSwW")
_INTERPRETERS = re.compile(r"(python|pypy|perl|ruby|node|nodejs|bun|deno|php|lua|bash|sh|dash|zsh|ksh|busybox)[0-9.]*")
_WITH_VALUE = {"python": "WXQ", "pypy": "WX", "node": "r", "bash": "O", "ruby": "IrE", "perl": "IMm"}
# fmt: off
_READERS = frozenset({
    "grep", "egrep", "fgrep", "rg", "ag", "ack", "sed", "awk", "gawk", "mawk", "cat", "less", "more", "head",
    "tail", "echo", "printf", "find", "fd", "git", "vim", "vi", "nvim", "nano", "emacs", "diff", "wc", "sort",
    "strings", "file", "ls", "man", "apropos", "cut", "tr", "jq",
})
# fmt: on
_SYSTEM = ("/usr/bin/", "/bin/", "/usr/local/bin/", "/usr/lib/git-core/")


def base(path: str) -> str:
    """Last part of a path in lower case, without the kernel's mark of a deleted file or a login shell's dash."""
    return path.removesuffix(" (deleted)").rsplit("/", 1)[-1].removeprefix("-").lower()


def names(process: Process) -> list[str]:
    """What a process is called, the kernel's word first: its file, argv[0], and the script or module of an interpreter."""
    found = [base(process.exe)] if process.exe else []
    if process.argv:
        found.append(base(process.argv[0]))
        script = script_of(process)
        if script:
            found.append(base(script))
    return [name for name in dict.fromkeys(found) if name]


def script_of(process: Process) -> str | None:
    """Path of the script, or name of the module, that an interpreter runs; None for ``-c`` and for other programs."""
    kind = _INTERPRETERS.fullmatch(base(process.exe or process.argv[0]) if process.argv else "")
    if kind is None:
        return None
    takes = _WITH_VALUE.get(kind.group(1), "")
    arguments = iter(process.argv[1:])
    for argument in arguments:
        if argument == "-m" and kind.group(1) in ("python", "pypy"):
            return next(arguments, None)
        if argument in ("-c", "-e", "--eval", "-"):
            return None
        if not argument.startswith(("-", "+")):
            return argument
        if len(argument) == 2 and argument[1] in takes:
            next(arguments, None)
    return None


def is_reader(process: Process) -> bool:
    """Whether it is a program that only reads or shows text, from a directory of the system.

    By the file that the kernel says is executed: a miner called ``/tmp/grep`` is none.
    """
    exe = process.exe
    return base(exe) in _READERS and exe.startswith(_SYSTEM)


@dataclass(frozen=True)
class SshCall:
    """What ssh was asked to do."""

    destination: str | None
    flags: str
    """Flags without a value, in order."""
    values: dict[str, list[str]] = field(default_factory=dict)
    """Flag -> its values, in order."""
    options: dict[str, list[str]] = field(default_factory=dict)
    """``-o`` options by lower-case keyword."""

    def asks(self, flag: str, *keywords: str) -> bool:
        """Whether a forward is asked for by its flag or by one of its ``-o`` keywords (``no`` and ``none`` ask for nothing)."""
        said = [value for keyword in keywords for value in self.options.get(keyword, ())]
        return flag in self.values or any(value.lower() not in ("no", "none", "") for value in said)


def parse_ssh(argv: Sequence[str]) -> SshCall:
    """Read a command line as ssh reads it: options, destination, more options; what follows is the remote command's."""
    flags: list[str] = []
    values: dict[str, list[str]] = {}
    destination: str | None = None
    at, is_over = 1, False
    while at < len(argv):
        argument = argv[at]
        at += 1
        if argument == "--" and not is_over:
            is_over = True
        elif is_over or not argument.startswith("-") or argument == "-":
            if destination is not None:
                break  # the remote command
            destination = argument
            if is_over:
                break
        else:
            at = _take_cluster(argument, argv, at, flags, values)
    options: dict[str, list[str]] = {}
    for text in values.get("o", ()):
        keyword, _, value = _split_option(text)
        options.setdefault(keyword, []).append(value)
    return SshCall(destination, "".join(flags), values, options)


def _take_cluster(argument: str, argv: Sequence[str], at: int, flags: list[str], values: dict[str, list[str]]) -> int:
    """One argument such as ``-fNR`` or ``-p22``; the place behind its value."""
    for place, flag in enumerate(argument[1:], 2):
        if flag not in _SSH_WITH_VALUE:
            flags.append(flag)
            continue
        value = argument[place:]
        if not value and at < len(argv):
            value, at = argv[at], at + 1
        values.setdefault(flag, []).append(value)
        break
    return at


def _split_option(text: str) -> tuple[str, str, str]:
    match = re.match(r"\s*\"?([A-Za-z0-9]+)\"?\s*(=?)\s*(.*)", text, re.DOTALL)
    return (match.group(1).lower(), match.group(2), match.group(3).strip().strip('"')) if match else ("", "", "")
