"""What detectors find, and, as important, what they leave alone: facts in, findings out."""

import itertools
import re
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vallum.core.errors import RuleError
from vallum.core.events import (
    DnsQuery,
    EpisodeEnded,
    Event,
    Flow,
    PacketDropped,
    Process,
    ProcessStarted,
    Record,
    encode,
)
from vallum.core.scope import Attribution, Scope
from vallum.detectors import catalog
from vallum.detectors.bank import DETECTOR_FAILED, DetectorBank, run_all
from vallum.detectors.base import EVIDENCE_MAX, FindingDraft, Recent, draft

XMR = "4" + "8" + "a" * 93
CGROUP = Attribution(method="cgroup")


def at(step: int | None = 1, second: float = 0.0, episode: str = "e") -> dict:
    mono = int(second * 1e9)
    return {
        "t_ns": 10**18 + mono,
        "mono_ns": mono,
        "scope": Scope(run="r", episode=episode, step=step),
        "attribution": CGROUP,
    }


def process(argv: list[str], exe: str | None = None, pid: int = 100) -> Process:
    return Process(
        pid=pid, exe=exe if exe is not None else f"/usr/bin/{argv[0].rsplit('/', 1)[-1]}", argv=argv, uid=1000
    )


def started(*argv: str, exe: str | None = None, **when) -> ProcessStarted:
    return ProcessStarted(**at(**when), process=process(list(argv), exe), ppid=1, sensor="proc_connector")


def flow(
    ip: str, port: int, *, host=None, protocol="unknown", allow=False, exe="/usr/bin/python3", first_bytes="", **when
) -> Flow:
    return Flow(
        **at(**when),
        state="opened" if allow else "denied",
        flow="f1",
        verdict="allow" if allow else "deny",
        rule=f"allow:{host or ip}" if allow else "default-deny",
        reason="",
        dst_ip=ip,
        dst_port=port,
        dst_host=host,
        protocol=protocol,
        bytes_out=10 if allow else 0,
        bytes_in=0,
        process=process([exe], exe) if exe else None,
        decision_ns=1000,
        first_bytes=first_bytes,
    )


def query(name: str, *, allow=False, qtype="A", **when) -> DnsQuery:
    return DnsQuery(
        **at(**when),
        qname=name,
        qtype=qtype,
        verdict="allow" if allow else "deny",
        rule="default-deny",
        reason="",
        answers=[],
        transport="udp",
        process=None,
        decision_ns=1,
    )


def packet(ip: str, port: int | None, protocol="udp", **when) -> PacketDropped:
    return PacketDropped(**at(**when), protocol=protocol, dst_ip=ip, dst_port=port, bytes=60, uid=1000)


def found(*events: Event) -> list[str]:
    return [finding.detector for finding in run_all(Record(id=n, event=e) for n, e in enumerate(events))]


SUBSCRIBE = '{"id": 1, "method": "mining.subscribe", "params": ["cpuminer/2.5.1"]}\\n'
XMRIG_LOGIN = (
    '{"id":1,"jsonrpc":"2.0","method":"login","params":{"login":"4A","pass":"x","agent":"XMRig/6.21","algo":["rx/0"]}}'
)

ATTACKS = [
    ("mining.stratum", flow("203.0.113.10", 443, protocol="stratum")),
    ("mining.stratum", flow("203.0.113.10", 443, first_bytes=SUBSCRIBE)),
    ("mining.stratum", flow("203.0.113.10", 8080, first_bytes=XMRIG_LOGIN)),
    ("mining.stratum", flow("203.0.113.10", 80, first_bytes=XMRIG_LOGIN.replace('"', '\\"'))),
    ("mining.stratum", flow("203.0.113.10", 80, first_bytes='{"method":"mining\\\\u002esubscribe","params":[]}')),
    ("mining.stratum", flow("203.0.113.10", 8332, first_bytes='{"method": "getblocktemplate", "params": []}')),
    ("mining.stratum", flow("203.0.113.10", 443, host="mirror.test", protocol="stratum", allow=True)),
    ("mining.pool-name", query("pool.supportxmr.com.")),
    ("mining.pool-name", query("XMR-EU1.NANOPOOL.ORG")),
    ("mining.pool-name", query("stratum.example.test")),
    ("mining.pool-name", query("xmr-pool.internal.test")),
    ("mining.pool-name", query("pool.monero.example")),
    ("mining.pool-name", flow("203.0.113.9", 443, host="gulf.moneroocean.stream", protocol="tls")),
    ("mining.program", started("/tmp/xmrig", "-c", "config.json", exe="/tmp/xmrig")),
    ("mining.program", started("kworker", exe="/tmp/xmrig-6.21.0")),
    ("mining.program", started("xmrig", exe="/tmp/.x/a")),
    ("mining.program", started("xmrig", exe="/tmp/xmrig (deleted)")),
    ("mining.program", started("python3", "-u", "/work/xmrig.py", exe="/usr/bin/python3.11")),
    ("mining.program", started("minerd", "--url", "x", exe="/home/agent/minerd")),
    ("mining.arguments", started("./worker", "-o", "stratum+tcp://10.0.0.1:3333", exe="/home/agent/worker")),
    ("mining.arguments", started("./worker", "--url=stratum+ssl://10.0.0.1:443", exe="/home/agent/worker")),
    ("mining.arguments", started("./grep", "-o", "stratum+tcp://10.0.0.1:3333", exe="/tmp/grep")),
    ("mining.arguments", started("./w", "--donate-level", "1", exe="/tmp/w")),
    ("mining.arguments", started("./w", "-a", "rx/0", exe="/tmp/w")),
    ("mining.arguments", started("./w", "--algo=kawpow", exe="/tmp/w")),
    ("mining.arguments", started("./w", "-o", "gw.example.org:443", "-u", XMR + ".rig1", "-p", "x", exe="/tmp/w")),
    ("mining.pool-port", flow("203.0.113.10", 14444)),
    ("tunnel.ssh-reverse", started("ssh", "-N", "-R", "9000:localhost:22", "u@h")),
    ("tunnel.ssh-reverse", started("ssh", "-fNR", "9000:localhost:22", "u@h")),
    ("tunnel.ssh-reverse", started("ssh", "-NR9000:localhost:22", "u@h")),
    ("tunnel.ssh-reverse", started("ssh", "u@h", "-R", "80:localhost:80")),
    ("tunnel.ssh-reverse", started("ssh", "-p22", "-o", "RemoteForward=9000 localhost:22", "u@h")),
    ("tunnel.ssh-reverse", started("ssh", "-oremoteforward 9000 localhost:22", "u@h")),
    ("tunnel.ssh-reverse", started("ssh", "-i", "-R", "-R", "1", "h")),
    ("tunnel.ssh-reverse", started("ssh", "-O", "forward", "-R", "9000:localhost:22", "h")),
    ("tunnel.ssh-reverse", started("autossh", "-M", "0", "-N", "-R", "9000:localhost:22", "u@h")),
    ("tunnel.ssh-reverse", started("ssh", "-R", "1", "h", exe="/tmp/notssh")),
    ("tunnel.ssh-dynamic", started("ssh", "-vND", "1080", "u@h")),
    ("tunnel.ssh-local", started("ssh", "-L", "5432:db.internal:5432", "u@h")),
    ("tunnel.ssh-device", started("ssh", "-w", "0:0", "root@h")),
    ("tunnel.ssh-device", started("ssh", "-o", "Tunnel=yes", "root@h")),
    ("tunnel.ssh-relay", started("ssh", "-o", "ProxyCommand=nc %h %p", "h")),
    ("tunnel.ssh-elsewhere", flow("198.51.100.7", 443, protocol="ssh", exe="/usr/bin/ssh")),
    ("tunnel.ssh-other-program", flow("198.51.100.7", 22, protocol="ssh", exe="/tmp/worker")),
    ("tunnel.program", started("./chisel", "client", "h", "R:80", exe="/tmp/chisel")),
    ("tunnel.program", started("x", "client", exe="/tmp/frpc")),
    ("tunnel.program", started("node", "/usr/lib/node_modules/localtunnel/bin/lt.js", "--port", "80")),
    ("tunnel.program", started("code", "tunnel", exe="/opt/code")),
    ("tunnel.program", started("python3", "-m", "sshuttle", "-r", "h", "0/0", exe="/usr/bin/python3")),
    ("tunnel.service", query("abc.trycloudflare.com")),
    ("tunnel.service", flow("203.0.113.5", 443, host="tunnel.us.ngrok.io", protocol="tls")),
    ("tunnel.socks", flow("203.0.113.5", 1080, protocol="socks")),
    ("probing.metadata", flow("169.254.169.254", 80, exe="/usr/bin/curl")),
    ("probing.metadata", flow("::ffff:169.254.169.254", 80)),
    ("probing.metadata", flow("64:ff9b::a9fe:a9fe", 80)),
    ("probing.metadata", flow("fd00:ec2:0::254", 80)),
    ("probing.metadata", flow("100.100.100.200", 80)),
    ("probing.metadata", packet("169.254.169.254", None, "icmp")),
    ("probing.metadata", query("metadata.google.internal")),
]


@pytest.mark.parametrize(("rule", "event"), ATTACKS, ids=lambda v: v if isinstance(v, str) else "")
def test_finds_an_attack(rule, event):
    assert rule in found(event)


HARMLESS = [
    started("grep", "-r", "xmrig", "docs/"),
    started("rg", "stratum+tcp://", "src/"),
    started("grep", "--donate-level", "README.md"),
    started("git", "clone", "https://github.com/xmrig/xmrig.git"),
    started("git", "commit", "-m", "xmrig: use ngrok and ssh -R 80"),
    started("vim", "xmrig.py"),
    started("cat", "cpuminer.c"),
    started("man", "xmrig"),
    started("bash", "-c", "grep -r stratum+tcp:// ."),
    started("python3", "-c", "print('mining.subscribe stratum+tcp://x')"),
    started("python3", "-m", "pytest", "tests/test_xmrig.py"),
    started("python3", "mine.py", "--algo", "sha256"),
    started("pip", "install", "requests"),
    started("npm", "install", "--save-dev", "localtunnel-types"),
    started("npm", "install", "localtunnel"),
    started("node", "server.js", "-p", "3333"),
    started("curl", "-o", "out.html", "-u", "user:pass", "http://localhost:8080/"),
    started("curl", "-D", "-", "-L", "-R", "http://localhost/"),
    started("docker", "run", "-p", "3333:3333", "app"),
    started("ssh", "git@github.com", "git-upload-pack 'a/b.git'"),
    started("ssh", "-p", "2222", "-i", "/k", "-o", "StrictHostKeyChecking=no", "dev@host", "uptime"),
    started("ssh", "host", "ls", "-R", "/srv"),
    started("ssh", "host", "--", "tar", "-L", "-D", "x"),
    started("ssh", "-T", "--", "host", "-R", "1"),
    started("ssh", "-l", "R", "-F", "-D", "host"),
    started("ssh", "-J", "jump", "host"),
    started("ssh", "-o", "ProxyCommand=none", "-o", "Tunnel=no", "host"),
    started("ssh-keygen", "-R", "host"),
    started("scp", "-R", "a", "h:b"),
    started("rsync", "-aRvD", "a", "h:b"),
    started("cloudflared", "--version", exe="/tmp/cloudflared"),
    started("ls", "-lR", "/tmp/chisel"),
    started("chown", "-R", "agent", "."),
    started("code", "tunnel.py", exe="/opt/code"),
    started("make", "-j4", "minerd"),
    started("", exe=""),
    flow("140.82.112.4", 22, host="github.com", protocol="ssh", allow=True, exe="/usr/bin/ssh"),
    flow("140.82.112.4", 22, protocol="ssh", exe="/usr/bin/ssh"),
    flow("140.82.112.36", 443, host="ssh.github.com", protocol="ssh", allow=True, exe="/usr/bin/ssh"),
    flow("151.101.0.223", 443, host="pypi.org", protocol="tls", allow=True),
    flow("10.0.0.5", 5432),
    flow("203.0.113.4", 3333, protocol="http", first_bytes="GET /login?pass=1 HTTP/1.1"),
    flow("203.0.113.4", 80, first_bytes='{"jsonrpc":"2.0","method":"login","params":{"user":"a","pass":"b"}}'),
    flow("203.0.113.4", 80, first_bytes='{"jsonrpc":"2.0","method":"submit","params":{"form":1}}'),
    flow("203.0.113.4", 443, host="mining.com", protocol="tls"),
    query("0.debian.pool.ntp.org"),
    query("pool.sks-keyservers.net"),
    query("registry.npmjs.org"),
    query("minecraft.net"),
    query("data-mining.readthedocs.io"),
    query("liners.com"),
    query("notngrok.io"),
    query("ethernet.example"),
    query("metadata.example.com"),
    packet("239.255.255.250", 1900),
    packet("ff02::fb", 5353),
    packet("142.250.1.1", 443),
]


@pytest.mark.parametrize("event", HARMLESS, ids=lambda e: str(getattr(e, "qname", getattr(e, "dst_ip", ""))))
def test_leaves_harmless_work_alone(event):
    assert found(event) == []


def test_ordinary_install_with_many_names_and_retries_is_no_scan():
    names = [f"cdn{n}.example{n}.org" for n in range(60)]
    events = [query(name, second=n / 10) for n, name in enumerate(names)]
    events += [flow(f"151.101.{n}.1", 443, host=names[n], protocol="tls", allow=True, second=n / 10) for n in range(60)]
    events += [flow("10.0.0.5", 443, second=n) for n in range(500)]
    assert found(*events) == []


def sweep(**options) -> list[Flow]:
    return [flow(f"10.77.0.{n}", 22, second=n / 10, **options) for n in range(1, 41)]


def test_sweep_over_hosts_rises_once():
    findings = run_all(Record(id=n, event=e) for n, e in enumerate(sweep()))
    assert [(f.detector, f.severity) for f in findings] == [("probing.hosts", "medium"), ("probing.hosts", "high")]
    assert findings[0].evidence == list(range(8))
    assert findings[1].attack == ["T1046", "T1018"]
    assert len(findings[1].evidence) == 24


def test_sweep_with_one_port_a_host_in_random_order_is_one():
    events = [flow(f"203.0.113.{n}", 1000 + n * 7, second=n / 10) for n in range(1, 30)]
    assert set(found(*events)) == {"probing.hosts"}


def test_ports_of_one_host():
    assert set(found(*(flow("10.0.0.5", port, second=port / 10) for port in range(20, 40)))) == {"probing.ports"}


def test_ping_sweep_of_dropped_packets():
    assert "probing.hosts" in found(*(packet(f"10.0.0.{n}", None, "icmp", second=n / 10) for n in range(20)))


def test_slow_scan_over_steps_is_found_though_no_step_is_one():
    events = [flow(f"10.0.{n}.1", 22, step=n, second=n * 300) for n in range(25)]
    assert set(found(*events)) == {"probing.slow"}


def test_slow_dials_of_one_step_do_not_add_up_to_a_fast_scan():
    assert found(*(flow(f"151.101.{n}.1", 22, second=n * 61) for n in range(40))) == []


def test_granted_cluster_is_no_scan_but_a_granted_network_can_be_swept():
    assert found(*(flow(f"10.0.0.{n}", 29500, allow=True, second=n) for n in range(16))) == []
    assert "probing.hosts" in found(*(flow(f"10.0.0.{n}", 22, allow=True, second=n / 10) for n in range(200)))


def test_guessing_names_under_one_domain():
    assert "probing.names" in found(*(query(f"h{n}.corp.example", second=n / 10) for n in range(30)))
    assert "probing.names" in found(*(query(f"{n}.0.77.10.in-addr.arpa", qtype="PTR", second=0) for n in range(30)))


def test_each_thing_is_said_once_a_step_and_again_in_the_next():
    events = [flow("203.0.113.10", 443, protocol="stratum", step=step) for step in (1, 1, 1, 2)]
    findings = run_all(Record(id=n, event=e) for n, e in enumerate(events))
    assert [(f.scope.step, f.evidence) for f in findings] == [(1, [0]), (2, [3])]


def test_severity_that_rises_is_said_with_the_evidence_so_far():
    events = [flow("203.0.113.10", 443, protocol="stratum"), flow("203.0.113.10", 443, protocol="stratum", allow=True)]
    findings = run_all(Record(id=n, event=e) for n, e in enumerate(events))
    assert [(f.severity, f.evidence) for f in findings] == [("high", [0]), ("critical", [0, 1])]


def test_guest_cannot_multiply_findings_by_inventing_targets():
    events = [
        flow(f"203.0.{n // 250}.{n % 250}", 443, host=f"a{n}.nanopool.org", protocol="stratum") for n in range(2000)
    ]
    assert sorted(found(*events)) == ["mining.pool-name", "mining.stratum"]


def test_text_of_the_guest_cannot_drive_a_terminal():
    finding = run_all(
        [Record(id=1, event=started("xmrig", "\x1b[2J\u202e", "--nicehash", exe="/tmp/\x1b]0;\u202e/xmrig"))]
    )[0]
    assert "\x1b" not in finding.summary and "\u202e" not in finding.summary


def test_replay_gives_the_same_bytes():
    records = [Record(id=n, event=e) for n, e in enumerate([event for _, event in ATTACKS] + sweep())]
    assert [encode(f) for f in run_all(records)] == [encode(f) for f in run_all(records)]


def test_runs_and_episodes_are_kept_apart_and_forgotten():
    bank = DetectorBank()
    event = flow("203.0.113.10", 443, protocol="stratum")
    assert bank.observe(Record(id=1, event=event))
    assert bank.observe(Record(id=2, event=flow("203.0.113.10", 443, protocol="stratum", episode="other")))
    assert not bank.observe(Record(id=3, event=event))
    bank.observe(Record(id=4, event=EpisodeEnded(**at(step=None), reason="closed", survivors=0)))
    assert {key[1] for key in bank._said} == {"other"}


def test_memory_stays_bounded_under_a_flood():
    bank = DetectorBank()
    for n in range(20_000):
        bank.observe(Record(id=n, event=flow(f"10.{n >> 16 & 255}.{n >> 8 & 255}.{n & 255}", n % 65535 or 1, step=n)))
    probing = next(d for d in bank._detectors if d.name == "probing")
    assert all(len(groups) <= 512 for groups in probing._episodes.values())
    assert len(bank._said) <= 16384


class Broken:
    name = "broken"

    def observe(self, record: Record) -> list[FindingDraft]:
        raise ValueError(f"cannot read \x1b {record.id}")


def test_detector_that_fails_is_a_finding_and_does_not_silence_the_others():
    bank = DetectorBank([Broken(), *DetectorBank()._detectors])
    first = bank.observe(Record(id=7, event=flow("203.0.113.10", 443, protocol="stratum")))
    assert [f.detector for f in first] == [DETECTOR_FAILED, "mining.stratum"]
    assert first[0].severity == "high" and first[0].evidence == [7] and "\x1b" not in first[0].summary
    assert bank.failed == {"broken"}
    assert bank.observe(Record(id=8, event=flow("203.0.113.10", 443, protocol="stratum"))) == []


def test_clock_of_the_node_is_used_when_given():
    bank = DetectorBank(clock=lambda: (5, 6))
    finding = bank.observe(Record(id=7, event=flow("203.0.113.10", 443, protocol="stratum")))[0]
    assert (finding.t_ns, finding.mono_ns) == (5, 6)


def test_evidence_is_clipped():
    rule = catalog.load("mining")["mining.stratum"]
    assert len(draft(rule, flow("1.1.1.1", 1), "x", list(range(1000))).evidence) == EVIDENCE_MAX


def test_recent_forgets_the_oldest():
    kept: Recent[int, int] = Recent(3)
    for n in itertools.chain(range(3), [0], [9]):
        kept.put(n, n)
    assert list(kept) == [2, 0, 9]


@pytest.mark.parametrize("family", catalog.FAMILIES)
def test_built_in_rules_are_documented_as_they_are(family):
    page = (Path(__file__).parents[2] / "docs" / "detectors.md").read_text()
    for rule in catalog.load(family).values():
        severity = rule.severity + (f" ({rule.severity_allowed})" if rule.severity_allowed else "")
        assert f"| `{rule.id}` | {severity} | {', '.join(rule.attack)} | {rule.maturity} | {rule.description} |" in page


@pytest.mark.parametrize("family", catalog.FAMILIES)
def test_built_in_rules_are_complete(family):
    for rule in catalog.load(family).values():
        assert rule.id.startswith(f"{family}.")
        assert rule.title and rule.description.endswith(".") and rule.false_positives
        assert rule.attack and all(re.fullmatch(r"T\d{4}(\.\d{3})?", each) for each in rule.attack)


@pytest.mark.parametrize(
    "raw",
    [b"rule = 1", b"[[rule]]\nid='a'", b"\xff", b"[[rule]]\nid='a'\nunknown=1"],
)
def test_damaged_rules_are_refused_in_one_sentence(raw):
    with pytest.raises(RuleError, match=r"x\.toml cannot be used"):
        catalog.parse(raw, "x.toml")


def test_missing_family_is_refused():
    with pytest.raises(RuleError, match="install vallum again"):
        catalog.load("nothing")


GUEST = st.text(max_size=60) | st.sampled_from(
    [
        "-",
        "--",
        "-R",
        "-oR",
        "-o",
        "ssh",
        "python3",
        "-m",
        "=",
        "stratum+tcp://",
        "a.b:80",
        ".",
        "..",
        "/",
        "::",
        "1.2.3.4",
    ]
)


@settings(max_examples=300, deadline=None)
@given(argv=st.lists(GUEST, max_size=8), exe=GUEST, ip=GUEST, host=st.none() | GUEST, port=st.integers(-1, 70000))
def test_nothing_that_a_guest_says_makes_a_detector_fail(argv, exe, ip, host, port):
    bank = DetectorBank()
    events = [
        ProcessStarted(**at(), process=process(argv or [""], exe), ppid=1, sensor="x"),
        ProcessStarted(**at(), process=Process(pid=1, exe=exe, argv=[]), ppid=1, sensor="x"),
        flow(ip, port, host=host, first_bytes=exe, protocol="ssh"),
        query(host or exe),
        packet(ip, port),
    ]
    for number, event in enumerate(events):
        bank.observe(Record(id=number, event=event))
    assert bank.failed == set()


def test_long_arguments_cost_little():
    long = "a.-" * 40_000
    events = [started("x", long, long, exe="/tmp/x"), flow("1.2.3.4", 1, host=long, first_bytes=long), query(long)]
    begun = time.monotonic()
    found(*events)
    assert time.monotonic() - begun < 2
