"""Credentials in their store, secrets taken out of the record, canaries."""

import base64
import json
import logging
import os
import re
import stat
from urllib.parse import quote, quote_plus

import keyring
import keyring.backend
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vallum.core.errors import InvalidInput, NodeError, RecordError
from vallum.core.events import LedgerNote, SensorStatus, ToolCall, VerdictGiven
from vallum.core.scope import BY_NODE, Scope
from vallum.node.canaries import check_canaries, guard_secrets, make_planted
from vallum.node.credentials import CredentialStore, StoredCredential, check_secret, covers, read_header
from vallum.node.redaction import LogFilter, Redactor, Secret

SECRET = b"s3cr3t/token+0123456789=="


def note(text, kind=LedgerNote, **fields):
    if kind is LedgerNote:
        fields["note"] = text
    return kind(
        t_ns=1, mono_ns=1, scope=Scope(run="r", tool_call=fields.pop("tool_call", None)), attribution=BY_NODE, **fields
    )


def learned(*values):
    redactor = Redactor()
    redactor.learn(Secret(name=f"credential c{number}", value=value) for number, value in enumerate(values))
    return redactor


@pytest.fixture
def store(tmp_path):
    return CredentialStore(tmp_path / "credentials")


def stored(name="github", **fields):
    return StoredCredential(name=name, hosts=("api.example",), **fields)


def test_kept_and_read_back_with_tight_permissions(store, tmp_path):
    store.add(stored(), SECRET)
    (read,) = store.load()
    assert (read.name, read.secret, read.hosts, read.prefix) == ("github", SECRET, ("api.example",), "Bearer ")
    assert store.list()[0].secret == b""
    file = tmp_path / "credentials" / "github.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert [entry.name for entry in file.parent.iterdir()] == ["github.json"], "nothing half-written stays"
    with pytest.raises(InvalidInput, match="already"):
        store.add(stored(), SECRET)
    store.add(stored(), b"another-secret", replace=True)
    assert store.load()[0].secret == b"another-secret"
    store.remove("github")
    assert store.names() == []
    with pytest.raises(InvalidInput, match="no credential"):
        store.remove("github")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o622])
def test_a_loose_file_is_refused(store, tmp_path, mode):
    store.add(stored(), SECRET)
    (tmp_path / "credentials" / "github.json").chmod(mode)
    with pytest.raises(NodeError, match="chmod 600"):
        store.load()


def test_a_loose_directory_a_link_and_a_fifo_are_refused(store, tmp_path):
    store.add(stored(), SECRET)
    directory = tmp_path / "credentials"
    directory.chmod(0o755)
    with pytest.raises(NodeError, match="chmod 700"):
        store.load()
    directory.chmod(0o700)
    (directory / "github.json").rename(tmp_path / "elsewhere")
    (directory / "github.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(NodeError, match="cannot be read"):
        store.load()
    (directory / "github.json").unlink()
    os.mkfifo(directory / "github.json", 0o600)
    with pytest.raises(NodeError, match="not a plain file"):
        store.load()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_of_somebody_else_is_refused(store, tmp_path):
    store.add(stored(), SECRET)
    os.chown(tmp_path / "credentials" / "github.json", 12345, 12345)
    with pytest.raises(NodeError, match="belongs to uid 12345"):
        store.load()


def test_what_is_no_credential_is_refused_without_showing_it(store, tmp_path):
    store.add(stored(), SECRET)
    file = tmp_path / "credentials" / "github.json"
    file.write_text(
        '{"name": "other", "hosts": ["api.example"], "secret": "' + base64.b64encode(SECRET).decode() + '"}'
    )
    with pytest.raises(NodeError) as error:
        store.load()
    assert SECRET.decode() not in str(error.value)
    file.write_text("{")
    with pytest.raises(NodeError, match="cannot be used"):
        store.load()


@pytest.mark.parametrize(
    ("fields", "secret"),
    [
        ({}, b"short"),
        ({}, b"with\nnewline-in-it"),
        ({}, b"x" * 20_000),
        ({"header": "basic"}, b"no-colon-in-here"),
        ({"header": "ssh-key"}, b"no key at all at all"),
    ],
)
def test_secrets_that_cannot_be_sent(fields, secret):
    with pytest.raises(InvalidInput) as error:
        check_secret(stored(**fields), secret)
    assert secret.decode() not in str(error.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"hosts": ("*",)},
        {"hosts": ()},
        {"hosts": ("a b",)},
        {"header": "host"},
        {"header": "a b"},
        {"prefix": "a\r\nx: "},
        {"name": "../x"},
    ],
)
def test_credentials_that_cannot_be_kept(fields):
    with pytest.raises(InvalidInput):
        StoredCredential(**{"name": "c", "hosts": ("api.example",), **fields}).check()


@pytest.mark.parametrize(
    ("hosts", "target", "expected"),
    [
        (("api.example",), "api.example", True),
        (("api.example",), "www.api.example", False),
        (("api.example",), "*.api.example", False),
        (("*.example",), "api.example", True),
        (("*.example",), "*.api.example", True),
        (("*.example",), "*.example", True),
        (("*.example",), "example", False),
        (("*.example",), "*", False),
        (("*.example",), "evilexample", False),
        (("10.0.0.1/32",), "10.0.0.1/32", True),
        (("10.0.0.1/32",), "10.0.0.0/24", False),
    ],
)
def test_which_rules_a_credential_is_for(hosts, target, expected):
    assert covers(hosts, target) is expected


def test_headers():
    assert read_header(None, None) == ("authorization", "Bearer ")
    assert read_header("X-Api-Key", None) == ("x-api-key", "")
    assert read_header("X-Api-Key", "Key ") == ("x-api-key", "Key ")


class MemoryKeyring(keyring.backend.KeyringBackend):
    priority = 1

    def __init__(self):
        super().__init__()
        self.kept = {}

    def get_password(self, service, username):
        return self.kept.get((service, username))

    def set_password(self, service, username, password):
        self.kept[service, username] = password

    def delete_password(self, service, username):
        del self.kept[service, username]


def test_the_system_keyring_keeps_the_secret_and_the_file_does_not(store, tmp_path):
    before, memory = keyring.get_keyring(), MemoryKeyring()
    keyring.set_keyring(memory)
    try:
        store.add(stored(place="keyring"), SECRET)
        assert store.load()[0].secret == SECRET
        assert SECRET not in (tmp_path / "credentials" / "github.json").read_bytes()
        assert base64.b64encode(SECRET) not in (tmp_path / "credentials" / "github.json").read_bytes()
        store.remove("github")
        assert memory.kept == {}
    finally:
        keyring.set_keyring(before)


def encodings(secret):
    text = secret.decode()
    yield text
    yield quote(text, safe="")
    yield re.sub("%..", lambda escape: escape.group().lower(), quote(text, safe=""))
    yield quote_plus(text)
    yield secret.hex()
    yield secret.hex().upper()
    for before in (b"", b"a", b"ab"):
        for after in (b"", b"z", b"zz"):
            yield base64.b64encode(before + secret + after).decode()
            yield base64.urlsafe_b64encode(before + secret + after).decode()
    yield json.dumps(text)
    yield json.dumps(json.dumps({"argv": [text]}))


@pytest.mark.parametrize("secret", [SECRET, b'quo"te\\and\\back', b"plain-and-long-enough"])
def test_every_form_is_taken_out(secret):
    redactor = learned(secret)
    for form in encodings(secret):
        cleaned = redactor.clean(note(f"before {form} after")).note
        assert "[credential c0]" in cleaned, form
        assert cleaned.startswith("before ")
        assert cleaned.endswith(" after")
        assert secret.decode() not in cleaned


@given(st.binary(min_size=16, max_size=40), st.binary(max_size=9), st.binary(max_size=9))
def test_base64_at_any_place_is_found(secret, before, after):
    code = base64.b64encode(before + secret + after).decode()
    assert "[credential c0]" in learned(secret).clean(note(code)).note


@given(st.text(max_size=60))
def test_what_has_no_secret_stays_as_it_is(text):
    event = note(text)
    assert learned(SECRET).clean(event) is event


def test_all_texts_of_an_event_and_nothing_else():
    text = SECRET.decode()
    event = note(
        "",
        ToolCall,
        name="exec",
        arguments=json.dumps({"argv": ["curl", f"-HAuthorization: {text}"]}),
        tool_call=f"id-{text}",
    )
    cleaned = learned(SECRET).clean(event)
    assert json.loads(cleaned.arguments) == {"argv": ["curl", "-HAuthorization: [credential c0]"]}
    assert cleaned.scope.tool_call == "id-[credential c0]"
    assert (cleaned.scope.run, cleaned.name, cleaned.t_ns) == ("r", "exec", 1)


def test_parts_that_give_a_secret_away():
    key = "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEAAAAABG5vbmUAAAAEbm9uZQ\nAAAAAAAAABAAAAMwAAAAtzc2gtZWQyNTUxOQ\n-----END OPENSSH PRIVATE KEY-----\n"
    redactor = learned(b"someone:the-password", key.encode())
    assert redactor.clean_text("the-password") == "[credential c0]"
    assert redactor.clean_text(f"x {base64.b64encode(b'someone:the-password').decode()}").startswith(
        "x [credential c0]"
    )
    assert redactor.clean_text("AAAAAAAAABAAAAMwAAAAtzc2gtZWQyNTUxOQ") == "[credential c1]"
    assert redactor.clean_text("-----BEGIN OPENSSH PRIVATE KEY-----") == "-----BEGIN OPENSSH PRIVATE KEY-----"


def test_an_event_that_cannot_be_written_without_it_is_no_event():
    event = note("", VerdictGiven, subject="s", verdict="allow", rule="r", reason="x")
    assert learned(b"verdict.given").clean(event) == event, "names of kinds are the node's own"
    own_word = learned(b"containment.action-x")
    assert own_word.clean(event) is event
    with pytest.raises(RecordError, match="own words"):
        learned(b"degraded").clean(note("", SensorStatus, sensor="s", state="degraded", detail=""))


def test_the_log_has_no_secret(caplog):
    logger = logging.getLogger("vallum.test.redaction")
    handler = logging.Handler()
    seen = []
    handler.emit = lambda record: seen.append(logging.Formatter().format(record))
    handler.addFilter(LogFilter(learned(SECRET).clean_text))
    logger.addHandler(handler)
    try:
        try:
            raise ValueError(SECRET.decode())
        except ValueError:
            logger.exception("failed with %s", SECRET.decode())
    finally:
        logger.removeHandler(handler)
    assert SECRET.decode() not in seen[0]
    assert seen[0].count("[credential c0]") == 2


def test_canaries():
    assert check_canaries({"a": b"12345678"}) == {"a": b"12345678"}
    for bad in ({"a": b"1234567"}, {"a b": b"12345678"}, {"a": b"x" * 5000}):
        with pytest.raises(InvalidInput):
            check_canaries(bad)
    first, second = make_planted(), make_planted()
    assert all(one.value in first[0] for one in first[1])
    assert {one.value for one in first[1]}.isdisjoint(one.value for one in second[1])
    store = [one.value for one in guard_secrets([])]
    assert store == []
