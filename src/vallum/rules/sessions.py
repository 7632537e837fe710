"""What an SSH session asks for, and which grants name it (RFC 4254, section 6). Pure.

Covered: a command counts as git's only in exactly the words that git's client writes, with the path quoted as it quotes
it, so that no shell at the server reads anything else out of it. Not covered: what a granted command does there;
``exec`` and ``shell`` are whatever the account at the server may do.
"""

from __future__ import annotations

import re
from typing import Literal

import msgspec

from vallum.core.text import show
from vallum.rules.grants import Rule
from vallum.rules.paths import match_path, normalise_path

SessionKind = Literal["exec", "shell", "sftp", "git-read", "git-write", "other"]

MAX_COMMAND = 8192
_GIT = re.compile(r"git[- ](upload-pack|upload-archive|receive-pack) '((?:[^'!\x00-\x1f\x7f]|'\\['!]')+)'")
_QUOTED = re.compile(r"'\\(['!])'")


class SessionFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One request of a guest inside SSH."""

    kind: SessionKind
    command: str = ""
    """The command, or the name of the subsystem; empty for a shell."""
    path: str | None = None
    """The repository, for git, without quotes."""
    terminal: bool = False

    def describe(self) -> str:
        """What it asks for, in a few words."""
        return f"{self.kind} {show(self.command, 400)}".strip()


def read_session(command: str | None, subsystem: str | None, *, terminal: bool = False) -> SessionFacts:
    """What ``exec`` (command), ``subsystem`` or ``shell`` (neither) asks for."""
    if subsystem is not None:
        return SessionFacts(kind="sftp" if subsystem == "sftp" else "other", command=subsystem, terminal=terminal)
    if command is None:
        return SessionFacts(kind="shell", terminal=terminal)
    if len(command) > MAX_COMMAND or "\x00" in command:
        return SessionFacts(kind="other", command=command[:MAX_COMMAND], terminal=terminal)
    found = _GIT.fullmatch(command)
    if found is None:
        return SessionFacts(kind="exec", command=command, terminal=terminal)
    path = _QUOTED.sub(r"\1", found[2])
    if path.startswith("-"):
        return SessionFacts(kind="exec", command=command, terminal=terminal)  # git at the server would read an option
    kind: SessionKind = "git-write" if found[1] == "receive-pack" else "git-read"
    return SessionFacts(kind=kind, command=command, path=path, terminal=terminal)


def kinds_of(rule: Rule) -> frozenset[SessionKind]:
    """What a grant lets sessions ask for. None where its terms are about HTTP alone."""
    if rule.methods is not None or rule.tools is not None or rule.websocket or rule.service != "forward":
        return frozenset()
    kinds: set[SessionKind] = set(rule.ssh)
    if rule.git:
        kinds |= {"git-read", "git-write"} if rule.git == "write" else {"git-read"}
    if "git-write" in kinds:
        kinds.add("git-read")
    return frozenset(kinds)


def denies_session(rule: Rule, session: SessionFacts) -> bool:
    """Whether a denial of git is about this session: of pushes, or of fetches, too. What cannot be told counts as yes."""
    if not rule.git or session.kind not in ({"git-write"} if rule.git == "write" else {"git-read", "git-write"}):
        return False
    path = "/" + (session.path or "").lstrip("/")
    return rule.paths is None or normalise_path(path) != path or any(match_path(p, path) for p in rule.paths)


def covers_session(rule: Rule, session: SessionFacts) -> bool:
    """Whether the grant is for this session. ``exec`` is for every command, ``paths`` for git's repositories only."""
    kinds = kinds_of(rule)
    is_git = session.path is not None
    if rule.paths is None:
        return session.kind in kinds or (is_git and "exec" in kinds)
    if session.path is None or session.kind not in kinds:
        return False
    path = "/" + session.path.lstrip("/")
    # Nothing is decoded at the server, so only a path that stands for itself can be judged.
    return normalise_path(path) == path and any(match_path(pattern, path) for pattern in rule.paths)
