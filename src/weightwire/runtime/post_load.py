"""The staged steps between raw bytes and a model that can run, walked over all modules of a model.

Hooks are duck-typed, on any module: ``setup_aliases`` (references only, idempotent, legal on meta),
``transform_weights`` (one-shot; a module with it has ``_weights_transformed``), ``cache_derived_state`` (idempotent),
and, for the processed stage, ``prepare_processed`` and ``prepare_raw``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, runtime_checkable

import torch
from torch import nn


@runtime_checkable
class _WiresAliases(Protocol):
    def setup_aliases(self) -> None: ...


@runtime_checkable
class _Transforms(Protocol):
    def transform_weights(self) -> None: ...


@runtime_checkable
class _DeclaresEffect(Protocol):
    def transform_effect(self) -> Mapping[str, str]: ...


@runtime_checkable
class _CachesState(Protocol):
    def cache_derived_state(self) -> None: ...


@runtime_checkable
class _HasProcessedShapes(Protocol):
    def prepare_processed(self) -> None: ...
    def prepare_raw(self) -> None: ...


Guard = Callable[[nn.Module], AbstractContextManager[None]]
"""Entered around the transform of one module."""


def _no_guard(_module: nn.Module) -> AbstractContextManager[None]:
    return nullcontext()


def _modules(model: nn.Module) -> Iterator[nn.Module]:
    # a list first: hooks register modules (aliases) while we walk
    return (module for module in list(model.modules()) if not getattr(module, "_weights_removed", False))


def setup_aliases(model: nn.Module) -> None:
    """Wire references between modules. This renames parameters: take their names before it."""
    for module in _modules(model):
        if isinstance(module, _WiresAliases):
            module.setup_aliases()


@torch.no_grad()
def transform_weights(model: nn.Module, guard: Guard = _no_guard) -> None:
    """Run each module's transform, once in its life, inside ``guard(module)``; no guard where it declares no effect."""
    for module in _modules(model):
        if isinstance(module, _Transforms) and not getattr(module, "_weights_transformed", False):
            idle = isinstance(module, _DeclaresEffect) and not module.transform_effect()
            with nullcontext() if idle else guard(module):
                module.transform_weights()


@torch.no_grad()
def cache_derived_state(model: nn.Module) -> None:
    """Recompute what modules keep beside their tensors."""
    for module in _modules(model):
        if isinstance(module, _CachesState):
            module.cache_derived_state()


def post_load_weights(model: nn.Module, guard: Guard = _no_guard) -> None:
    """Raw bytes to a model that can run: aliases, transforms, derived state."""
    setup_aliases(model)
    transform_weights(model, guard)
    cache_derived_state(model)


def prepare_processed(model: nn.Module) -> None:
    """Make a raw, empty model ready for transformed bytes: aliases, and the shapes that transforms would leave.

    Replaced parameters are new, uninitialised ones; nothing is computed. Follow with the bytes, then
    ``adopt_processed``.
    """
    setup_aliases(model)
    for module in _modules(model):
        if isinstance(module, _HasProcessedShapes):
            module.prepare_processed()


def adopt_processed(model: nn.Module) -> None:
    """After transformed bytes arrived: mark the transforms as done (never run them), and cache derived state."""
    for module in _modules(model):
        if hasattr(module, "_weights_transformed"):
            module._weights_transformed = True  # type: ignore[assignment]  # noqa: SLF001 - part of the hook
    cache_derived_state(model)


def prepare_raw(model: nn.Module) -> None:
    """Give a transformed (or ``prepare_processed``) model its raw shapes again, to be filled with raw bytes."""
    for module in _modules(model):
        if isinstance(module, _HasProcessedShapes):
            module.prepare_raw()
