"""Fused linear layers whose weights the ``packed`` kernel layout rearranges, once, after loading."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from weightwire.runtime.config import KernelLayout
from weightwire.runtime.layers.context import LayerContext
from weightwire.runtime.layers.linear import Linear, OutPart, TensorParallelMode, WeightMode, multiply
from weightwire.runtime.layers.shards import new_parameter

TransformEffect = Literal["in_place", "replaces"]


class PackedLinear(Linear):
    """A column-parallel ``Linear`` with a one-shot transform of its weights.

    Life: raw (constructed, loaded) → ``transform_weights`` → ``cache_derived_state``, which makes ``forward`` follow
    what the weights now are. A receiver of transformed bytes goes ``prepare_processed`` → bytes →
    ``_weights_transformed = True`` → ``cache_derived_state``.
    """

    weights_are_packed: bool = False
    """How ``forward`` reads the weights; set by ``cache_derived_state`` alone."""

    def __init__(
        self, context: LayerContext, in_features: int, parts: list[OutPart], weight_mode: WeightMode, *, bias: bool
    ) -> None:
        super().__init__(
            context, in_features, parts, mode=TensorParallelMode.COLUMN, weight_mode=weight_mode, bias=bias
        )
        self._weights_transformed = False

    @property
    def _packs(self) -> bool:
        return self.context.layout is KernelLayout.PACKED

    def transform_effect(self) -> dict[str, TransformEffect]:
        """What ``transform_weights`` will do to each own tensor that it touches; known from construction on."""
        return self._pack_effect() if self._packs else {}

    def transform_weights(self) -> None:
        """Bring the weights into the kernel's layout. One-shot: a second call does nothing."""
        if self._weights_transformed:
            return
        if self._packs:
            self._pack()
        self._weights_transformed = True

    def cache_derived_state(self) -> None:
        """Make ``forward`` follow the weights' layout. Idempotent."""
        self.weights_are_packed = self._packs and self._weights_transformed

    def post_load_weights(self) -> None:
        """All stages in order, for this layer alone."""
        self.transform_weights()
        self.cache_derived_state()

    def prepare_processed(self) -> None:
        """Give replaced parameters their transformed shapes, uninitialised. Nothing is computed."""
        if self._packs:
            self._to_processed_shapes()

    def prepare_raw(self) -> None:
        """Give parameters their raw shapes again, uninitialised where they differ; the transform may run anew."""
        self._to_raw_shapes()
        self._weights_transformed = False
        self.cache_derived_state()

    def _pack_effect(self) -> dict[str, TransformEffect]:
        raise NotImplementedError

    def _pack(self) -> None:
        raise NotImplementedError

    def _to_processed_shapes(self) -> None:
        """Nothing to do where the transform is in place."""

    def _to_raw_shapes(self) -> None:
        """Nothing to do where the transform is in place."""


class QkvLinear(PackedLinear):
    """q, k and v in one weight. Packed: the rows of every q and k head are interleaved (0, d/2, 1, d/2+1, ...)."""

    def __init__(self, context: LayerContext, hidden: int, heads: tuple[int, int, int], *, bias: bool) -> None:
        num_heads, num_kv_heads, self.head_dim = heads
        kv = OutPart(num_kv_heads * self.head_dim, heads=num_kv_heads)
        parts = [OutPart(num_heads * self.head_dim), kv, kv]
        super().__init__(context, hidden, parts, WeightMode.FUSED_QKV, bias=bias)
        self.q_rows, self.kv_rows = self.local_rows(parts[0]), self.local_rows(kv)

    def _pack_effect(self) -> dict[str, TransformEffect]:
        return {"weight": "in_place", "bias": "in_place"} if self.has_bias else {"weight": "in_place"}

    def _pack(self) -> None:
        for _, tensor in self.named_parameters(recurse=False):
            rotated = tensor.detach().narrow(0, 0, self.q_rows + self.kv_rows)
            halves = rotated.reshape(-1, 2, self.head_dim // 2, *rotated.shape[1:])
            rotated.copy_(halves.transpose(1, 2).reshape(rotated.shape))


class GateUpLinear(PackedLinear):
    """gate and up in one weight. Packed: a new contiguous parameter of shape (in, local out)."""

    def __init__(self, context: LayerContext, hidden: int, intermediate: int, *, bias: bool) -> None:
        parts = [OutPart(intermediate), OutPart(intermediate)]
        super().__init__(context, hidden, parts, WeightMode.FUSED_GATE_UP, bias=bias)
        self._has_processed_shape = False

    def _pack_effect(self) -> dict[str, TransformEffect]:
        return {"weight": "replaces"}

    def _pack(self) -> None:
        packed = self.weight.detach().t().contiguous()
        if packed.data_ptr() == self.weight.data_ptr():  # a width of one: contiguous() had nothing to copy
            packed = packed.clone()
        self.weight = nn.Parameter(packed, requires_grad=False)
        self._has_processed_shape = True

    def _to_processed_shapes(self) -> None:
        if not self._has_processed_shape:
            shape = (self.in_features, self.local_out)
            self.weight = new_parameter(*shape, dtype=self.weight.dtype, device=self.weight.device)
            self._has_processed_shape = True

    def _to_raw_shapes(self) -> None:
        if self._has_processed_shape:
            shape = (self.local_out, self.in_features)
            self.weight = new_parameter(*shape, dtype=self.weight.dtype, device=self.weight.device)
            self._has_processed_shape = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., local gate + local up)."""
        if not self.weights_are_packed:
            return super().forward(x)
        return multiply(x, self.weight.t(), self.bias).to(x.dtype)
