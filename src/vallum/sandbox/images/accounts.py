"""Files of /etc that are written, not copied: who exists in a cell, how names are found, what shells start with."""

from __future__ import annotations

AGENT_ID = 1000
"""Uid and gid of the user that commands run as."""

AGENT_HOME = "/home/agent"

RESOLVER = "198.18.0.53"
"""Where a cell asks for names: an address of RFC 2544 that nobody routes; in a cell every address is local."""

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

PAM = """# Root may become anyone of this cell; nobody else may, since no password matches.
auth sufficient pam_rootok.so
auth required pam_deny.so
account required pam_permit.so
password required pam_deny.so
session required pam_permit.so
"""
"""``/etc/pam.d/other``, for every program: the host's own modules are of no use inside, and ``adduser`` needs some answer."""

_SYSTEM = (
    ("daemon", 1, "/usr/sbin"),
    ("bin", 2, "/bin"),
    ("sys", 3, "/dev"),
    ("games", 5, "/usr/games"),
    ("man", 6, "/var/cache/man"),
    ("lp", 7, "/var/spool/lpd"),
    ("mail", 8, "/var/mail"),
    ("news", 9, "/var/spool/news"),
    ("uucp", 10, "/var/spool/uucp"),
    ("proxy", 13, "/bin"),
    ("www-data", 33, "/var/www"),
    ("backup", 34, "/var/backups"),
    ("list", 38, "/var/list"),
    ("irc", 39, "/run/ircd"),
)

_GROUPS = (
    ("adm", 4),
    ("tty", 5),
    ("disk", 6),
    ("kmem", 15),
    ("dialout", 20),
    ("sudo", 27),
    ("audio", 29),
    ("src", 40),
    ("shadow", 42),
    ("utmp", 43),
    ("video", 44),
    ("staff", 50),
    ("users", 100),
)


def write_passwd(shell: str) -> str:
    """``/etc/passwd``: root, agent, and the ids that every Debian and most others share. No password can match."""
    lines = [f"root:*:0:0:root:/root:{shell}"]
    lines += [f"{name}:*:{uid}:{uid}:{name}:{home}:/usr/sbin/nologin" for name, uid, home in _SYSTEM]
    lines += [
        "_apt:*:42:65534::/nonexistent:/usr/sbin/nologin",
        f"agent:*:{AGENT_ID}:{AGENT_ID}:agent:{AGENT_HOME}:{shell}",
        "nobody:*:65534:65534:nobody:/nonexistent:/usr/sbin/nologin",
    ]
    return "\n".join(lines) + "\n"


def write_group() -> str:
    """``/etc/group``. The agent is a member of its own group only."""
    groups = {"root": 0, "agent": AGENT_ID, "nogroup": 65534} | dict(_GROUPS)
    groups |= {name: uid for name, uid, _ in _SYSTEM if name != "games"} | {"games": 60}
    return "".join(f"{name}:*:{gid}:\n" for name, gid in sorted(groups.items(), key=lambda item: item[1]))


def write_hosts(hostname: str) -> str:
    """``/etc/hosts``."""
    return f"127.0.0.1\tlocalhost\n127.0.1.1\t{hostname}\n::1\tlocalhost ip6-localhost ip6-loopback\n"


NSSWITCH = """\
passwd: files
group: files
shadow: files
hosts: files dns
networks: files
protocols: files
services: files
ethers: files
rpc: files
"""

RESOLV_CONF = f"nameserver {RESOLVER}\noptions attempts:1 timeout:3\n"

PROFILE = f"""\
# For login shells: nothing of the host's, so nothing that somebody exported there.
PATH={PATH}
export PATH
umask 022
"""

BASHRC = """\
# For interactive shells.
[ -z "$PS1" ] && return
PS1='\\u@\\h:\\w\\$ '
"""


def make_environ(shell: str) -> dict[str, str]:
    """The environment of commands: nothing is inherited."""
    return {
        "PATH": PATH,
        "HOME": AGENT_HOME,
        "USER": "agent",
        "LOGNAME": "agent",
        "SHELL": shell,
        "LANG": "C.UTF-8",
    }
