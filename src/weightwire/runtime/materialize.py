"""From a model on the meta device to one in real, uninitialised memory, with every tie kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from weightwire.errors import CatalogueError


@runtime_checkable
class HasDerivedTensors(Protocol):
    """A module whose construction computes tensors."""

    def init_derived(self) -> None:
        """Compute them, in place; called once after the module left the meta device."""


class _Memory:
    """Real twins of meta tensors: one storage for one storage, one object for one object."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tensors: dict[int, torch.Tensor] = {}
        self._storages: dict[int, torch.UntypedStorage] = {}
        # identities are addresses: what they stand for must stay alive while they are keys
        self._alive: list[torch.Tensor] = []

    def twin(self, meta: torch.Tensor) -> torch.Tensor:
        key = id(meta)
        if key not in self._tensors:
            self._alive.append(meta)
            self._tensors[key] = self._allocate(meta)
        return self._tensors[key]

    def _allocate(self, meta: torch.Tensor) -> torch.Tensor:
        meta_storage = meta.untyped_storage()
        key = meta_storage._cdata  # noqa: SLF001 - a meta storage has no address; this is its identity
        if key not in self._storages:
            # allocated only, never written: whatever fills it would overwrite it
            self._storages[key] = torch.UntypedStorage(  # type: ignore[no-untyped-call]
                meta_storage.nbytes(), device=self._device
            )
        real = torch.empty(0, dtype=meta.dtype, device=self._device)
        real.set_(self._storages[key], meta.storage_offset(), meta.shape, meta.stride())
        return nn.Parameter(real, requires_grad=meta.requires_grad) if isinstance(meta, nn.Parameter) else real


def _slots(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, torch.Tensor]]:
    """Every place of a module that holds a meta tensor: parameters, buffers and plain attributes."""
    registers: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, module.__dict__)  # noqa: SLF001 - nn.Module's own
    for holder in registers:
        for name, value in list(holder.items()):
            if isinstance(value, torch.Tensor) and value.is_meta:
                yield holder, name, value


@torch.no_grad()
def materialize(model: nn.Module, device: torch.device) -> None:
    """Move every meta tensor of ``model`` to uninitialised memory on ``device``, then compute derived tensors.

    Shapes, strides, dtypes and offsets stay; tensors that shared an object share one, tensors that shared a storage
    share one. Parameters hold garbage afterwards, and nothing was computed on them. Tensors inside containers are
    not found: a module that keeps some makes them in ``init_derived``.

    Raises:
        CatalogueError: a tensor is still on the meta device.
    """
    memory = _Memory(device)
    modules = list(model.named_modules())
    for _, module in modules:
        for holder, name, value in _slots(module):
            holder[name] = memory.twin(value)
    for path, module in modules:
        if isinstance(module, HasDerivedTensors):
            module.init_derived()
        for _, name, _ in _slots(module):
            raise CatalogueError(f"{path}.{name} is still on the meta device", "its module must not rebind tensors")
