"""The definition of a cell, in tests: every backend passes all of them.

A test module provides one fixture and takes the tests in::

    import pytest
    pytest.register_assert_rewrite("vallum.testing.sandbox_conformance")
    from vallum.testing.sandbox_conformance import *  # noqa: E402, F403

    @pytest.fixture
    async def make_cell(...):
        ...
        yield make          # async def make(*, limits=Limits(), mounts=(), hostname="cell") -> Cell
        ...                 # close what is still open

``make`` builds a cell over the image ``host`` (with ``mounts`` as of ``vallum.sandbox.images.mounts``). What a
cell may lack is told by the cell itself: ``rootless`` (one user), attribution by ``lineage`` instead of ``cgroup``.
The tests contact nothing outside of the cells and end by themselves.
"""

from vallum.testing.sandbox_conformance.commands import *  # noqa: F403
from vallum.testing.sandbox_conformance.files import *  # noqa: F403
from vallum.testing.sandbox_conformance.isolation import *  # noqa: F403
from vallum.testing.sandbox_conformance.life import *  # noqa: F403
from vallum.testing.sandbox_conformance.steps import *  # noqa: F403
