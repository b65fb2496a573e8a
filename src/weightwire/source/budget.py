"""What holding the raw stage costs while a model transforms itself, known beforehand from what transforms declare."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from weightwire.source.snapshot import own_tensors, storages

RAW_BUDGET = 0.05
"""Part of a shard on a device that may be held a second time. Host memory is free."""


def raw_cost(model: nn.Module) -> int:
    """Device bytes that copy-on-transform will hold: what transforms declare that they change in place or replace.

    A module that transforms without declaring anything counts with everything below it. Tensors that share a storage
    count once.
    """
    found = [tensor for tensor in _touched(model) if tensor.device.type != "cpu"]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in found)}
    return sum(sizes[pointer] for pointer in storages(found))


def over_budget(model: nn.Module) -> str:
    """Why the raw stage must not be published here; empty where it may."""
    held = [tensor for module in model.modules() for tensor in own_tensors(module).values()]
    shard = sum(tensor.numel() * tensor.element_size() for tensor in held if tensor.device.type != "cpu")
    cost = raw_cost(model)
    if cost <= shard * RAW_BUDGET:
        return ""
    return f"holding raw weights would cost {cost} bytes, more than {RAW_BUDGET:.0%} of {shard}"


def _touched(model: nn.Module) -> Iterator[torch.Tensor]:
    for module in model.modules():
        own = own_tensors(module)
        declare = getattr(module, "transform_effect", None)
        if declare is not None:
            yield from (own[name] for name in declare() if name in own)
        elif hasattr(module, "transform_weights"):
            yield from (tensor for child in module.modules() for tensor in own_tensors(child).values())
