"""The curated host tree: the host's programs, and of its configuration only what is listed here.

Covered: nothing of the host's /home, /root, /var, /opt, /srv, /mnt, /media, /run, /tmp, /boot or /work is
seen; of /etc only the list below, and of that only regular files that every host user may read and that
hold no private key, directories of such, and links as links (a link is never followed while copying).
Users, names, resolver and shell start-up files are written, not copied. ``/usr/local/etc`` is hidden.
Not covered: what an administrator put readable into the rest of /usr (all of it is shown read-only), and
secrets in the listed files that do not look like one.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from vallum.sandbox.base import Image, Layer
from vallum.sandbox.images import accounts
from vallum.sandbox.images.skeleton import (
    Entry,
    Tree,
    add_parents,
    digest_tree,
    make_dir,
    make_file,
    make_link,
    materialise,
)

MAX_FILE_BYTES = 8 * 1024 * 1024

ETC = (
    "adduser.conf",
    "alternatives",
    "bindresvport.blacklist",
    "ca-certificates",
    "ca-certificates.conf",
    "crypto-policies",
    "debian_version",
    "deluser.conf",
    "fonts",
    "gai.conf",
    "groff",
    "host.conf",
    "inputrc",
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "localtime",
    "locale.alias",
    "login.defs",
    "lsb-release",
    "magic",
    "magic.mime",
    "mailcap",
    "mime.types",
    "networks",
    "os-release",
    "perl",
    "pki/ca-trust/extracted",
    "pki/tls/cert.pem",
    "pki/tls/certs",
    "protocols",
    "python3",
    "rpc",
    "services",
    "ssl/cert.pem",
    "ssl/certs",
    "ssl/openssl.cnf",
    "terminfo",
    "timezone",
    "vim",
    "xattr.conf",
)
"""Entries of /etc that are copied when they are there."""

ETC_PATTERNS = ("java-[0-9]*-openjdk*", "python3.[0-9]*")

_NEVER = re.compile(
    r"shadow|passw|secret|credential|private|token|netrc|htpasswd|\.key$|\.p12$|\.pfx$|\.jks$|id_(rsa|dsa|ecdsa|ed25519)|^\.git|^\.ssh",
    re.IGNORECASE,
)
"""Names that are not copied wherever they are."""

_PRIVATE_KEY = re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY")

_USR_LINKS = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")

_prepared: dict[tuple[object, ...], Image] = {}
"""Images this process has prepared: collecting takes a tenth of a second, most of it some thousand links."""

_HIDDEN = ("/usr/local/etc",)
"""Below /usr, but configuration."""


def resolve_host(*, images_dir: Path, rootless: bool, root: Path = Path("/"), hostname: str = "cell") -> Image:
    """Prepare the curated host tree. Content-addressed: the same host gives the same directory, shared by cells.

    Args:
        images_dir: where prepared trees are kept, 0700.
        rootless: an ordinary user makes it: all of it is that user's, whom the guest sees as ``agent``.
        root: the host's tree.
        hostname: for ``/etc/hosts``.

    Raises:
        SandboxError: it cannot be written.
    """
    key = (str(images_dir), rootless, str(root), hostname, _fingerprint(root))
    if (known := _prepared.get(key)) and all(Path(layer.lowers[0]).is_dir() for layer in known.layers):
        return known
    shell = "/bin/bash" if (root / "bin/bash").exists() else "/bin/sh"
    tree = collect(root, shell=shell, hostname=hostname)
    name = "host-rootless" if rootless else "host"
    skeleton = materialise(tree, images_dir, name, owners=not rootless)
    layers = [Layer(at="/", lowers=[str(skeleton)]), Layer(at="/usr", lowers=[str(root / "usr")])]
    layers += [Layer(at=f"/{name}", lowers=[str(root / name)]) for name in list_split(root)]
    hidden = [path for path in _HIDDEN if (root / path[1:]).is_dir() and any((root / path[1:]).iterdir())]
    if hidden:
        empty = materialise({".": make_dir()}, images_dir, "empty", owners=not rootless)
        layers += [Layer(at=path, lowers=[str(empty)]) for path in hidden]
    environ = accounts.make_environ(shell)
    image = Image(ref="host", digest=digest_tree(tree), layers=layers, environ=environ, user="agent")
    _prepared[key] = image
    return image


def _fingerprint(root: Path) -> tuple[tuple[int, int], ...]:
    """What tells, for half a millisecond, that the host's configuration is the one read before (not for changes deep inside)."""
    marks = []
    for name in ("", *ETC):
        try:
            found = (root / "etc" / name).lstat()
        except OSError:
            continue
        marks.append((found.st_ino, found.st_mtime_ns))
    return tuple(marks)


def collect(root: Path, *, shell: str, hostname: str) -> Tree:
    """The skeleton as a tree: reads the host, writes nothing."""
    tree: Tree = {
        "etc": make_dir(),
        "etc/skel": make_dir(),
        "home/agent": make_dir(uid=accounts.AGENT_ID),
        "work": make_dir(uid=accounts.AGENT_ID),
        "root": make_dir(0o700),
        "tmp": make_dir(0o1777),
        "var/tmp": make_dir(0o1777),
        "var/run": make_link("/run"),
        "var/lock": make_link("/run/lock"),
        "run/lock": make_dir(0o1777),
    }
    for path in ("usr", "proc", "dev", "sys", "srv", "mnt", "opt", "media", "var/lib", "var/cache", "var/log"):
        tree[path] = make_dir()
    for name in _USR_LINKS:
        source = root / name
        if source.is_symlink():
            tree[name] = make_link(str(source.readlink()))
        elif source.is_dir():
            tree[name] = make_dir()
    tree |= collect_etc(root / "etc")
    tree |= {
        "etc/passwd": make_file(accounts.write_passwd(shell)),
        "etc/group": make_file(accounts.write_group()),
        "etc/hosts": make_file(accounts.write_hosts(hostname)),
        "etc/hostname": make_file(hostname + "\n"),
        "etc/resolv.conf": make_file(accounts.RESOLV_CONF),
        "etc/nsswitch.conf": make_file(accounts.NSSWITCH),
        "etc/profile": make_file(accounts.PROFILE),
        "etc/bash.bashrc": make_file(accounts.BASHRC),
        "etc/shells": make_file("/bin/sh\n/bin/bash\n"),
        "etc/pam.d/other": make_file(accounts.PAM),
        "etc/mtab": make_link("/proc/self/mounts"),
    }
    return add_parents(tree)


def list_split(root: Path) -> list[str]:
    """Which of /bin, /sbin, /lib* are directories of their own here (not links into /usr), and are shown as such."""
    return [name for name in _USR_LINKS if (root / name).is_dir() and not (root / name).is_symlink()]


def collect_etc(etc: Path) -> Tree:
    """What of the host's /etc is shown, by the list above."""
    tree: Tree = {}
    names = {*ETC, *(path.name for pattern in ETC_PATTERNS for path in etc.glob(pattern))}
    for name in sorted(names):
        # A parent that is a link could lead anywhere: then the entry is left out.
        if not any((etc / parent).is_symlink() for parent in list(Path(name).parents)[:-1]):
            _collect(etc / name, f"etc/{name}", tree)
    return tree


def _collect(source: Path, path: str, tree: Tree) -> None:
    """Add ``source``, and what is below it, to ``tree``."""
    try:
        found = source.lstat()
    except OSError:
        return
    if stat.S_ISLNK(found.st_mode):
        tree[path] = make_link(str(source.readlink()))
    elif _NEVER.search(source.name):
        return
    elif stat.S_ISDIR(found.st_mode) and found.st_mode & 0o005 == 0o005:
        tree[path] = make_dir()
        for child in sorted(source.iterdir()):
            _collect(child, f"{path}/{child.name}", tree)
    elif stat.S_ISREG(found.st_mode):
        entry = read_public(source)
        if entry is not None:
            tree[path] = entry


def read_public(source: Path) -> Entry | None:
    """A regular file that every host user may read, is not huge and holds no private key; None for anything else."""
    try:
        # The check is on the open file, so that nothing can be swapped in between.
        fd = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    with os.fdopen(fd, "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode) or not found.st_mode & 0o004 or found.st_size > MAX_FILE_BYTES:
            return None
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES or _PRIVATE_KEY.search(data):
        return None
    return make_file(data, 0o755 if found.st_mode & 0o001 else 0o644)
