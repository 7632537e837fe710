"""Inspect AI's own checks of a sandbox provider, unmodified and all of them: none is skipped or expected to fail."""

import os

import pytest

pytest.importorskip("inspect_ai", reason="Inspect AI is not installed: pip install 'vallum[inspect]'")

from inspect_ai.util._sandbox import self_check
from inspect_ai.util._sandbox.self_check import *  # noqa: F403

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: the checks add a user in the cell"),
    pytest.mark.asyncio(loop_scope="module"),
]


async def test_every_check_is_here():
    theirs = {name for name in vars(self_check) if name.startswith("test_")}
    assert len(theirs) >= 44
    assert theirs <= set(globals())
