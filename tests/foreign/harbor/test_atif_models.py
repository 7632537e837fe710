"""Our ATIF documents against Harbor's public models, which run in an environment of their own (Python 3.12)."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from vallum.core.events import Record
from vallum.core.messages import Media, Message, Text
from vallum.record.export.atif import AtifFormat
from vallum.record.export.base import ChosenRun
from vallum.record.trajectory_fold import fold_trajectories
from vallum.testing.conversations import Conversations, call, number_events, say, tell
from vallum.testing.incident import tell_incident

PYTHON = Path(__file__).parents[3] / ".venv-harbor/bin/python"
CHECK = """
import sys
from harbor.models.trajectories import Trajectory
for path in sys.argv[1:]:
    told = Trajectory.model_validate_json(open(path).read())
    print(path, len(told.steps), len(told.subagent_trajectories or []))
"""

pytestmark = pytest.mark.skipif(
    not PYTHON.exists(), reason="Harbor is not installed: scripts/setup --dev does it where there is a Python 3.12"
)


def write(records: list[Record], directory: Path) -> list[Path]:
    chosen = ChosenRun("r", fold_trajectories(records)[1], lambda: iter(records))
    paths = []
    for file in AtifFormat().write([chosen]):
        paths.append(directory / file.name)
        paths[-1].write_bytes(file.data)
    return paths


def validate(paths: list[Path]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([PYTHON, "-c", CHECK, *paths], capture_output=True, text=True, timeout=100)


def talk() -> Conversations:
    told = Conversations()
    told.command(["pip", "install", "x"])
    image = Message("user", (Text("look"), Media("image/png", "sha256:ab", 3)))
    calls = [call("task", 1, prompt="Count the files in /usr."), call("bash", 2, command="x")]
    asked = told.converse(
        [say("system", "s"), image], Text("\x1b[2J\u202e"), *calls, logprobs=[-0.1], completion_token_ids=[1]
    )
    told.converse([say("user", "Count the files in /usr.")], Text("12"))
    told.accuse(1, told.refuse(1))
    told.kill(2, 0)
    told.converse([*asked, tell(1, "12")], Text(""))
    told.converse([*asked, tell(1, "13"), tell(2, "")], Text("another way"))
    told.close_episode()
    return told


def test_harbor_takes_every_document(tmp_path: Path) -> None:
    paths = [*write(talk().records(), tmp_path), *write(number_events(tell_incident()), tmp_path)]
    assert len(paths) >= 4
    done = validate(paths)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(paths)
    assert any(line.endswith(" 1") for line in done.stdout.splitlines())


def test_harbor_refuses_what_breaks_the_format(tmp_path: Path) -> None:
    path = write(talk().records(), tmp_path)[0]
    document = json.loads(path.read_bytes())
    document["steps"][0]["step_id"] = 7
    path.write_text(json.dumps(document))
    done = validate([path])
    assert done.returncode != 0
    assert "sequential" in done.stderr
