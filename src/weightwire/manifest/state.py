"""Declared state that is not a tensor: collected from modules, bounded, applied, compared.

A module declares it with ``export_state() -> dict[str, Json]`` and ``import_state(dict)``. Kernels depend on it
(scalars such as ``alpha``), so it travels with the manifest and is part of the content id. A target applies what the
source offers *before* it takes its own catalogue; the planner then finds whatever still differs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Protocol

from weightwire.errors import CatalogueError, ManifestMismatch, ProtocolError
from weightwire.types import Json, State

MAX_MODULE_BYTES = 64 * 1024
MAX_STATE_BYTES = 16 * 1024 * 1024
MAX_DEPTH = 8


class Stateful(Protocol):
    """What a module offers to take part."""

    def export_state(self) -> dict[str, Json]:
        """Finite JSON values, at most ``MAX_MODULE_BYTES``; equal objects give equal dicts."""
        ...

    def import_state(self, state: dict[str, Json]) -> None:
        """Take over what another instance exported; may turn optional tensors into ``None``."""
        ...


def collect(modules: Mapping[str, object]) -> dict[str, dict[str, Json]]:
    """State of all modules that declare some, by canonical path; modules with nothing to say are left out.

    Raises:
        CatalogueError: a value is not finite JSON, or too large; names the module.
    """
    found: dict[str, dict[str, Json]] = {}
    for path, module in modules.items():
        if _is_stateful(module):
            state = module.export_state()  # type: ignore[attr-defined]
            problem = _fault(state)
            if problem:
                raise CatalogueError(f"state of {path or 'the root module'} {problem}", "export small finite JSON")
            if state:
                found[path] = state
    if _size(found) > MAX_STATE_BYTES:
        raise CatalogueError(f"declared state is larger than {MAX_STATE_BYTES} bytes", "hold it in tensors")
    return found


def apply(modules: Mapping[str, object], state: State) -> None:
    """Give every module the state that was exported under its path.

    Raises:
        ManifestMismatch: a path leads to no module that takes state; nothing was applied then.
    """
    for path in state:
        if not _is_stateful(modules.get(path)):
            raise ManifestMismatch(
                f"the source declares state of {path or 'the root module'}, which takes none here",
                "build both sides from the same code",
            )
    for path, values in state.items():
        modules[path].import_state(dict(values))  # type: ignore[attr-defined]


def differences(expected: State, offered: State) -> list[str]:
    """One line for each module whose state differs, in order of path."""
    lines = []
    for path in sorted(expected.keys() | offered.keys()):
        ours, theirs = expected.get(path, {}), offered.get(path, {})
        keys = sorted(key for key in ours.keys() | theirs.keys() if not _same(ours, theirs, key))
        lines += [f"state of {path or 'the root module'}: {', '.join(keys[:3])} differ" for _ in keys[:1]]
    return lines


def check(state: State) -> None:
    """Check state that came from a peer.

    Raises:
        ProtocolError: it is out of bounds.
    """
    for path, values in state.items():
        problem = _fault(values) if isinstance(path, str) else "has no path"
        if problem:
            raise ProtocolError(f"offered state {problem}", "the peer is broken or of another version")
    if _size(state) > MAX_STATE_BYTES:
        raise ProtocolError("offered state is too large", "the peer is broken or of another version")


def _is_stateful(module: object) -> bool:
    """As ``isinstance(module, Stateful)``, which is slow enough to count over thousands of modules."""
    kind = type(module)
    return callable(getattr(kind, "export_state", None)) and callable(getattr(kind, "import_state", None))


def _same(ours: Mapping[str, Json], theirs: Mapping[str, Json], key: str) -> bool:
    return key in ours and key in theirs and json.dumps(ours[key]) == json.dumps(theirs[key])


def _size(state: State) -> int:
    return sum(len(path) + len(json.dumps(dict(values))) for path, values in state.items())


def _fault(values: Any) -> str:
    """What is wrong with one module's state; empty where nothing is."""
    if not isinstance(values, Mapping):
        return "is not a mapping"
    if not _is_json(dict(values), 0):
        return "is not finite JSON with text keys"
    return "is too large" if len(json.dumps(dict(values))) > MAX_MODULE_BYTES else ""


def _is_json(value: Any, depth: int) -> bool:
    if depth > MAX_DEPTH:
        return False
    if value is None or isinstance(value, bool | str):
        return True
    if isinstance(value, int):
        return abs(value) < 1 << 63
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, list):
        return all(_is_json(item, depth + 1) for item in value)
    return isinstance(value, dict) and all(
        isinstance(key, str) and _is_json(item, depth + 1) for key, item in value.items()
    )
