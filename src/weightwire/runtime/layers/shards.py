"""Copying one rank's slice of a checkpoint tensor into its place, with every check that can be made on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from weightwire.errors import CheckpointError
from weightwire.runtime.checkpoint.protocol import TensorSource
from weightwire.runtime.mapping import TpCoordinates, shard_range

Part = Mapping[str, TensorSource]
"""The tensors of one checkpoint module by leaf name (``weight``, ``bias``); a fused layer has several parts."""

_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def part_names(name: str) -> tuple[str, ...]:
    """Names of the checkpoint modules that the layer called ``name`` is made of, one for each part."""
    parent, _, leaf = name.rpartition(".")
    return tuple(f"{parent}.{part}" for part in _FUSED[leaf]) if leaf in _FUSED else (name,)


@runtime_checkable
class Loadable(Protocol):
    """A layer that fills its parameters from checkpoint tensors."""

    def get_parameter(self, target: str) -> nn.Parameter:
        """``nn.Module``'s own."""

    def checkpoint_tensors(self) -> tuple[str, ...]:
        """Leaf names that each of its parts must have."""

    def load_weights(self, parts: Sequence[Part], tp: TpCoordinates) -> frozenset[str]:
        """Cut ``parts`` by ``tp`` and copy them in; return the names of the own parameters written in full.

        ``tp`` is what ``effective_tp`` gave for this one load: the layer's own coordinates, or ``WHOLE`` where the
        parts were cut before. Raises ``CheckpointError`` on a wrong shape or dtype.
        """


@runtime_checkable
class Spread(Protocol):
    """A ``Loadable`` that is made of many checkpoint modules, some of which are other ranks' (experts)."""

    def checkpoint_prefixes(self, name: str) -> tuple[str, ...]:
        """Names of the modules that this rank holds parts of, for a layer called ``name``."""

    def checkpoint_elsewhere(self, name: str) -> tuple[str, ...]:
        """Names of those that only other ranks hold parts of."""

    def tensors_elsewhere(self) -> tuple[str, ...]:
        """Leaf names that this rank needs of those, too: of a kind that each part must have, or may have."""


@runtime_checkable
class TakesMore(Protocol):
    """A ``Loadable`` that has use for tensors that not every checkpoint has."""

    def optional_tensors(self) -> tuple[str, ...]:
        """Leaf names that each of its parts may have."""


@runtime_checkable
class RewritesLoaded(Protocol):
    """A ``Loadable`` of which own parameters are written again after its ``load_weights``, before all is loaded."""

    def written_again(self) -> frozenset[str]:
        """Their names: they are final when the whole model is loaded, not before."""


def final_names(layer: Loadable, written: frozenset[str]) -> list[str]:
    """Of the parameters that ``layer.load_weights`` wrote, those that nothing writes again, in order of their names."""
    again = layer.written_again() if isinstance(layer, RewritesLoaded) else frozenset[str]()
    return sorted(written - again)


def new_parameter(*shape: int, dtype: torch.dtype, device: torch.device | None = None) -> nn.Parameter:
    """An uninitialised parameter: whatever fills it writes all of it."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)


def copy_whole(destination: torch.Tensor, source: TensorSource) -> None:
    """Copy a tensor that every rank holds in full."""
    copy_slice(destination, source, tuple(destination.shape), 0, (0, destination.shape[0]))


def copy_shard(
    destination: torch.Tensor, source: TensorSource, full_shape: tuple[int, ...], dim: int, tp: TpCoordinates
) -> None:
    """Copy the part of ``source`` (which must be of ``full_shape``) that ``tp`` owns along ``dim``."""
    copy_slice(destination, source, full_shape, dim, shard_range(full_shape[dim], tp))


def copy_slice(
    destination: torch.Tensor, source: TensorSource, full_shape: tuple[int, ...], dim: int, bounds: tuple[int, int]
) -> None:
    """Copy ``source[bounds]`` along ``dim``; floating dtypes are converted.

    Raises:
        CheckpointError: the source is not of ``full_shape``, or does not hold floating-point numbers.
    """
    if source.shape != full_shape:
        raise CheckpointError(
            f"{source.origin}: tensor {source.name} has shape {list(source.shape)}, the model needs {list(full_shape)}",
            "use a checkpoint that belongs to its config.json",
        )
    values = source.read(dim, *bounds)
    if not values.is_floating_point() or values.element_size() < 2:
        raise CheckpointError(
            f"{source.origin}: tensor {source.name} is {values.dtype}, not bf16, f16 or f32",
            "use an unquantised checkpoint",
        )
    # expand() of copy_ must never hide a slice of the wrong size
    assert values.shape == destination.shape, (source.name, values.shape, destination.shape)
    destination.copy_(values)
