"""pip, uv, npm and apt in real cells, against indexes that also lie: what they get, what they do not, and what is recorded."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.root, pytest.mark.timeout(180)]
if os.geteuid() != 0:
    pytest.skip("needs root: namespaces with addresses of their own", allow_module_level=True)
if importlib.util.find_spec("pip") is None or not Path(sys.executable).with_name("uv").exists():
    pytest.skip("needs pip and uv beside this Python", allow_module_level=True)

NAMES = ("pypi", "files", "npm", "apt", "evil")
INSIDE = """
mount --bind "$1/hosts" /etc/hosts && ip link set lo up
for ip in $2; do ip addr add "$ip/32" dev lo; done
exec "$3" "$4" "$1"
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict:
    directory = tmp_path_factory.mktemp("packages")
    addresses = [f"192.0.2.{20 + number}" for number in range(len(NAMES))]
    hosts = [f"{ip} {name}.test\n" for ip, name in zip(addresses, NAMES, strict=True)]
    (directory / "hosts").write_text("127.0.0.1 localhost\n" + "".join(hosts))
    done = subprocess.run(
        [
            *("unshare", "-n", "-m", "--propagation", "private", "sh", "-ec", INSIDE, "sh"),
            *(str(directory), " ".join([*addresses, "198.51.100.7"]), sys.executable),
            str(Path(__file__).with_name("package_cells.py")),
        ],
        env={**os.environ, "VALLUM_HOME": str(directory / "home")},
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def need(program: str) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")


def fetched(seen: dict, cell: str, step: int) -> list[tuple[str, str, str]]:
    return [
        (e["name"], e["version"], e["source"])
        for e in seen["events"][cell]
        if e["kind"] == "package.fetched" and e["scope"]["step"] == step
    ]


def denied(seen: dict, cell: str, name: str) -> list[str]:
    step = seen["said"][name]["step"]
    return [
        e["rule"]
        for e in seen["events"][cell]
        if e["kind"] in {"http.request", "net.flow"} and e["scope"]["step"] == step and e["state"] == "denied"
    ]


def test_pip_installs_what_is_granted_and_each_file_is_charged_to_its_step(seen: dict) -> None:
    said = seen["said"]["pip"]
    assert said["code"] == 0, said["out"]
    assert sorted(fetched(seen, "clients", said["step"])) == [
        ("dependency", "2.0", "index"),
        ("granted", "1.0", "index"),
    ]
    digests = {e["name"]: e["digest"] for e in seen["events"]["clients"] if e["kind"] == "package.fetched"}
    assert digests["granted"] == f"sha256:{seen['digests']['granted-1.0']}"


def test_uv_gets_the_same_files_out_of_the_cache(seen: dict) -> None:
    said = seen["said"]["uv"]
    assert said["code"] == 0, said["out"]
    assert set(fetched(seen, "clients", said["step"])) == {("dependency", "2.0", "cache"), ("granted", "1.0", "cache")}


def test_npm_installs(seen: dict) -> None:
    need("npm")
    said = seen["said"]["npm"]
    assert (said["code"], said["out"].split()[-1]) == (0, "1.1.0"), said["out"]
    assert fetched(seen, "clients", said["step"]) == [("left", "1.1.0", "index")]


def test_apt_installs(seen: dict) -> None:
    need("apt-get")
    said = seen["said"]["apt"]
    assert said["code"] == 0, said["out"]
    assert "\ntool\n" in said["out"]
    assert fetched(seen, "clients", said["step"]) == [("tool", "1:2.0", "index")]


@pytest.mark.parametrize("name", ["npm-script", "sdist", "apt"])
def test_what_an_installation_runs_is_contained_and_charged(seen: dict, name: str) -> None:
    need({"npm-script": "npm", "apt": "apt-get"}.get(name, "python3"))
    said = seen["said"][name]
    assert said["code"] == 0, said["out"]
    flows = [e for e in seen["events"]["clients"] if e["kind"] == "net.flow" and e["dst_ip"] == "198.51.100.7"]
    assert any(e["scope"]["step"] == said["step"] and e["verdict"] == "deny" for e in flows), flows
    assert seen["stolen"] == []


def test_what_is_not_granted_fails_readably(seen: dict) -> None:
    said = seen["said"]
    assert said["ungranted-index"]["code"] != 0
    assert "No matching distribution" in said["ungranted-index"]["out"]
    assert said["ungranted-dependency"]["code"] != 0
    assert "evil.test" in said["ungranted-dependency"]["out"]
    assert seen["stolen"] == []


@pytest.mark.parametrize("client", ["pip", "npm", "uv", "apt"])
def test_grants_of_the_set_up_are_over_with_it(seen: dict, client: str) -> None:
    assert seen["said"][f"run-{client}"]["code"] != 0, seen["said"][f"run-{client}"]["out"]


@pytest.mark.parametrize("name", ["pip-forged", "large-forged", "npm-forged", "apt-forged"])
def test_bytes_that_the_index_did_not_promise_are_refused(seen: dict, name: str) -> None:
    said = seen["said"][name]
    assert said["code"] != 0, said["out"]
    assert "package-digest" in denied(seen, "clients", name)
    assert fetched(seen, "clients", said["step"]) == []


def test_a_refused_file_says_why(seen: dict) -> None:
    out = seen["said"]["curl-forged"]["out"]
    assert out.startswith("403vallum: blocked by rule package-digest: forged 1.0 has another sha256"), out
    assert "stolen" not in out


def test_a_second_answer_of_the_server_does_not_change_what_is_cached(seen: dict) -> None:
    good, said = seen["digests"]["kept-1.0"], seen["said"]
    for name in ("own-key", "part", "again", "other"):
        assert good in said[name]["out"], (name, said[name])
    assert (
        said["hits"]["after"] - said["hits"]["before"] == 2
    )  # those who did not ask the index, or with a key of their own
    assert "package-digest" in said["other-key"]["out"]
    assert fetched(seen, "other", said["other"]["step"]) == [("kept", "1.0", "cache")]


def test_a_part_of_a_file_is_answered_with_all_of_it(seen: dict) -> None:
    assert seen["said"]["part"]["out"].startswith(" 200")


def test_the_cache_has_only_whole_files_and_is_out_of_the_guest_s_reach(seen: dict) -> None:
    files = seen["said"]["files"]
    assert files["mode"] == 0o700
    assert not [name for name in files["names"] if name.endswith(".part")]
    assert seen["digests"]["kept-1.0"] in files["digests"]
    assert seen["digests"]["forged-1.0"] not in files["digests"]
    named = {e["digest"].removeprefix("sha256:") for e in seen["events"]["clients"] if e["kind"] == "package.fetched"}
    assert set(files["digests"]) <= named | {seen["digests"]["kept-1.0"]}
    finds = seen["said"]["guest-finds"]["out"]
    assert "No such file" in finds
    assert files["names"][0] not in finds


def test_young_versions_are_left_out_and_their_files_refused(seen: dict) -> None:
    said = seen["said"]
    for name in ("young-pip", "young-uv"):
        assert said[name]["code"] == 0, said[name]["out"]
        assert {f[:2] for f in fetched(seen, "age", said[name]["step"])} == {("aged", "1.0")}
    assert "(from versions: 1.0)" in said["young-pinned"]["out"]
    assert said["young-all"]["code"] != 0
    assert "aged-1.0" in said["young-html"]["out"] and "aged-2.0" not in said["young-html"]["out"]
    assert "published 1 d ago" in said["young-file"]["out"]
    assert "without its index" in said["young-unasked"]["out"]
    assert denied(seen, "age", "young-file") == ["package-too-young"]
    assert seen["young_fetched"] == []


def test_young_npm_versions_are_left_out(seen: dict) -> None:
    need("npm")
    said = seen["said"]
    assert (said["young-npm"]["code"], said["young-npm"]["out"].split()[-1]) == (0, "1.0.0"), said["young-npm"]["out"]
    assert "package-too-young" in said["young-tarball"]["out"]


def test_packages_are_in_show_and_report(seen: dict) -> None:
    assert "@team/scripted" in seen["show"] and "Ecosystem" in seen["show"]
    assert "<h2>Packages</h2>" in seen["report"]


def test_vallum_run_installs_in_its_set_up_and_not_after_it(seen: dict) -> None:
    said = seen["said"]["cli"]
    assert "Successfully installed aged-1.0" in said["out"], said["out"]
    assert said["out"].startswith("1.0\n"), said["out"]
    assert "No matching distribution found for granted" in said["out"], said["out"]
    assert said["code"] == 1
