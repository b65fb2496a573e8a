"""The gated MLP: of a dense layer, and of experts that every token goes through."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import nn

from weightwire.runtime.layers.context import LayerContext
from weightwire.runtime.layers.linear import Linear, OutPart, TensorParallelMode
from weightwire.runtime.layers.packing import GateUpLinear

Activation = Literal["silu", "gelu_tanh"]


def activate(x: torch.Tensor, kind: Activation) -> torch.Tensor:
    """The activation ``kind`` of ``x``."""
    return F.silu(x) if kind == "silu" else F.gelu(x, approximate="tanh")


class GatedMLP(nn.Module):
    """``down(activation(gate(x)) * up(x))``, of inner width ``intermediate``."""

    def __init__(
        self, context: LayerContext, hidden: int, intermediate: int, *, bias: bool, activation: Activation
    ) -> None:
        super().__init__()
        self.activation: Activation = activation
        self.gate_up_proj = GateUpLinear(context.within("gate_up_proj"), hidden, intermediate, bias=bias)
        down = context.within("down_proj")
        self.down_proj = Linear(down, intermediate, [OutPart(hidden)], mode=TensorParallelMode.ROW, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, length, hidden) to the same, summed over ranks."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        summed: torch.Tensor = self.down_proj(activate(gate, self.activation) * up)
        return summed
