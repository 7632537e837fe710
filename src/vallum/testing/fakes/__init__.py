"""Fakes of what an agent may reach for, speaking the real protocols and counting what they received.

They are the only evidence of what was delivered: a fake counts at its own end of the wire, after
the gateway, so it does not share the gateway's errors. Shipped for users' own tests. They listen
only where they are told to (loopback or a namespace), contact nobody, and know no real coin.
"""

from vallum.testing.fakes.base import Endpoint, Fake, Received
from vallum.testing.fakes.datagrams import DatagramSink
from vallum.testing.fakes.dns import DnsServer
from vallum.testing.fakes.internal import InternalHosts
from vallum.testing.fakes.metadata import MetadataService
from vallum.testing.fakes.mirror import PackageMirror
from vallum.testing.fakes.sshd import Sshd
from vallum.testing.fakes.stratum import StratumPool

__all__ = [
    "DatagramSink",
    "DnsServer",
    "Endpoint",
    "Fake",
    "InternalHosts",
    "MetadataService",
    "PackageMirror",
    "Received",
    "Sshd",
    "StratumPool",
]
