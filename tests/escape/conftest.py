"""A home of its own for every test of the walls."""

import pytest


@pytest.fixture
def home(tmp_path_factory):
    path = tmp_path_factory.mktemp("h")
    path.chmod(0o700)
    return path
