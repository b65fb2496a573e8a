"""Latent attention's ``kv_b_proj`` with a scale for each block of 128 x 128, and what is made of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import nn

from weightwire.errors import ConfigError
from weightwire.manifest.sharding import Sharding
from weightwire.runtime.config import KernelLayout
from weightwire.runtime.layers.latent import HeadsMethod, KeyValueLinear, KeyValueMethod, LatentHeads
from weightwire.runtime.layers.method import TransformEffect
from weightwire.runtime.layers.shards import Part, new_parameter
from weightwire.runtime.mapping import TpCoordinates
from weightwire.runtime.quantization import fp8
from weightwire.runtime.quantization.config import FP8_BLOCK
from weightwire.runtime.quantization.method import FLOATS
from weightwire.runtime.quantization.slices import Grid, Weight

F32 = torch.float32
_GRID = Grid(fp8.BLOCK, fp8.BLOCK)
_PAIRS = (("k_b_proj_trans", "k_b_proj_trans_scale"), ("v_b_proj", "v_b_proj_scale"))


class Fp8BlockKeyValueMethod(KeyValueMethod):
    """``weight`` e4m3 (local rows, lora) and ``weight_scale`` for each block; blocks are reordered as their rows are.

    Packed: both are replaced, as of ``Fp8BlockMethod``.
    """

    name = FP8_BLOCK
    transform_protocol = "e8m0-v1"

    def create_weights(self, layer: KeyValueLinear) -> None:
        """Both; a head's keys and values must be whole blocks."""
        nope, values = layer.mla.qk_nope_head_dim, layer.mla.v_head_dim
        if nope % fp8.BLOCK or values % fp8.BLOCK:
            raise ConfigError(
                f"{self.name}: heads with keys {nope} and values {values} wide are no multiples of {fp8.BLOCK}",
                "leave kv_b_proj out of the quantization",
            )
        layer.weight = new_parameter(layer.rows, layer.mla.kv_lora_rank, dtype=fp8.FP8)
        layer.weight_scale = new_parameter(*_GRID.shape(*layer.weight.shape), dtype=F32)

    def checkpoint_tensors(self, layer: KeyValueLinear) -> tuple[str, ...]:  # noqa: ARG002 - the protocol's
        """Two."""
        return ("weight", "weight_scale_inv")

    def load_weights(self, layer: KeyValueLinear, parts: Sequence[Part], tp: TpCoordinates) -> frozenset[str]:
        """Cut both by head, then reorder their rows."""
        each = layer.mla.qk_nope_head_dim + layer.mla.v_head_dim
        weight, (part,) = Weight(layer.heads * each, layer.mla.kv_lora_rank, 0, layer.context.tp), parts
        cut_before = tp != layer.context.tp
        numbers = weight.read(part["weight"], Grid(), [fp8.FP8], cut_before=cut_before)
        layer.weight.copy_(layer.reordered(numbers.view(torch.uint8)).view(fp8.FP8))
        scales = weight.read(part["weight_scale_inv"], _GRID, FLOATS, cut_before=cut_before)
        layer.weight_scale.copy_(layer.reordered(scales, fp8.BLOCK))
        return frozenset({"weight", "weight_scale"})

    def tensor_shards(self, layer: KeyValueLinear) -> dict[str, Sharding]:  # noqa: ARG002 - the protocol's
        """Not told."""
        return {}

    def transform_effect(self, layer: KeyValueLinear) -> dict[str, TransformEffect]:
        """Both are replaced."""
        return {"weight": "replaces", "weight_scale": "replaces"} if _is_packed(layer) else {}

    def transform(self, layer: KeyValueLinear) -> None:
        """Resmooth and lay out."""
        _pack(layer, ("weight", "weight_scale"), heads=False)

    def to_processed(self, layer: KeyValueLinear) -> None:
        """The scales have another shape and dtype."""
        rows, columns = layer.weight.shape
        _, *shape = fp8.packed_scale_shape(1, rows, columns)
        device = layer.weight.device
        layer.weight_scale = new_parameter(*shape, dtype=torch.int32, device=device)

    def to_raw(self, layer: KeyValueLinear) -> None:
        """The scales as created."""
        shape = _GRID.shape(*layer.weight.shape)
        if layer.weight_scale.dtype is not F32:
            layer.weight_scale = new_parameter(*shape, dtype=F32, device=layer.weight.device)

    def apply(self, layer: KeyValueLinear, latent: torch.Tensor) -> torch.Tensor:
        """Dequantise, and multiply in float32."""
        read = fp8.dequantise_packed if layer.weights_are_packed else fp8.dequantise_blocks
        return F.linear(self.activations(latent), read(layer.weight, layer.weight_scale))

    def activations(self, x: torch.Tensor) -> torch.Tensor:
        """By the scale of each 128 columns of each token."""
        return fp8.round_trip_blocks(x)


class Fp8BlockHeadsMethod(HeadsMethod):
    """Both parameters e4m3, each with a ``…_scale`` for each block of each head.

    ``k_b_proj_trans_scale`` (local heads, lora / 128, nope / 128) is a copy, ``v_b_proj_scale`` a view of the scale of
    ``kv_b_proj``, as the weights are. The kernel that absorbs heads dequantises them and leaves activations alone.

    Packed: all four are replaced, head by head as ``Fp8BlockMethod`` does it; none is a view any more.
    """

    name = FP8_BLOCK
    transform_protocol = "e8m0-v1"

    def create_weights(self, layer: LatentHeads) -> None:
        """Copies and views."""
        super().create_weights(layer)
        heads, lora, nope = layer.k_b_proj_trans.shape
        layer.k_b_proj_trans_scale = new_parameter(heads, *_GRID.shape(lora, nope), dtype=F32)

    def derive(self, layer: LatentHeads) -> None:
        """Both copies."""
        super().derive(layer)
        scales = layer.kv_b_proj.keys(layer.kv_b_proj.weight_scale, fp8.BLOCK)
        layer.k_b_proj_trans_scale.copy_(scales.transpose(1, 2))

    def view(self, layer: LatentHeads) -> None:
        """Both views."""
        super().view(layer)
        scales = layer.kv_b_proj.values(layer.kv_b_proj.weight_scale, fp8.BLOCK)
        layer.v_b_proj_scale = nn.Parameter(scales, requires_grad=False)

    def tensor_shards(self, layer: LatentHeads) -> dict[str, Sharding]:  # noqa: ARG002 - the protocol's
        """Not told."""
        return {}

    def transform_effect(self, layer: LatentHeads) -> dict[str, TransformEffect]:
        """All are replaced."""
        return {name: "replaces" for pair in _PAIRS for name in pair} if _is_packed(layer) else {}

    def transform(self, layer: LatentHeads) -> None:
        """Resmooth and lay out."""
        for names in _PAIRS:
            _pack(layer, names, heads=True)

    def to_processed(self, layer: LatentHeads) -> None:
        """Tensors of their own, the scales with another shape and dtype."""
        for weight, scale in _PAIRS:
            old: torch.Tensor = getattr(layer, weight)
            heads, rows, columns = old.shape  # of what may be a view until now
            setattr(layer, weight, new_parameter(heads, rows, columns, dtype=fp8.FP8, device=old.device))
            shape = fp8.packed_scale_shape(heads, rows, columns)
            setattr(layer, scale, new_parameter(*shape, dtype=torch.int32, device=old.device))

    def to_raw(self, layer: LatentHeads) -> None:
        """The shapes and the views of construction."""
        super().to_raw(layer)
        heads, lora, nope = layer.k_b_proj_trans.shape
        if layer.k_b_proj_trans_scale.dtype is not F32:
            shape, device = _GRID.shape(lora, nope), layer.k_b_proj_trans.device
            layer.k_b_proj_trans_scale = new_parameter(heads, *shape, dtype=F32, device=device)

    def keys(self, layer: LatentHeads) -> torch.Tensor:
        """Dequantised."""
        return self._read(layer, layer.k_b_proj_trans, layer.k_b_proj_trans_scale)

    def values(self, layer: LatentHeads) -> torch.Tensor:
        """Dequantised."""
        return self._read(layer, layer.v_b_proj, layer.v_b_proj_scale)

    @staticmethod
    def _read(layer: LatentHeads, weights: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        read = fp8.dequantise_packed if layer.weights_are_packed else fp8.dequantise_blocks
        return torch.stack([read(*both) for both in zip(weights, scales, strict=True)])


def _is_packed(layer: KeyValueLinear | LatentHeads) -> bool:
    return layer.context.layout is KernelLayout.PACKED


def _pack(layer: nn.Module, names: tuple[str, str], *, heads: bool) -> None:
    """Replace a weight and its scales."""
    tensors = [getattr(layer, name).detach() for name in names]
    packed = fp8.pack_blocks(*(tensor if heads else tensor.unsqueeze(0) for tensor in tensors))
    for name, tensor in zip(names, packed, strict=True):
        setattr(layer, name, nn.Parameter(tensor if heads else tensor[0].clone(), requires_grad=False))
