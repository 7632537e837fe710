"""Who answers an exchange: the granted server, the package cache, the model gateway, the node's tools.

Each service is a module of this folder with ``make_service(carrier) -> Service``, called once for each flow that
needs it. What lasts longer than a flow is the module's own to keep, by ``carrier.cell``.
"""

from __future__ import annotations

import contextlib
import importlib
from types import ModuleType
from typing import get_args

from vallum.gateway.http.exchange import Carrier, Service
from vallum.gateway.kit import ServiceName


class NoServiceError(Exception):
    """This build of the gateway has no such service."""


def load_services() -> None:
    """Load every service that there is, while files can be read: the gateway gives that up before it serves."""
    for name in get_args(ServiceName):
        with contextlib.suppress(NoServiceError):
            _load(name)


def make_service(name: ServiceName, carrier: Carrier) -> Service:
    """The service of that name for one flow.

    Raises:
        NoServiceError: there is none of that name.
    """
    service: Service = _load(name).make_service(carrier)
    return service


def _load(name: ServiceName) -> ModuleType:
    path = f"{__name__}.{name}"
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name != path:
            raise
        raise NoServiceError(f"this gateway has no service {name}") from error
