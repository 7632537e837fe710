"""What changed between two listings, and which snapshots may go: pure decisions."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vallum.client import wire
from vallum.core.errors import InvalidInput, SandboxError
from vallum.core.limits import Limits
from vallum.node.snapshots import settle_terms
from vallum.sandbox.base import Image, Layer, SealedLayer
from vallum.sandbox.snapshots.changes import Entry, compare, parse_entry, read_listing
from vallum.sandbox.snapshots.store import Manifest, SnapshotStore, Terms, digest_of, must_merge, strip_sealed

IMAGE = Image(
    ref="host",
    digest="sha256:00",
    environ={},
    layers=[Layer(at="/", lowers=["/tmp"]), Layer(at="/usr", lowers=["/tmp"])],
)
TERMS = Terms(containment="standard", allow=["a.example"], rules="text", rules_name="f.toml", limits=Limits())


def entry(path, kind="f", *, below="0", digest="1", mode=0o644, replaced=False):
    return Entry(
        path=path.encode(), type=kind, mode=mode, uid=0, gid=0, size=1, below=below, replaced=replaced, digest=digest
    )


def changes(old, new):
    order = lambda one: one.path.split(b"/")  # noqa: E731
    found = compare("/", sorted(old, key=order) if old is not None else None, sorted(new, key=order))
    return [(one.path, one.change) for one in found]


def manifest(name, chain, **fields):
    return Manifest(
        **{
            "id": name, "created_ns": 1, "boot": "b", "level": "ns", "rootless": False, "run": "r", "episode": "e",
            "step": 0, "sandbox": "c", "parent": None, "image": IMAGE, "digest": "d", "terms": TERMS, "processes": "freeze",
            "layers": [SealedLayer(at="/", number=0, digest="x", entries=1, bytes=1)], "chain": chain, "alive": 0,
        }
        | fields
    )  # fmt: skip


def test_since_the_cell_began():
    new = [
        entry("", "d", below="="), entry("a"), entry("b", below="~"), entry("c", below="="), entry("d", "d", below="="),
        entry("d/x"), entry("e", "d", below="="), entry("f", "w", below="="), entry("g", "d", below="~"),
        entry("h", "w"), entry("i", "d", below="=", replaced=True),
    ]  # fmt: skip
    assert changes(None, new) == [
        ("/a", "added"), ("/b", "changed"), ("/c", "changed"), ("/d/x", "added"), ("/f", "removed"), ("/g", "changed"),
        ("/i", "changed"),
    ]  # fmt: skip


def test_between_two_moments():
    old = [
        entry("a"),
        entry("b"),
        entry("d", "d"),
        entry("d.x"),
        entry("d/x"),
        entry("d/y"),
        entry("w", "w", below="="),
    ]
    new = [entry("a"), entry("b", digest="2"), entry("c"), entry("d.x", mode=0o600), entry("w", below="~")]
    assert changes(old, new) == [
        ("/b", "changed"), ("/c", "added"), ("/d", "removed"), ("/d.x", "changed"), ("/w", "added"),
    ]  # fmt: skip
    assert changes(old, old) == []
    assert changes([entry("a", below="=")], [entry("a", "w", below="=")]) == [("/a", "removed")]


def test_a_time_set_back_hides_nothing_and_a_touch_is_no_change():
    head = "f 644 0 0 3 {0} 0 - aa"
    same = [parse_entry(head.format(time).encode(), b"a") for time in (1, 2)]
    assert changes([same[0]], [same[1]]) == []


names = st.lists(st.sampled_from(["a", "b", "a.b", "a-", "B"]), min_size=1, max_size=3).map("/".join)


@given(
    st.dictionaries(names, st.sampled_from("12"), max_size=12),
    st.dictionaries(names, st.sampled_from("12"), max_size=12),
)
def test_every_difference_is_found(old, new):
    found = dict(changes([entry(p, digest=d) for p, d in old.items()], [entry(p, digest=d) for p, d in new.items()]))
    for path in {*old, *new}:
        wanted = "added" if path not in old else "removed" if path not in new else "changed"
        parents = ["/".join(path.split("/")[:n]) for n in range(1, path.count("/") + 1)]
        if old.get(path) == new.get(path):
            assert "/" + path not in found
        elif wanted != "removed" or not any(found.get("/" + one) == "removed" for one in parents):
            hidden = any(found.get("/" + one) == "removed" for one in parents)
            assert found.get("/" + path) == wanted or hidden


@pytest.mark.parametrize(
    "raw",
    [b"junk\0a\0", b"f 644 0 0 1 1 0 - aa\0", b"f 644 0 0 1 1 0 - aa\0a", b"f 9z 0 0 1 1 0 - aa\0a\0", b"\xff\0\0"],
)
def test_a_damaged_listing_is_one_sentence(tmp_path, raw):
    (tmp_path / "l").write_bytes(raw)
    with pytest.raises(SandboxError, match="listing"):
        list(read_listing(tmp_path / "l"))


def test_a_listing_is_read_in_pieces(tmp_path):
    (tmp_path / "l").write_bytes(b"".join(b"f 644 0 0 1 1 0 - aa\0%06d\n\xff\0" % n for n in range(50_000)))
    found = list(read_listing(tmp_path / "l"))
    assert len(found) == 50_000
    assert next(compare("/x", None, found)).path == "/x/000000\n\\xff"


def test_chains_hold_what_they_need(tmp_path):
    store = SnapshotStore(tmp_path / "s")
    assert store.open() == []
    for name, chain in (("one", ["one"]), ("two", ["two", "one"])):
        store.commit(store.draft(), manifest(name, chain, boot=store.boot))
    assert store.make_image(store.get("two")).layers[0] == Layer(
        at="/", lowers=[str(tmp_path / "s/two/0"), str(tmp_path / "s/one/0"), "/tmp"], sealed=2
    )
    assert strip_sealed(store.make_image(store.get("two"))) == IMAGE
    with pytest.raises(InvalidInput, match="snapshot two lies on it"):
        store.remove("one")
    store.use("cell", store.get("two"))
    with pytest.raises(InvalidInput, match="cell cell runs on it"):
        store.remove("two")
    store.release("cell")
    assert store.remove("two").name.startswith(".old-")
    store.remove("one")
    assert store.all() == []


def test_after_a_loss_of_power_only_what_was_synced_counts(tmp_path):
    store = SnapshotStore(tmp_path / "s")
    store.open()
    for name in ("here", "gone", "safe", "above"):
        chain = [name, "gone"] if name == "above" else [name]
        store.commit(store.draft(), manifest(name, chain, boot=store.boot if name == "here" else "another boot"))
    store.mark_synced(["safe", "above"])
    again = SnapshotStore(tmp_path / "s")
    assert sorted(path.name for path in again.open()) == ["above", "gone"]
    assert sorted(one.id for one in again.all()) == ["here", "safe"]
    assert again.unsynced() == ["here"]


def test_when_layers_are_merged():
    assert not must_merge(IMAGE, 63)
    assert must_merge(IMAGE, 64)
    wide = Image(ref="x", digest="", environ={}, layers=[Layer(at=f"/{n}", lowers=["/"] * 20) for n in range(12)])
    assert must_merge(wide, 1)


def test_a_digest_names_what_it_is_over():
    layer = SealedLayer(at="/", number=0, digest="x", entries=1, bytes=1)
    assert digest_of(IMAGE, "", [layer]) != digest_of(IMAGE, "below", [layer]) != digest_of(IMAGE, "below", [])


def test_a_fork_has_the_parents_terms_unless_told_otherwise():
    fork = wire.ForkSandbox(
        seq=1, snapshot="s", containment=None, allow=["b.example"], rules=None, rules_name="", limits=None, run=None,
        episode=None, environ={}, user=None, workdir=None,
    )  # fmt: skip
    origin = manifest("s", ["s"])
    made = settle_terms(fork, origin, "run")
    assert (made.containment, made.allow, made.rules, made.run) == (
        "standard",
        ["a.example", "b.example"],
        "text",
        "run",
    )
    strict = wire.ForkSandbox(
        **{name: getattr(fork, name) for name in fork.__struct_fields__} | {"containment": "locked", "allow": []}
    )
    made = settle_terms(strict, origin, None)
    assert (made.containment, made.allow, made.rules) == ("locked", [], None), (
        "grants do not outlive stricter containment"
    )
    assert Path(made.image) == Path("host")
