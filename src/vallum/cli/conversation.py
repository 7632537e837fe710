"""The conversations of a run as a terminal shows them. All words pass ``core.text.show``; none is read as markup."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from vallum.core.text import show
from vallum.record.trajectory import EpisodeTrajectories
from vallum.web.conversation import TurnView, cut_lines, describe_facts, view_conversations

SHOWN_TURNS = 40
_TONES = {"system": "yellow", "user": "cyan", "agent": "green"}


def print_conversations(episodes: Sequence[EpisodeTrajectories]) -> None:
    """Turn by turn: what was said, what was called, what the kernel saw and what was refused."""
    console = Console(highlight=False)
    views, more = view_conversations(episodes)
    for view in views:
        one = view.trajectory
        console.print(
            Text.assemble(
                (f"\nconversation {show(one.episode, 64)}/{show(one.branch, 40)}", "bold"),
                (f"  {show(view.title, 160)}  {show(one.model, 80)}", "dim"),
            )
        )
        for turn in view.turns[:SHOWN_TURNS]:
            _print_turn(console, turn)
        if rest := view.omitted + max(0, len(view.turns) - SHOWN_TURNS):
            console.print(Text(f"... and {rest} more turns: vallum data export {show(one.run, 64)}", "dim"))
    if more:
        console.print(Text(f"... and {more} more conversations", "dim"))


def _print_turn(console: Console, view: TurnView) -> None:
    turn = view.turn
    head = Text(f"{view.number:>4} {turn.source:6} ", _TONES.get(turn.source, ""))
    lines = cut_lines(turn.text, 3) if turn.text else []
    for place, line in enumerate(lines or ([""] if not view.calls else [])):
        console.print(Text.assemble(head if place == 0 else " " * 12, line), soft_wrap=True)
    for place, (name, arguments) in enumerate(view.calls[:8]):
        words = f"{show(name, 60)}: {cut_lines(arguments, 1)[0]}"
        console.print(Text.assemble(head if place == 0 and not lines else " " * 12, (words, "bold")), soft_wrap=True)
    for result in turn.results[:8]:
        for line in cut_lines(result.text, 2):
            console.print(Text(f"{' ' * 12}| {line}", "dim"), soft_wrap=True)
    if view.facts is None:
        return
    console.print(Text(f"{' ' * 12}{describe_facts(view.facts)}", "blue"), soft_wrap=True)
    for denial in view.facts.denials[:4]:
        words = f"denied {denial.count} x {show(denial.target, 90)} ({show(denial.rule, 60)})"
        console.print(Text(f"{' ' * 12}{words}", "red"), soft_wrap=True)
    for finding in view.facts.findings[:4]:
        words = f"finding {finding.severity}: {show(finding.title, 90)}"
        console.print(Text(f"{' ' * 12}{words}", "yellow"), soft_wrap=True)
