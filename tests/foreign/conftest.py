"""Inspect's provider with a node of its own, shared by the tests of a module."""

import pytest
import pytest_asyncio


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def provider(tmp_path_factory):
    """The provider's class, started once for the module."""
    from vallum.compat.inspect import VallumSandboxEnvironment

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VALLUM_HOME", str(tmp_path_factory.mktemp("h")))
        await VallumSandboxEnvironment.task_init("startup", None)
        yield VallumSandboxEnvironment
        await VallumSandboxEnvironment.task_cleanup("shutdown", None, True)


@pytest_asyncio.fixture(loop_scope="module")
async def sandbox_env(provider):
    """A fresh cell, by the name that Inspect's own checks ask for."""
    environments = await provider.sample_init("checks", None, {})
    yield environments["default"]
    await provider.sample_cleanup("checks", None, environments, False)
