"""The targets of ``make fuzz``: their seeds, what once broke them, and a few inputs that are near those."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

FUZZ = Path(__file__).resolve().parents[1] / "fuzz"
NAMES = sorted(path.stem for path in (FUZZ / "targets").glob("*.py"))


@pytest.fixture
def target(request, monkeypatch):
    monkeypatch.syspath_prepend(str(FUZZ))
    return importlib.import_module(f"targets.{request.param}")


def corpus_of(name: str, target) -> list[bytes]:
    kept = [path.read_bytes() for path in sorted((FUZZ / "corpus" / name).glob("*"))]
    return [*getattr(target, "SEEDS", ()), *kept]


@pytest.mark.parametrize("target", NAMES, indirect=True)
def test_corpus(target):
    corpus = corpus_of(target.__name__.rpartition(".")[2], target)
    assert corpus
    for data in corpus:
        target.fuzz(data)


@pytest.mark.parametrize("target", NAMES, indirect=True)
def test_near_the_corpus(target):
    corpus = corpus_of(target.__name__.rpartition(".")[2], target)

    @settings(max_examples=40, deadline=2000, suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def run(data):
        base = data.draw(st.sampled_from(corpus))
        at = data.draw(st.integers(0, len(base)))
        end = data.draw(st.integers(at, min(len(base), at + 8)))
        target.fuzz(base[:at] + data.draw(st.binary(max_size=8)) + base[end:])

    run()
