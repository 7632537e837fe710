"""The packages service at the gateway process: whose cache entries are whose, and requests that would go around it."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import socket
import sys
from pathlib import Path

import pytest

from vallum.gateway.kit import Credential, Kit
from vallum.rules.grants import Budget, Rule, Ruleset
from vallum.testing.fakes.packages import PackageIndex, make_wheel, serve_index

pytestmark = pytest.mark.root
if os.geteuid() != 0:
    pytest.skip("needs root: network namespaces", allow_module_level=True)

_spec = importlib.util.spec_from_file_location(
    "package_world_priv", Path(__file__).parents[1] / "gateway_world_priv.py"
)
assert _spec is not None and _spec.loader is not None
world_module = importlib.util.module_from_spec(_spec)
sys.modules["package_world_priv"] = world_module
_spec.loader.exec_module(world_module)

MIRROR = "192.0.2.20"
FILE = "/files/a-1.0-py3-none-any.whl"
YOUNG = "/files/a-2.0-py3-none-any.whl"
OPEN = Rule(id="index", host="mirror.test", ports=(80,), service="packages")
CLOSED = Rule(id="index", host="mirror.test", ports=(80,), service="packages", credential="key")


class Place:
    """A world with an index at mirror.test, and a guest that says what it likes."""

    def __init__(self, world, index: PackageIndex) -> None:
        self.world, self.index = world, index

    async def get(self, path: str, *headers: str, method: str = "GET", body: str = "") -> tuple[int, bytes]:
        lines = [f"{method} {path} HTTP/1.1", "Host: mirror.test", "Connection: close", *headers]
        lines += [f"Content-Length: {len(body)}"] if body else []
        said = await self.world.say(MIRROR, 80, "\r\n".join([*lines, "", body]).encode())
        head, _, content = said.partition(b"\r\n\r\n")
        return int(head.split()[1]), content

    def asked(self, path: str) -> list[dict[str, str]]:
        return [headers for _, target, headers in self.index.requests if target == path]

    def fetched(self) -> list[tuple[str, str, int | None]]:
        return [
            (e.version, e.source, e.scope.step)
            for e in self.world.events
            if e.__struct_config__.tag == "package.fetched"
        ]


def play(tmp_path: Path, scenario, rule: Rule, kit: Kit) -> None:
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o700)
    os.chown(cache, 65534, 65534)
    fd = os.open(cache, os.O_RDONLY | os.O_DIRECTORY)

    async def run(world) -> None:
        index = PackageIndex("http://mirror.test")
        index.add_python("a-1.0-py3-none-any.whl", make_wheel("a", "1.0"), age_s=9e6)
        index.add_python("a-2.0-py3-none-any.whl", make_wheel("a", "2.0"), age_s=60)
        sock = world.in_fakes(lambda: world_module.listen(socket.AF_INET, (MIRROR, 80)))
        async with await serve_index(index, "mirror.test", sock):
            await world.ask("mirror.test")
            await scenario(Place(world, index))

    try:
        world_module.run_in_world(tmp_path, Ruleset(allow=(rule,)), run, kit=kit, cache_fd=fd)
    finally:
        os.close(fd)


def key(secret: bytes) -> Kit:
    return Kit(credentials=(Credential(name="key", hosts=("mirror.test",), secret=secret),))


def test_what_one_credential_fetched_is_not_given_to_another(tmp_path: Path) -> None:
    async def scenario(place: Place) -> None:
        await place.get("/simple/a/")
        for _ in range(2):
            status, content = await place.get(FILE)
            assert (status, content) == (200, make_wheel("a", "1.0"))
        assert len(place.asked(FILE)) == 1
        await place.world.link.update_rules("c1", Ruleset(allow=(CLOSED,)), key(b"another-secret-1234"))
        assert (await place.get(FILE))[0] == 200
        assert len(place.asked(FILE)) == 2
        await place.world.link.update_rules("c1", Ruleset(allow=(OPEN,)), Kit())
        assert (await place.get(FILE))[0] == 200
        assert len(place.asked(FILE)) == 3
        assert "authorization" not in place.asked(FILE)[-1]
        assert place.fetched() == [("1.0", source, 3) for source in ("index", "cache", "index", "index")]

    play(tmp_path, scenario, CLOSED, key(b"one-secret-12345678"))
    assert not any(b"secret" in file.name.encode() for file in (tmp_path / "cache").iterdir())
    content = hashlib.sha256(make_wheel("a", "1.0")).hexdigest()
    assert {hashlib.sha256(f.read_bytes()).hexdigest() for f in (tmp_path / "cache").iterdir()} == {content}


def test_no_form_of_request_gets_what_is_too_young(tmp_path: Path) -> None:
    async def scenario(place: Place) -> None:
        status, content = await place.get("/simple/a/")
        assert status == 200 and b"a-1.0" in content and b"a-2.0" not in content
        for request in (
            {"path": YOUNG},
            {"path": YOUNG, "method": "HEAD"},
            {"path": YOUNG + "?x=1"},
            {"path": "/files/./a-2.0-py3-none-any.whl"},
            {"path": "/files/%61-2.0-py3-none-any.whl"},
            {"path": YOUNG + "/"},
            {"path": YOUNG, "body": "x"},
            {"path": YOUNG, "method": "POST", "body": "x"},
            {"path": YOUNG + ".metadata"},
        ):
            status, content = await place.get(**request)
            assert status in {403, 405}, (request, status, content)
        status, content = await place.get(YOUNG, "Connection: Upgrade", "Upgrade: websocket")
        assert status == 403
        assert {t for _, t, _ in place.index.requests} == {"/simple/a/"}
        assert (await place.get(FILE))[0] == 200
        rules = {e.rule for e in await place.world.settled(12, "http.request") if e.state == "denied"}
        assert rules <= {"package-too-young", "package-request", "method-mismatch"}, rules

    play(tmp_path, scenario, OPEN, Kit(package_min_age_s=86400.0))


def test_files_count_against_the_budget_of_their_grant_also_out_of_the_cache(tmp_path: Path) -> None:
    size = len(make_wheel("a", "1.0"))

    async def scenario(place: Place) -> None:
        await place.get("/simple/a/", "Accept: text/html")
        answers = [await place.get(FILE) for _ in range(6)]
        good = [content for _, content in answers if content == make_wheel("a", "1.0")]
        assert 1 <= len(good) < 6
        assert len(place.asked(FILE)) == 1

    limited = Rule(
        id="index", host="mirror.test", ports=(80,), service="packages", budget=Budget(bytes_in=1000 + 3 * size)
    )
    play(tmp_path, scenario, limited, Kit())
