"""State of vLLM's modules that is no tensor: what loading changed travels, and is compared (hazards H05, H06).

vLLM's modules declare none. So the plain values of every module are noted at construction; whatever differs once the
weights are in place was decided by them, belongs to the manifest, and is set on a target before its own is compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from weightwire.errors import CatalogueError, ManifestMismatch
from weightwire.types import Json, State

PARTS = ("quant_method", "scheme", "kernel", "impl")
"""Attributes of a module whose own plain values count as the module's."""

Plain = Mapping[str, Mapping[str, Json]]
"""Module path -> attribute -> value."""


def plain(model: nn.Module) -> dict[str, dict[str, Json]]:
    """Every module's plain values: ``None``, booleans, numbers and text."""
    return {path: dict(_values(module)) for path, module in model.named_modules()}


def changed(before: Plain, after: Plain) -> dict[str, dict[str, Json]]:
    """What loading decided: attributes of ``after`` that ``before`` did not have, or not so.

    Raises:
        CatalogueError: an attribute vanished, which cannot be told.
    """
    found: dict[str, dict[str, Json]] = {}
    for path, values in after.items():
        earlier = before.get(path, {})
        gone = sorted(earlier.keys() - values.keys())
        if gone:
            raise CatalogueError(f"loading removed {path}.{gone[0]}", "this model's state cannot be described")
        different = {name: value for name, value in values.items() if name not in earlier or earlier[name] != value}
        if different:
            found[path] = different
    return found


def apply(model: nn.Module, state: State) -> None:
    """Set on ``model`` what a source's loading decided.

    Raises:
        ManifestMismatch: a module or attribute that is not there, or holds something that is no plain value; nothing
            was set then.
    """
    modules = dict(model.named_modules())
    found: list[tuple[object, str, Json]] = []
    for path, values in state.items():
        for name, value in values.items():
            holder, attribute = _holder(modules.get(path), name)
            if holder is None or not _is_plain(getattr(holder, attribute, ...)):
                raise ManifestMismatch(
                    f"the source's loading set {path}.{name}, which is no plain value here",
                    "build both sides from the same code",
                )
            found.append((holder, attribute, value))
    for holder, attribute, value in found:
        setattr(holder, attribute, value)


def _values(module: nn.Module) -> Iterator[tuple[str, Json]]:
    for name, value in vars(module).items():
        if _is_plain(value) and name != "training":
            yield name, value
    for part in PARTS:
        held = vars(module).get(part)
        if held is None or isinstance(held, nn.Module):
            continue
        for name, value in getattr(held, "__dict__", {}).items():
            if _is_plain(value):
                yield f"{part}.{name}", value


def _holder(module: nn.Module | None, name: str) -> tuple[object | None, str]:
    if module is None:
        return None, name
    part, dot, attribute = name.partition(".")
    return (vars(module).get(part), attribute) if dot else (module, name)


def _is_plain(value: Any) -> bool:
    if type(value) is float:
        return math.isfinite(value)
    if type(value) is int:
        return abs(value) < 1 << 63
    return value is None or type(value) in (bool, str)
