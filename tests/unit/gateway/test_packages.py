"""The packages service without a network: indexes read, verdicts on files, the cache's directory."""

from __future__ import annotations

import asyncio
import bz2
import gzip
import hashlib
import json
import lzma
import os
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from vallum.gateway.http.exchange import RequestHead
from vallum.gateway.services.packages.base import (
    Listing,
    Reading,
    UnreadableError,
    Vouch,
    check_digest,
    locate,
    read_time,
)
from vallum.gateway.services.packages.book import Book, judge_age, judge_digest
from vallum.gateway.services.packages.debian import Debian, read_list, read_release
from vallum.gateway.services.packages.npm import Npm
from vallum.gateway.services.packages.pypi import JSON, Pypi, split_file, takes_json
from vallum.gateway.services.packages.store import Store

SHA = "ab" * 32
NOW = 1_700_000_000 * 10**9
DAY = 86400 * 10**9


def head(path: str, accept: str = "*/*", method: str = "GET") -> RequestHead:
    return RequestHead(
        method=method, scheme="https", host="i.test", port=443, target=path, version="1.1",
        headers=((b"accept", accept.encode()),),
    )  # fmt: skip


def test_a_url_is_known_by_the_form_in_which_requests_have_it() -> None:
    assert locate("https://u:p@I.test:443/a/%7Eb/./c%2Bd.whl?x#sha256=1") == locate("https://i.test/a/~b/c+d.whl")
    assert locate("http://i.test:443/a") != locate("http://i.test/a")


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("Foo_Bar-1.0-py3-none-any.whl", ("foo-bar", "1.0")),
        ("foo-bar-1.0.tar.gz", ("foo-bar", "1.0")),
        ("foo.txt", ("", "")),
        ("odd.whl", ("odd", "")),
    ],
)
def test_names_of_files(file: str, expected: tuple[str, str]) -> None:
    assert split_file(file) == expected


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("*/*", False),
        ("text/html", False),
        (f"{JSON}, text/html; q=0.1", True),
        (f"{JSON};q=0, text/html", False),
        ("application/vnd.pypi.simple.latest+json;q=0.5", True),
    ],
)
def test_who_takes_json(accept: str, expected: bool) -> None:
    assert takes_json(accept) is expected


def simple(*files: dict) -> bytes:
    return json.dumps(
        {"meta": {"api-version": "1.1"}, "name": "a", "versions": ["1.0", "2.0"], "files": files}
    ).encode()


def file_of(version: str, age_days: float, **more: object) -> dict:
    time = f"2023-11-{14 - int(age_days):02}T22:13:20Z"  # NOW is 2023-11-14T22:13:20Z
    name = f"a-{version}-py3-none-any.whl"
    return {"filename": name, "url": f"../f/{name}", "hashes": {"sha256": SHA}, "upload-time": time, **more}


def test_young_files_are_left_out_of_the_simple_index_and_still_vouched_for() -> None:
    body = simple(file_of("1.0", 9), file_of("2.0", 1, **{"core-metadata": {"sha256": SHA}}))
    url = "https://i.test/simple/a/"
    reading = Pypi().read(url, JSON, body, accept=JSON, newest_ns=NOW - 7 * DAY)
    assert (reading.hidden, reading.kept) == (1, 1)
    assert reading.body is not None
    page = json.loads(reading.body)
    assert [f["filename"] for f in page["files"]] == ["a-1.0-py3-none-any.whl"]
    assert page["versions"] == ["1.0"]
    young = reading.vouches["https://i.test/simple/f/a-2.0-py3-none-any.whl"]
    assert young.published_ns == NOW - DAY
    assert reading.vouches["https://i.test/simple/f/a-2.0-py3-none-any.whl.metadata"].kind == "metadata"
    assert Pypi().read(url, JSON, body, accept=JSON, newest_ns=None).body is None
    page_html = Pypi().read(url, JSON, body, accept="text/html", newest_ns=NOW - 7 * DAY)
    assert page_html.content_type == b"text/html" and b"a-2.0" not in (page_html.body or b"")
    assert set(Pypi().read(url, "text/html", page_html.body or b"", accept="text/html", newest_ns=None).vouches) == {
        "https://i.test/simple/f/a-1.0-py3-none-any.whl"
    }


def test_what_an_index_writes_stays_text_in_the_page_made_of_it() -> None:
    body = simple(file_of("1.0", 9, filename='"><script>', yanked="<b>", **{"requires-python": ">=3"}))
    page = Pypi().read("https://i.test/simple/a/", JSON, body, accept="text/html", newest_ns=NOW).body or b""
    assert b"<script>" not in page and b"<b>" not in page and b'data-requires-python="&gt;=3"' in page


def packument(**ages: float) -> bytes:
    versions = {
        v: {"dist": {"tarball": f"https://n.test/a/-/a-{v}.tgz", "shasum": "cd" * 20, "integrity": "sha1-x md5-"}}
        for v in ages
    }
    times = {v: f"2023-11-{14 - int(age):02}T22:13:20.000Z" for v, age in ages.items()}
    page = {
        "name": "a",
        "dist-tags": {"latest": list(ages)[-1], "next": list(ages)[-1]},
        "versions": versions,
        "time": times,
    }
    return json.dumps(page).encode()


def test_latest_is_the_highest_npm_version_that_is_old_enough() -> None:
    body = packument(**{"9.0.0": 9, "10.0.0": 9, "10.1.0-beta": 9, "11.0.0": 1})
    reading = Npm().read("https://n.test/a", "application/json", body, accept="", newest_ns=NOW - 7 * DAY)
    page = json.loads(reading.body or b"")
    assert page["dist-tags"] == {"latest": "10.0.0"}
    assert "11.0.0" not in page["versions"] and "11.0.0" not in page["time"]
    vouch = reading.vouches["https://n.test/a/-/a-11.0.0.tgz"]
    assert vouch.digests == (("sha1", "cd" * 20),)
    assert vouch.strong == ""  # somebody could make a second file with that SHA-1


RELEASE = f"""Origin: T
MD5Sum:
 {"0" * 32} 10 main/binary-amd64/Packages
SHA256:
 {SHA} 10 main/binary-amd64/Packages.xz
 {SHA} 10 ../../evil/Packages
 {SHA} 10 main/i18n/Translation-en
"""
PACKAGES = f"""Package: tool
Version: 1:2.0
Filename: pool/main/t/tool++_2.0_all.deb
SHA256: {SHA}

Package: half
Filename: pool/main/h/half_1_all.deb
"""


def test_a_release_file_vouches_for_lists_by_name_and_by_hash() -> None:
    base = "http://d.test/debian/dists/stable/"
    vouches = read_release(base, RELEASE)
    assert set(vouches) == {
        base + "main/binary-amd64/Packages.xz",
        base + f"main/binary-amd64/by-hash/SHA256/{SHA}",
    }


@pytest.mark.parametrize(
    "compress", [bytes, gzip.compress, bz2.compress, lzma.compress, zstandard.ZstdCompressor().compress]
)
def test_lists_of_packages_in_every_compression(compress) -> None:
    files = read_list(compress(PACKAGES.encode()))
    assert files == {"pool/main/t/tool++_2.0_all.deb": ("tool", "1:2.0", SHA)}
    book = Book()
    body = compress(PACKAGES.encode())
    for url in ("http://d.test/debian/dists/s/main/Packages", f"http://d.test/debian/dists/s/by-hash/SHA256/{SHA}"):
        book.learn("d.test", Debian().read(url, "", body, accept="", newest_ns=None))
        found = book.find(locate("http://d.test/debian/pool/main/t/tool++_2.0_all.deb"))
        assert found is not None and found.digests == (("sha256", SHA),)


def test_a_list_that_is_cut_short_or_grows_too_large_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnreadableError):
        read_list(lzma.compress(PACKAGES.encode() * 100)[:-30])
    monkeypatch.setattr("vallum.gateway.services.packages.debian.MAX_LIST_BYTES", 1_000_000)
    with pytest.raises(UnreadableError, match="more than"):
        read_list(gzip.compress(b"\n" * 3_000_000))


@pytest.mark.parametrize(
    ("path", "accept", "expected"),
    [
        ("/simple/foo/", "*/*", "pypi"),
        ("/root/+simple/foo", "*/*", "pypi"),
        ("/@a%2Fb", "application/vnd.npm.install-v1+json; q=1.0", "npm"),
        ("/left", "application/json", "npm"),
        ("/debian/dists/stable/InRelease", "*/*", "debian"),
        ("/debian/dists/stable/main/binary-amd64/Packages.xz", "*/*", "debian"),
        ("/packages/a/foo-1.0-py3-none-any.whl", "*/*", None),
        ("/", "text/html", None),
        ("/left/-/left-1.0.0.tgz", "application/json", None),
    ],
)
def test_which_requests_are_for_an_index(path: str, accept: str, expected: str | None) -> None:
    found = [one.name for one in (Debian(), Pypi(), Npm()) if one.is_index(head(path, accept))]
    assert found == ([expected] if expected else [])


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/p/foo-1.0-py3-none-any.whl", ("pypi", "foo", "1.0", "package")),
        ("/p/foo-1.0-py3-none-any.whl.metadata", ("pypi", "foo", "1.0", "metadata")),
        ("/@a/b/-/b-1.0.0.tgz", ("npm", "@a/b", "1.0.0", "package")),
        ("/pool/t/tool_1%3a2.0_all.deb", ("debian", "tool", "1:2.0", "package")),
        ("/pool/t/tool_1.orig.tar.xz", None),
        ("/simple/foo/", None),
    ],
)
def test_what_a_path_looks_like(path: str, expected: tuple | None) -> None:
    guesses = [g for one in (Debian(), Pypi(), Npm()) if (g := one.guess(path)) is not None]
    assert [(g.ecosystem, g.name, g.version, g.kind) for g in guesses] == ([expected] if expected else [])


def vouch(**fields: object) -> Vouch:
    return Vouch(**{"ecosystem": "pypi", "name": "a", "version": "1", "digests": (("sha256", SHA),), **fields})


def test_no_index_takes_back_what_another_said() -> None:
    book, url = Book(), "https://f.test/a.whl"
    book.vouch("pypi.test", url, vouch(published_ns=NOW))
    book.vouch("other.test", url, vouch(published_ns=NOW - 99 * DAY, digests=(("sha256", "00" * 32),)))
    found = book.find(url)
    assert found is not None and found.published_ns == NOW
    for digits in (SHA, "00" * 32):
        denial = judge_digest(found, {"sha256": digits})
        assert denial is not None and denial.rule == "package-digest"
    book.vouch("other.test", url, vouch())
    found = book.find(url)
    assert found is not None and judge_digest(found, {"sha256": SHA}) is None


def test_a_book_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vallum.gateway.services.packages.book.MAX_FILES", 3)
    book = Book()
    for number in range(5):
        book.vouch("i.test", f"u{number}", vouch())
    assert [book.find(f"u{number}") is not None for number in range(5)] == [False, False, True, True, True]
    for number in range(50):
        listing = Listing(source=f"s{number}", root=f"r{number}/", files={"f": ("a", "1", SHA)})
        book.learn("i.test", Reading(vouches={}, listing=listing))
    assert book.find("r1/f") is None and book.find("r49/f") is not None


@pytest.mark.parametrize(
    ("published_ns", "is_known", "is_denied"),
    [
        (NOW - 8 * DAY, True, False),
        (NOW - 6 * DAY, True, True),
        (NOW + DAY, True, True),
        (None, True, False),
        (None, False, True),
    ],
)
def test_ages(published_ns: int | None, is_known: bool, is_denied: bool) -> None:
    denial = judge_age(vouch(published_ns=published_ns), is_known=is_known, min_age_s=7 * 86400, now_ns=NOW)
    assert (denial is not None) == is_denied
    assert denial is None or denial.rule == "package-too-young"


def test_times_and_digests_that_are_none() -> None:
    assert read_time("2023-11-14T22:13:20Z") == read_time("2023-11-14T22:13:20") == NOW
    assert [read_time(text) for text in ("", "soon", 5, "0001-01-01T00:00:00+23:59")] == [None] * 3 + [
        read_time("0001-01-01T00:00:00+23:59")
    ]
    assert check_digest("sha256", SHA.upper()) == (("sha256", SHA),)
    assert check_digest("sha256", "zz" * 32) == check_digest("sha256", "ab") == check_digest("crc32", "ab" * 4) == ()


JSONISH = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["files", "url", "filename", "hashes", "upload-time", "core-metadata", "versions", "dist", "tarball",
                         "integrity", "time", "dist-tags", "latest", "1.0.0", "name", "yanked"]), inner, max_size=6),
    max_leaves=25,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(page=JSONISH, accept=st.sampled_from([JSON, "text/html"]))
def test_json_of_any_shape_is_read_or_refused(page: object, accept: str) -> None:
    for one, kind in ((Pypi(), JSON), (Npm(), "application/json")):
        try:
            one.read("https://i.test/simple/a/", kind, json.dumps(page).encode(), accept=accept, newest_ns=NOW)
        except UnreadableError:
            continue


@settings(max_examples=300, deadline=None)
@given(body=st.binary(max_size=200) | st.text("<>a hrefbase=\"'/#:[]!-&;%", max_size=80).map(str.encode))
def test_bytes_of_any_kind_are_read_or_refused(body: bytes) -> None:
    for one, url, kind in (
        (Pypi(), "https://i.test/simple/a/", "text/html"),
        (Pypi(), "https://i.test/simple/a/", JSON),
        (Npm(), "https://i.test/a", "application/json"),
        (Debian(), "https://i.test/dists/s/Release", ""),
        (Debian(), "https://i.test/dists/s/Packages", ""),
    ):
        try:
            one.read(url, kind, body, accept="text/html", newest_ns=NOW)
        except UnreadableError:
            continue


def digests_of(data: bytes) -> tuple[tuple[str, str], ...]:
    return (("sha256", hashlib.sha256(data).hexdigest()),)


def open_store(path: Path, max_bytes: int = 10**6) -> Store:
    return Store(os.open(path, os.O_RDONLY | os.O_DIRECTORY), max_bytes)


async def put(store: Store, name: str, data: bytes) -> None:
    part = store.begin()
    try:
        for at in range(0, len(data), 1000):
            await part.write(data[at : at + 1000])
        await part.commit(name)
    finally:
        part.discard()


async def get(store: Store, name: str, data: bytes) -> bytes | None:
    found = await store.open(name, digests_of(data))
    if found is None:
        return None
    with os.fdopen(found[0], "rb") as file:
        return file.read()


async def test_what_is_stored_survives_and_what_was_changed_is_deleted(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    await put(store, "a", b"x" * 5000)
    (tmp_path / "left.part").write_bytes(b"half")
    (tmp_path / "link").symlink_to("/etc/passwd")
    again = open_store(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["a"]
    assert await get(again, "a", b"x" * 5000) == b"x" * 5000
    (tmp_path / "a").chmod(0o600)
    (tmp_path / "a").write_bytes(b"poison")
    assert await get(again, "a", b"x" * 5000) is None
    assert os.listdir(tmp_path) == [] and again.total_bytes == 0


async def test_a_file_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    part = store.begin()
    await part.write(b"x" * 400_000)
    assert [name for name in os.listdir(tmp_path) if not name.endswith(".part")] == []
    part.discard()
    assert os.listdir(tmp_path) == []
    large = store.begin()  # more than a quarter of the store
    await large.write(b"x" * 300_000)
    await large.commit("large")
    assert os.listdir(tmp_path) == []


async def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    store = open_store(tmp_path, 10_000)
    for name in "abcd":
        await put(store, name, name.encode() * 2500)
    assert await get(store, "a", b"a" * 2500) is not None
    await put(store, "e", b"e" * 2000)
    assert sorted(os.listdir(tmp_path)) == ["a", "c", "d", "e"]
    assert store.total_bytes == 9500


async def test_many_at_once_leave_nothing_behind(tmp_path: Path) -> None:
    store = open_store(tmp_path, 100_000_000)
    before = len(os.listdir("/proc/self/fd"))
    await asyncio.gather(*(put(store, "same", b"y" * 600_000) for _ in range(20)))
    tasks = [asyncio.create_task(put(store, f"cut{number}", b"z" * 600_000)) for number in range(10)]
    await asyncio.sleep(0.001)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert await get(store, "same", b"y" * 600_000) is not None
    await asyncio.sleep(0.1)
    assert len(os.listdir("/proc/self/fd")) <= before + 1  # the loop's own, made meanwhile
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".part")]
