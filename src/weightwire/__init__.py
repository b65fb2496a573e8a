"""weightwire: a starting inference replica takes its weights from a running one.

    with weightwire.publish(module, identity, url="host:port"):
        ...serve...

    report = weightwire.receive(module, identity, url="host:port")

    tensors = weightwire.receive_tensors(identity, max_nbytes=bytes, url="host:port").tensors

    with weightwire.relay(module, identity, url="host:port"):
        ...what was received is served, too, from its first bytes on...

    with weightwire.relay(module, identity, url="host:port", disk=read):
        ...where nobody serves it, ``read`` fills it, and others follow; of programs that start together, one reads...

Importing this package imports nothing heavy: names are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weightwire.config import Settings
    from weightwire.errors import FenceTimeout, WeightwireError
    from weightwire.identity.identity import Identity, module_identity
    from weightwire.loaders.filling import Filling
    from weightwire.loaders.module import filling, publish, ranks, receive, receive_tensors, relay
    from weightwire.loaders.published import Published
    from weightwire.loaders.tensors import NamedTensors
    from weightwire.manifest.construction import capture
    from weightwire.target.report import LoadReport
    from weightwire.types import Coordinates, Role, Stage

__version__ = "0.1.0"

_HOMES = {
    "Coordinates": "weightwire.types",
    "FenceTimeout": "weightwire.errors",
    "Filling": "weightwire.loaders.filling",
    "Identity": "weightwire.identity.identity",
    "LoadReport": "weightwire.target.report",
    "NamedTensors": "weightwire.loaders.tensors",
    "Published": "weightwire.loaders.published",
    "Role": "weightwire.types",
    "Settings": "weightwire.config",
    "Stage": "weightwire.types",
    "WeightwireError": "weightwire.errors",
    "capture": "weightwire.manifest.construction",
    "filling": "weightwire.loaders.module",
    "module_identity": "weightwire.identity.identity",
    "publish": "weightwire.loaders.module",
    "ranks": "weightwire.loaders.module",
    "receive": "weightwire.loaders.module",
    "receive_tensors": "weightwire.loaders.module",
    "relay": "weightwire.loaders.module",
}

__all__ = [
    "Coordinates",
    "FenceTimeout",
    "Filling",
    "Identity",
    "LoadReport",
    "NamedTensors",
    "Published",
    "Role",
    "Settings",
    "Stage",
    "WeightwireError",
    "capture",
    "filling",
    "module_identity",
    "publish",
    "ranks",
    "receive",
    "receive_tensors",
    "relay",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
