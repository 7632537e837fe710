"""The Python face, gathered: a node, its sandboxes, their steps, sessions and files.

Example::

    async with vallum.Node() as node:
        async with node.sandbox() as sb:
            result = await sb.exec(["python3", "-c", "print(1)"], timeout_s=10)
"""

from __future__ import annotations

from vallum.client.command import ExecResult, Process
from vallum.client.node import EventView, Node, SandboxOpener
from vallum.client.sandbox import Sandbox
from vallum.client.session import Session
from vallum.client.tools import HostTool

__all__ = ["EventView", "ExecResult", "HostTool", "Node", "Process", "Sandbox", "SandboxOpener", "Session"]
