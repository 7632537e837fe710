"""Images: what of a host a cell gets to see, and what it must never."""

import os
import socket
import stat
from pathlib import Path

import pytest

from vallum.core.errors import InvalidInput
from vallum.sandbox.base import Image, Layer, Owner
from vallum.sandbox.images.host import collect, resolve_host
from vallum.sandbox.images.mounts import choose_owner, find_refusal, parse_mount, with_mounts
from vallum.sandbox.images.resolve import resolve
from vallum.sandbox.images.skeleton import (
    add_parents,
    digest_tree,
    make_dir,
    make_file,
    make_link,
    materialise,
    read_tree,
)

CANARY = "CANARY-0b5e1e55"
KEY = f"-----BEGIN RSA PRIVATE KEY-----\n{CANARY}\n-----END RSA PRIVATE KEY-----\n"


@pytest.fixture
def host(tmp_path):
    """A host with a secret in every place that somebody ever kept one in."""
    root = tmp_path / "host"
    public = {
        "etc/ssl/certs/ca-certificates.crt": "public",
        "etc/ld.so.cache": "cache",
        "etc/mime.types": "types",
        "etc/java-17-openjdk/net.properties": "x=y",
        "usr/bin/true": "",
        "usr/share/ca-certificates/one.crt": "one",
    }
    secret = [
        "etc/shadow", "etc/gshadow", "etc/passwd", "etc/group", "etc/hosts", "etc/hostname", "etc/resolv.conf",
        "etc/profile", "etc/profile.d/token.sh", "etc/bash.bashrc", "etc/environment", "etc/gitconfig", "etc/pip.conf",
        "etc/npmrc", "etc/apt/auth.conf", "etc/apt/sources.list", "etc/ssh/ssh_host_rsa_key", "etc/ssl/private/host.key",
        "etc/sudoers", "etc/fstab", "etc/krb5.keytab", "etc/machine-id", "etc/ldap/ldap.conf", "etc/wgetrc",
        "etc/java-17-openjdk/management/jmxremote.password", "etc/fonts/.git/config", "etc/perl/secret.pl",
        "etc/ssl/certs/host.key", "etc/python3/credentials", "root/.ssh/id_rsa", "home/ann/.aws/credentials",
        "var/lib/x/db", "opt/app/.env", "srv/www/key", "run/secrets/token", "tmp/x", "boot/grub.cfg", "mnt/x", "work/x",
    ]  # fmt: skip
    for path, text in public.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    for path in secret:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(CANARY)
    (root / "etc/ssl/certs/mine.pem").write_text(KEY)
    (root / "etc/services").write_text(CANARY)
    (root / "etc/services").chmod(0o640)
    (root / "etc/terminfo").mkdir()
    (root / "etc/terminfo/x").write_text(CANARY)
    (root / "etc/terminfo").chmod(0o700)
    (root / "etc/protocols").symlink_to("../root/.ssh/id_rsa")
    (root / "etc/ssl/certs/one.pem").symlink_to("/usr/share/ca-certificates/one.crt")
    (root / "etc/localtime").symlink_to("/usr/share/zoneinfo/UTC")
    (root / "etc/pki").symlink_to("../root")
    (root / "root/tls/certs").mkdir(parents=True)
    (root / "root/tls/certs/x").write_text(CANARY)
    os.mkfifo(root / "etc/magic")
    (root / "bin").symlink_to("usr/bin")
    (root / "lib").mkdir()
    return root


def test_no_canary_of_the_host_reaches_the_image(host, tmp_path):
    image = resolve_host(images_dir=tmp_path / "images", rootless=True, root=host)
    skeleton = Path(image.layers[0].lowers[0])
    for path in skeleton.rglob("*"):
        mode = path.lstat().st_mode
        assert stat.S_ISDIR(mode) or stat.S_ISREG(mode) or stat.S_ISLNK(mode), path
        if stat.S_ISREG(mode):
            assert CANARY not in path.read_text(errors="replace"), path
    for name in (
        "home/ann",
        "opt/app",
        "var/lib/x",
        "root/.ssh",
        "etc/shadow",
        "etc/ssh",
        "etc/ssl/private",
        "etc/apt",
    ):
        assert not (skeleton / name).exists()


def test_what_programs_need_is_there(host):
    tree = collect(host, shell="/bin/bash", hostname="cell")
    assert tree["etc/ssl/certs/ca-certificates.crt"].data == b"public"
    assert tree["etc/java-17-openjdk/net.properties"].data == b"x=y"
    assert tree["bin"] == make_link("usr/bin")
    assert tree["lib"] == make_dir()
    assert b"agent:*:1000:1000:agent:/home/agent:/bin/bash\n" in tree["etc/passwd"].data
    assert b"nameserver 198.18.0.53\n" in tree["etc/resolv.conf"].data
    assert (tree["tmp"].mode, tree["root"].mode, tree["home/agent"].uid) == (0o1777, 0o700, 1000)
    for place in ("usr", "proc", "dev", "sys", "run", "var/tmp", "work", "mnt", "srv", "opt"):
        assert tree[place].kind == "dir"


def test_links_stay_links_and_nothing_behind_them_is_read(host):
    tree = collect(host, shell="/bin/sh", hostname="cell")
    assert tree["etc/ssl/certs/one.pem"] == make_link("/usr/share/ca-certificates/one.crt")
    assert tree["etc/protocols"] == make_link("../root/.ssh/id_rsa")
    assert not any(path.startswith("etc/pki") for path in tree)
    assert "etc/magic" not in tree, "a pipe is nothing to copy, and must not hang"


def test_the_same_host_is_prepared_once_and_a_changed_copy_is_not_used(host, tmp_path):
    images = tmp_path / "images"
    first = resolve_host(images_dir=images, rootless=True, root=host)
    assert resolve_host(images_dir=images, rootless=True, root=host) == first
    assert images.stat().st_mode & 0o777 == 0o700
    skeleton = Path(first.layers[0].lowers[0])
    (skeleton / "etc/hosts").write_text("6.6.6.6 localhost\n")
    tree = collect(host, shell="/bin/sh", hostname="cell")
    again = materialise(tree, images, "host-rootless", owners=False)
    assert again == skeleton
    assert "6.6.6.6" not in (skeleton / "etc/hosts").read_text()
    (host / "etc/mime.types").write_text("other")
    assert resolve_host(images_dir=images, rootless=True, root=host).digest != first.digest
    assert not list(images.glob(".new-*"))


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to the agent's uid")
def test_as_root_the_agent_owns_its_home(host, tmp_path):
    image = resolve_host(images_dir=tmp_path / "images", rootless=False, root=host)
    skeleton = Path(image.layers[0].lowers[0])
    assert (skeleton / "home/agent").stat().st_uid == 1000
    assert (skeleton / "etc/passwd").stat().st_uid == 0
    assert digest_tree(read_tree(skeleton)) == image.digest


def test_separate_directories_and_configuration_below_usr(host, tmp_path):
    (host / "usr/local/etc").mkdir(parents=True)
    (host / "usr/local/etc/app.conf").write_text(CANARY)
    image = resolve_host(images_dir=tmp_path / "images", rootless=True, root=host)
    assert [layer.at for layer in image.layers] == ["/", "/usr", "/lib", "/usr/local/etc"]
    assert list(Path(image.layers[3].lowers[0]).iterdir()) == []


def test_this_host_can_be_resolved_and_its_environment_is_clean(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", CANARY)
    image = resolve("host", images_dir=tmp_path, rootless=os.geteuid() != 0)
    assert set(image.environ) == {"PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG"}
    assert image.user == "agent"
    assert image.digest.startswith("sha256:")


def test_digest_depends_on_everything_that_is_seen():
    base = add_parents({"a/b": make_file("x")})
    for other in (
        {"a/b": make_file("y")},
        {"a/b": make_file("x", 0o600)},
        {"a/c": make_file("x")},
        {"a/b": make_link("x")},
    ):
        assert digest_tree(add_parents(other)) != digest_tree(base)


def test_dir_images(tmp_path):
    root = tmp_path / "rootfs"
    root.mkdir()
    image = resolve(f"dir:{root}", images_dir=tmp_path / "images", rootless=False)
    assert image.layers == [Layer(at="/", lowers=[str(root)])]
    assert (image.user, image.workdir) == ("0:0", "/")
    (tmp_path / "link").symlink_to(root)
    assert resolve(f"dir:{tmp_path}/link", images_dir=tmp_path, rootless=True).digest == image.digest


@pytest.mark.parametrize(
    ("ref", "says"),
    [
        ("dir:/nonexistent-5e1f", "does not exist"),
        ("dir:relative", "absolute"),
        ("dir:/etc/passwd", "not a directory"),
        ("dir:/", "too much of the host"),
        ("dir:/proc/self", "system"),
        ("oci:alpine", "absolute path"),
        ("docker:alpine", "write docker://"),
        ("", "not known"),
        ("windows", "not known"),
    ],
)
def test_unusable_references_are_one_sentence(ref, says, tmp_path):
    with pytest.raises(InvalidInput, match=says) as error:
        resolve(ref, images_dir=tmp_path, rootless=True)
    assert "\n" not in str(error.value)


IMAGE = Image(ref="x", digest="sha256:0", layers=[Layer(at="/", lowers=["/x"])], environ={})


@pytest.mark.parametrize(
    ("user", "guest"),
    [
        ("agent", (1000, 1000)),
        ("root", (0, 0)),
        ("7", (7, 7)),
        ("7:8", (7, 8)),
        ("node", (1000, 1000)),
        ("65535", None),
    ],
)
def test_the_owner_of_a_mount_becomes_the_user_of_the_cell(user, guest):
    assert choose_owner((70000, 5), user) == (Owner(disk=(70000, 5), guest=guest) if guest else None)


def test_mounts_are_copy_on_write_unless_read_only(tmp_path):
    image = with_mounts(IMAGE, [f"{tmp_path}:/data/inner", f"{tmp_path}:/data:ro"])
    owner = Owner(disk=(tmp_path.stat().st_uid, tmp_path.stat().st_gid), guest=(1000, 1000))
    assert image.layers[1:] == [
        Layer(at="/data", lowers=[str(tmp_path)], writable=False, owner=owner),
        Layer(at="/data/inner", lowers=[str(tmp_path)], writable=True, owner=owner),
    ]
    assert IMAGE.layers == [Layer(at="/", lowers=["/x"])]


@pytest.mark.parametrize(
    "text",
    ["", ":", "/a", "a:/b", "/a:b", "/a:/b:rwx", "/a:/b:ro:ro", "/a/../b:/c", "/a:/b/../../proc", "/a:/", "/a:/proc/x", "/a:/dev",
     "/a:///", "/a\n:/b", "/a:/./sys"],
)  # fmt: skip
def test_malformed_mounts_are_refused(text):
    with pytest.raises(InvalidInput):
        parse_mount(text)


def test_refused_places_of_the_host(tmp_path):
    unix = socket.socket(socket.AF_UNIX)
    unix.bind(str(tmp_path / "sock"))
    (tmp_path / "file").write_text("x")
    (tmp_path / "to-etc").symlink_to("/etc")
    (tmp_path / ".ssh").mkdir()
    for source in ("/", "/etc", "/proc/1", "/root", "/nonexistent-5e1f", tmp_path / "sock", tmp_path / "file",
                   tmp_path / "to-etc", tmp_path / "to-etc/ssl", tmp_path / ".ssh", "/usr/../etc"):  # fmt: skip
        with pytest.raises(InvalidInput):
            with_mounts(IMAGE, [f"{source}:/data"])
    unix.close()
    for place in (tmp_path, tmp_path / "cells"):
        with pytest.raises(InvalidInput, match="node"):
            with_mounts(IMAGE, [f"{tmp_path}:/data"], refuse=[place])
    assert with_mounts(IMAGE, [f"{tmp_path}:/data"], refuse=[Path("/elsewhere")]).layers[1].at == "/data"


def test_two_things_at_one_place_are_refused(tmp_path):
    with pytest.raises(InvalidInput, match="already"):
        with_mounts(IMAGE, [f"{tmp_path}:/data", f"{tmp_path}:/data/"])


def test_refusal_is_by_path_component():
    assert find_refusal("/etcetera") is None
    assert find_refusal("/home/ann/project") is None
    assert find_refusal("/home/ann/.aws/x") is not None
    assert find_refusal("/run/user/0") is not None
