"""Images that trust one more authority: found wherever a distribution keeps its certificates, never outside the image."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from vallum.core.errors import SandboxError
from vallum.node.authority import make_authority
from vallum.node.trust import Trust
from vallum.sandbox.base import Image, Layer
from vallum.sandbox.images.trust import (
    BUNDLE,
    CERTIFICATE,
    JAVA_STORE,
    ImageView,
    has_positive_serial,
    hash_subject,
    make_java_store,
    trust_authority,
)
from vallum.testing.certificates import PrivateAuthority

CA = make_authority("r1").certificate_pem
OWN = PrivateAuthority("image's own").certificate_pem
ROOTS = PrivateAuthority("of a company").certificate_pem


def make(root: Path, files: dict[str, bytes | str]) -> str:
    """A tree: bytes are files, text is a link."""
    root.mkdir(exist_ok=True)
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            path.symlink_to(content)
        else:
            path.write_bytes(content)
    return str(root)


def image(*lowers: str, layers: list[Layer] | None = None, **fields: object) -> Image:
    found = layers or [Layer(at="/", lowers=list(lowers), **fields)]
    return Image(ref="dir:x", digest="sha256:x", layers=found, environ={"LANG": "C"}, user="0", workdir="/")


def added(before: Image, after: Image) -> dict[str, bytes]:
    """Path in the guest -> content of what was put under the image."""
    found = {}
    for old, new in zip(before.layers, after.layers, strict=True):
        for lower in set(new.lowers) - set(old.lowers):
            for path in Path(lower).rglob("*"):
                if path.is_file():
                    found[str(Path(new.at) / path.relative_to(lower))] = path.read_bytes()
    return found


def count(data: bytes) -> int:
    return data.count(b"BEGIN CERTIFICATE")


def test_debian(tmp_path: Path) -> None:
    before = image(
        make(tmp_path / "i", {"etc/ssl/certs/ca-certificates.crt": OWN, "etc/ssl/certs/java/cacerts": b"old"})
    )
    after = trust_authority(before, CA, ROOTS, tmp_path / "t")
    files = added(before, after)
    hashed = f"/etc/ssl/certs/{hash_subject(CA)}.0"
    assert set(files) == {
        *(CERTIFICATE, BUNDLE, "/etc/ssl/certs/ca-certificates.crt", "/etc/ssl/certs/java/cacerts", hashed),
    }
    assert files[BUNDLE] == files["/etc/ssl/certs/ca-certificates.crt"]
    assert all(pem.strip() in files[BUNDLE] for pem in (OWN, ROOTS, CA))
    assert files[CERTIFICATE] == files[hashed] == CA
    assert after.environ["SSL_CERT_FILE"] == BUNDLE
    assert after.environ["NODE_EXTRA_CA_CERTS"] == CERTIFICATE
    assert after.environ["LANG"] == "C"
    assert "JAVA_TOOL_OPTIONS" not in after.environ  # it would show in what every Java program prints
    assert (tmp_path / "i/etc/ssl/certs/ca-certificates.crt").read_bytes() == OWN
    assert after.digest == before.digest


def test_fedora_through_links(tmp_path: Path) -> None:
    before = image(
        make(
            tmp_path / "i",
            {
                "etc/ssl/certs": "../pki/tls/certs",
                "etc/pki/tls/certs/ca-bundle.crt": "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
                "etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem": OWN,
            },
        )
    )
    files = added(before, trust_authority(before, CA, b"", tmp_path / "t"))
    assert count(files["/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem"]) == 2
    assert "/etc/pki/tls/certs/ca-bundle.crt" not in files  # still a link to it
    assert f"/etc/pki/tls/certs/{hash_subject(CA)}.0" in files


def test_an_image_without_certificates(tmp_path: Path) -> None:
    before = image(make(tmp_path / "i", {"bin/sh": b""}))
    after = trust_authority(before, CA, ROOTS, tmp_path / "t")
    files = added(before, after)
    assert count(files["/etc/ssl/certs/ca-certificates.crt"]) == 2
    assert JAVA_STORE in files
    assert JAVA_STORE in after.environ["JAVA_TOOL_OPTIONS"]


def test_links_lead_nowhere_outside(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"host's")
    lower = make(
        tmp_path / "i",
        {
            "etc/ssl/certs/ca-certificates.crt": str(tmp_path / "secret"),
            "etc/ssl/cert.pem": "../../../../../.." + str(tmp_path / "secret"),
            "etc/pki": "/etc/pki",
            "etc/ssl/ca-bundle.pem": "ca-bundle.pem",
        },
    )
    before = image(lower)
    assert ImageView(before.layers).find("/etc/pki/tls/certs/ca-bundle.crt") is None
    files = added(before, trust_authority(before, CA, b"", tmp_path / "t"))
    assert not any(b"host's" in data for data in files.values())
    assert (tmp_path / "secret").read_bytes() == b"host's"
    assert "/etc/ssl/certs/ca-certificates.crt" not in files  # a link to nothing stays what it is


def test_what_an_upper_layer_hides_is_hidden(tmp_path: Path) -> None:
    under = make(tmp_path / "under", {"etc/ssl/certs/ca-certificates.crt": OWN})
    over = make(tmp_path / "over", {"etc/ssl/certs/ca-certificates.crt": ROOTS})
    assert (
        ROOTS.strip() in added(image(over, under), trust_authority(image(over, under), CA, b"", tmp_path / "t"))[BUNDLE]
    )
    plain = make(tmp_path / "plain", {"etc": b"a file"})
    assert ImageView(image(plain, under).layers).find("/etc/ssl/certs/ca-certificates.crt") is None
    opaque = make(tmp_path / "opaque", {"etc/x": b""})
    try:
        os.setxattr(f"{opaque}/etc", "user.overlay.opaque", b"y")
    except OSError:
        pytest.skip("no extended attributes here")
    assert ImageView(image(opaque, under).layers).find("/etc/ssl/certs/ca-certificates.crt") is None


@pytest.mark.root
def test_a_whiteout_hides(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root: device nodes")
    under = make(tmp_path / "under", {"etc/ssl/certs/ca-certificates.crt": OWN})
    over = make(tmp_path / "over", {"etc/ssl/certs/x": b""})
    os.mknod(f"{over}/etc/ssl/certs/ca-certificates.crt", stat.S_IFCHR, 0)
    assert ImageView(image(over, under).layers).find("/etc/ssl/certs/ca-certificates.crt") is None


def test_sealed_layers_stay_on_top_and_other_mounts_get_their_own(tmp_path: Path) -> None:
    sealed, lower = make(tmp_path / "s", {}), make(tmp_path / "i", {"etc/ssl/certs": "/usr/certs"})
    usr = make(tmp_path / "usr", {"certs/ca-certificates.crt": OWN})
    before = image(layers=[Layer(at="/", lowers=[sealed, lower], sealed=1), Layer(at="/usr", lowers=[usr])])
    after = trust_authority(before, CA, b"", tmp_path / "t")
    assert (after.layers[0].lowers[0], after.layers[0].lowers[2], after.layers[0].sealed) == (sealed, lower, 1)
    assert "/usr/certs/ca-certificates.crt" in added(before, after)


def test_directories_keep_mode_and_owner_and_everybody_may_read(tmp_path: Path) -> None:
    lower = make(tmp_path / "i", {"etc/ssl/certs/ca-certificates.crt": OWN})
    (tmp_path / "i/etc/ssl").chmod(0o751)
    before = os.umask(0o077)
    try:
        after = trust_authority(image(lower), CA, b"", tmp_path / "t")
    finally:
        os.umask(before)
    top = Path(after.layers[0].lowers[0])
    modes = {name: stat.S_IMODE((top / name).stat().st_mode) for name in ("etc/ssl", "etc/vallum", "etc/vallum/ca.pem")}
    assert modes == {"etc/ssl": 0o751, "etc/vallum": 0o755, "etc/vallum/ca.pem": 0o444}


def test_no_room(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(SandboxError, match="cannot be written"):
        trust_authority(image(make(tmp_path / "i", {})), CA, b"", tmp_path / "file" / "t")


def test_the_name_of_a_hashed_certificate_is_openssl_s(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_bytes(CA)
    said = subprocess.run(["openssl", "x509", "-hash", "-noout", "-in", tmp_path / "ca.pem"], capture_output=True)
    assert said.stdout.decode().strip() == hash_subject(CA)


@pytest.mark.parametrize("password", ["", "changeit"])
def test_java_reads_the_store_with_any_password(tmp_path: Path, password: str) -> None:
    if shutil.which("keytool") is None:
        pytest.skip("no Java here")
    (tmp_path / "store").write_bytes(make_java_store(OWN + CA + b"-----BEGIN CERTIFICATE-----\nnone\n"))
    said = subprocess.run(
        ["keytool", "-list", "-keystore", tmp_path / "store", "-storepass", password], capture_output=True, text=True
    ).stdout
    assert said.count("trustedCertEntry") == 2


@pytest.mark.parametrize("der", [b"", b"\x30", b"\x30\x03\x30\x01\x00", b"\x30\x84\xff\xff\xff\xff"])
def test_what_is_no_certificate_has_no_serial(der: bytes) -> None:
    with pytest.raises(ValueError, match="not a certificate"):
        has_positive_serial(der)


async def test_one_directory_a_run_and_the_caller_s_variables_win(tmp_path: Path) -> None:
    trust = Trust(tmp_path / "trust")
    (tmp_path / "trust" / "left").mkdir(parents=True)
    trust.start()
    assert list((tmp_path / "trust").iterdir()) == []
    authority = make_authority("r1")
    before = image(make(tmp_path / "i", {}))
    first = await trust.equip("r1", before, authority, b"", {"SSL_CERT_FILE": "/mine"})
    second = await trust.equip("r1", before, authority, b"", {})
    assert first.layers == second.layers
    assert (first.environ["SSL_CERT_FILE"], second.environ["SSL_CERT_FILE"]) == ("/mine", BUNDLE)
    other = await trust.equip("r2", before, authority, b"", {})
    trust.release("r1")
    assert not Path(first.layers[0].lowers[0]).exists()
    assert Path(other.layers[0].lowers[0]).exists()
    trust.stop()
    assert not Path(other.layers[0].lowers[0]).exists()
