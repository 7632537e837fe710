"""A node of its own for every attack. Everything an attack contacts is inside the cell that the test made."""

import pytest

import vallum


@pytest.fixture
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("a")


@pytest.fixture
async def node(home):
    async with vallum.Node(home=home) as node:
        yield node


@pytest.fixture
def code():
    """Python that runs in the cell, as a command."""
    return lambda text: ["python3", "-c", text]
