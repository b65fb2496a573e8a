"""Root-mean-square normalisation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from weightwire.manifest.sharding import Sharding, whole
from weightwire.runtime.layers.context import LayerContext
from weightwire.runtime.layers.shards import Part, copy_whole, new_parameter
from weightwire.runtime.mapping import TpCoordinates


class RMSNorm(nn.Module):
    """``x / rms(x) * weight``, computed in float32; the weight is whole on every rank."""

    def __init__(self, context: LayerContext, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = new_parameter(width, dtype=context.dtype)

    def checkpoint_tensors(self) -> tuple[str, ...]:
        """Leaf names in the checkpoint."""
        return ("weight",)

    def tensor_shards(self) -> dict[str, Sharding]:
        """Every rank holds all of it."""
        return {"weight": whole(self.weight.shape)}

    def load_weights(self, parts: Sequence[Part], tp: TpCoordinates) -> frozenset[str]:  # noqa: ARG002 - never cut
        """As ``Loadable.load_weights``."""
        copy_whole(self.weight, parts[0]["weight"])
        return frozenset({"weight"})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Same shape and dtype as ``x``."""
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class GemmaRMSNorm(RMSNorm):
    """``x / rms(x) * (1 + weight)``, all in float32, rounded once."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Same shape and dtype as ``x``."""
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * (1.0 + self.weight.to(torch.float32))).to(x.dtype)
