"""Fused linear layers whose weights the ``packed`` kernel layout rearranges, once, after loading."""

from __future__ import annotations

import torch
from torch import nn

from weightwire.runtime.config import KernelLayout
from weightwire.runtime.layers.context import LayerContext
from weightwire.runtime.layers.linear import (
    Linear,
    LinearMethod,
    OutPart,
    TensorParallelMode,
    UnquantizedLinearMethod,
    WeightMode,
    multiply,
)
from weightwire.runtime.layers.method import TransformEffect
from weightwire.runtime.layers.shards import new_parameter


class InterleavingMethod(UnquantizedLinearMethod):
    """Packed: the rows of every q and k head of a ``QkvLinear`` are interleaved (0, d/2, 1, d/2+1, ...), in place."""

    def transform_effect(self, layer: Linear) -> dict[str, TransformEffect]:
        """Weight and bias are changed in place."""
        if layer.context.layout is not KernelLayout.PACKED:
            return {}
        return {"weight": "in_place", "bias": "in_place"} if layer.has_bias else {"weight": "in_place"}

    def transform(self, layer: Linear) -> None:
        """Interleave."""
        assert isinstance(layer, QkvLinear)
        for _, tensor in layer.named_parameters(recurse=False):
            rotated = tensor.detach().narrow(0, 0, layer.q_rows + layer.kv_rows)
            halves = rotated.reshape(-1, 2, layer.head_dim // 2, *rotated.shape[1:])
            rotated.copy_(halves.transpose(1, 2).reshape(rotated.shape))


class TransposingMethod(UnquantizedLinearMethod):
    """Packed: a new contiguous weight of shape (in, local out)."""

    def transform_effect(self, layer: Linear) -> dict[str, TransformEffect]:
        """The weight is replaced."""
        return {"weight": "replaces"} if layer.context.layout is KernelLayout.PACKED else {}

    def transform(self, layer: Linear) -> None:
        """Transpose."""
        packed = layer.weight.detach().t().contiguous()
        if packed.data_ptr() == layer.weight.data_ptr():  # a width of one: contiguous() had nothing to copy
            packed = packed.clone()
        layer.weight = nn.Parameter(packed, requires_grad=False)
        self._transposed = True

    _transposed = False  # a square weight does not show it

    def to_processed(self, layer: Linear) -> None:
        """Transposed."""
        if not self._transposed:
            self._renew(layer, layer.in_features, layer.local_out)
            self._transposed = True

    def to_raw(self, layer: Linear) -> None:
        """As created."""
        if self._transposed:
            self._renew(layer, layer.local_out, layer.in_features)
            self._transposed = False

    def apply(self, layer: Linear, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """As the weight lies."""
        return multiply(x, layer.weight.t() if layer.weights_are_packed else layer.weight, bias)

    @staticmethod
    def _renew(layer: Linear, *shape: int) -> None:
        layer.weight = new_parameter(*shape, dtype=layer.weight.dtype, device=layer.weight.device)


class PackedLinear(Linear):
    """A ``Linear``, column-parallel unless ``parallel`` says otherwise, with a ``packed`` layout of its own kind."""

    def __init__(
        self,
        context: LayerContext,
        in_features: int,
        parts: list[OutPart],
        weight_mode: WeightMode,
        *,
        bias: bool,
        parallel: TensorParallelMode | None = TensorParallelMode.COLUMN,
    ) -> None:
        super().__init__(context, in_features, parts, mode=parallel, weight_mode=weight_mode, bias=bias)


class QkvLinear(PackedLinear):
    """q, k and v in one weight."""

    def __init__(self, context: LayerContext, hidden: int, heads: tuple[int, int, int], *, bias: bool) -> None:
        num_heads, num_kv_heads, self.head_dim = heads
        kv = OutPart(num_kv_heads * self.head_dim, heads=num_kv_heads)
        parts = [OutPart(num_heads * self.head_dim), kv, kv]
        super().__init__(context, hidden, parts, WeightMode.FUSED_QKV, bias=bias)
        self.q_rows, self.kv_rows = self.local_rows(parts[0]), self.local_rows(kv)

    def unquantized(self) -> LinearMethod:
        """Interleaves q and k."""
        return InterleavingMethod()

    @property
    def rows_are_interleaved(self) -> bool:
        """Whether rows of a head come as (0, d/2, 1, d/2+1, ...)."""
        return self.weights_are_packed and isinstance(self.method, InterleavingMethod)


class GateUpLinear(PackedLinear):
    """gate and up in one weight."""

    def __init__(self, context: LayerContext, hidden: int, intermediate: int, *, bias: bool) -> None:
        parts = [OutPart(intermediate), OutPart(intermediate)]
        super().__init__(context, hidden, parts, WeightMode.FUSED_GATE_UP, bias=bias)

    def unquantized(self) -> LinearMethod:
        """Transposes."""
        return TransposingMethod()
