"""FP8 experts: one scale for a tensor, or one for a block of 128 x 128."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import nn

from weightwire.runtime.layers.method import TransformEffect, refuse_state
from weightwire.runtime.layers.moe import FusedMoE
from weightwire.runtime.layers.shards import Part, new_parameter
from weightwire.runtime.quantization import fp8
from weightwire.runtime.quantization.config import FP8_BLOCK, FP8_QDQ
from weightwire.runtime.quantization.experts import (
    DOWN,
    GATE,
    PROJECTIONS,
    UP,
    ExpertScales,
    QuantizedMoeMethod,
    check_width,
    is_packed,
    places,
    read_scalar,
    weight_of,
)
from weightwire.runtime.quantization.method import FLOATS, boolean
from weightwire.runtime.quantization.slices import Grid
from weightwire.types import Json

F32 = torch.float32
_STATIC = "static_input"
_PAIRS = (("w3_w1_weight", "w3_w1_weight_scaling_factor"), ("w2_weight", "w2_weight_scaling_factor"))
_INPUTS = ("fc31_input_dequant", "fc2_quant")


def _create_weights(layer: FusedMoE) -> None:
    count, width, hidden = len(layer.local_experts), layer.local_width, layer.hidden
    layer.w3_w1_weight = new_parameter(count, 2 * width, hidden, dtype=fp8.FP8)
    layer.w2_weight = new_parameter(count, hidden, width, dtype=fp8.FP8)


def _copy_weights(layer: FusedMoE, local: int, part: Part, *, cut_before: bool) -> None:
    for projection, place in places(layer, local, layer.w3_w1_weight, layer.w2_weight).items():
        source = part[f"{projection}.weight"]
        place.copy_(weight_of(layer, projection).read(source, Grid(), [fp8.FP8], cut_before=cut_before))


class QdqScales(NamedTuple):
    """What the kernel of ``Fp8QdqMoeMethod`` reads: each of one value, or of one for each local expert."""

    fc1_dequant: torch.Tensor
    fc2_quant: torch.Tensor | None
    fc2_dequant: torch.Tensor
    fc1_input_dequant: torch.Tensor | None


class Fp8QdqMoeMethod(QuantizedMoeMethod):
    """``w3_w1_weight`` and ``w2_weight`` e4m3; one scale for gate and up of an expert, one for down.

    Loading rounds the half of gate and up that has the smaller scale anew, in place, and folds the input scales into
    ``fc31_dequant`` and ``fc2_dequant``. Where the checkpoint has no input scales it removes ``fc31_input_dequant`` and
    ``fc2_quant``: activations are then scaled token by token.
    """

    name = FP8_QDQ
    optional = ("input_scale",)

    def create_weights(self, layer: FusedMoE) -> None:
        """The weights, two scales for each expert, and two for all."""
        _create_weights(layer)
        for name in ("fc31_dequant", "fc2_dequant"):
            setattr(layer, name, new_parameter(len(layer.local_experts), dtype=F32))
        self._static(layer)

    def fill(self, layer: FusedMoE, local: int, part: Part, *, cut_before: bool) -> ExpertScales:
        """Weights as they are; scales are for ``process``."""
        _copy_weights(layer, local, part, cut_before=cut_before)
        return {(each, "weight_scale"): read_scalar(part, f"{each}.weight_scale") for each in PROJECTIONS}

    def process(
        self, layer: FusedMoE, scales: Sequence[ExpertScales], inputs: tuple[torch.Tensor, torch.Tensor] | None
    ) -> None:
        """One scale for gate and up; no input scale where there was none."""
        for local, own in enumerate(scales):
            common = torch.maximum(own[UP, "weight_scale"], own[GATE, "weight_scale"])
            halves = places(layer, local, layer.w3_w1_weight, layer.w2_weight)
            for projection in (UP, GATE):
                scale = own[projection, "weight_scale"]
                if scale != common:
                    fp8.requantise(halves[projection], scale, common)
            layer.fc31_dequant[local] = common
            layer.fc2_dequant[local] = own[DOWN, "weight_scale"]
        if inputs is None:
            layer.fc31_input_dequant = layer.fc2_quant = None
            return
        self._static(layer)
        assert layer.fc31_input_dequant is not None
        assert layer.fc2_quant is not None
        layer.fc31_input_dequant.copy_(inputs[0])
        layer.fc2_quant.copy_(1 / inputs[1])
        layer.fc31_dequant.mul_(inputs[0])
        layer.fc2_dequant.mul_(inputs[1])

    def to_raw(self, layer: FusedMoE) -> None:
        """With input scales, as constructed."""
        self._static(layer)

    def export_state(self, layer: FusedMoE) -> dict[str, Json]:
        """Which of the two kernels runs."""
        return {_STATIC: layer.fc31_input_dequant is not None}

    def import_state(self, layer: FusedMoE, state: dict[str, Json]) -> None:
        """Have input scales, or not."""
        refuse_state(state, (_STATIC,))
        if boolean(_STATIC, state[_STATIC]):
            self._static(layer)
        else:
            layer.fc31_input_dequant = layer.fc2_quant = None

    def quant_scales(self, layer: FusedMoE) -> QdqScales:
        """All scales."""
        return QdqScales(layer.fc31_dequant, layer.fc2_quant, layer.fc2_dequant, layer.fc31_input_dequant)

    def apply(self, layer: FusedMoE, expert: int, x: torch.Tensor) -> torch.Tensor:
        """Numbers by numbers, and the scales afterwards."""
        scales = layer.quant_scales
        assert isinstance(scales, QdqScales)
        numbers = self.activations(x, scales.fc1_input_dequant)
        inner = F.linear(numbers, layer.w3_w1_weight[expert].float()) * scales.fc1_dequant[expert]
        up, gate = inner.to(x.dtype).chunk(2, dim=-1)
        numbers = self.activations(F.silu(gate) * up, None if scales.fc2_quant is None else 1 / scales.fc2_quant)
        return F.linear(numbers, layer.w2_weight[expert].float()) * scales.fc2_dequant[expert]

    def activations(self, x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        """What the kernel makes of ``x``: e4m3 numbers in units of ``scale``, or by each token's own scale."""
        return fp8.round_trip(x, fp8.scale_of(x, -1)) if scale is None else fp8.quantise(x, scale).float()

    @staticmethod
    def _static(layer: FusedMoE) -> None:
        for name in _INPUTS:
            if getattr(layer, name, None) is None:
                setattr(layer, name, new_parameter(dtype=F32, device=layer.w3_w1_weight.device))


class BlockScales(NamedTuple):
    """What the kernel of ``Fp8BlockMoeMethod`` reads, of all local experts."""

    fc_weight_scales: torch.Tensor
    proj_weight_scales: torch.Tensor


class Fp8BlockMoeMethod(QuantizedMoeMethod):
    """``w3_w1_weight`` and ``w2_weight`` e4m3; ``…_scaling_factor`` for each block of 128 x 128.

    Packed: all four are replaced, expert by expert as ``Fp8BlockMethod`` does it.
    """

    name = FP8_BLOCK
    leaves = ("weight", "weight_scale_inv")
    transform_protocol = "e8m0-v1"
    _grid = Grid(fp8.BLOCK, fp8.BLOCK)

    def create_weights(self, layer: FusedMoE) -> None:
        """Weights and scales."""
        check_width(layer, fp8.BLOCK, self._grid, self.name)
        _create_weights(layer)
        for weight, scale in _PAIRS:
            setattr(layer, scale, new_parameter(*self._raw_scale(getattr(layer, weight)), dtype=F32))

    def fill(self, layer: FusedMoE, local: int, part: Part, *, cut_before: bool) -> ExpertScales:
        """Scales lie as their blocks do."""
        _copy_weights(layer, local, part, cut_before=cut_before)
        scales = places(layer, local, layer.w3_w1_weight_scaling_factor, layer.w2_weight_scaling_factor)
        for projection, place in scales.items():
            source = part[f"{projection}.weight_scale_inv"]
            place.copy_(weight_of(layer, projection).read(source, self._grid, FLOATS, cut_before=cut_before))
        return {}

    def transform_effect(self, layer: FusedMoE) -> dict[str, TransformEffect]:
        """All are replaced."""
        return {name: "replaces" for pair in _PAIRS for name in pair} if is_packed(layer) else {}

    def transform(self, layer: FusedMoE) -> None:
        """Resmooth and lay out."""
        for names in _PAIRS:
            stacked = fp8.pack_blocks(*(getattr(layer, name).detach() for name in names))
            for name, tensor in zip(names, stacked, strict=True):
                setattr(layer, name, nn.Parameter(tensor, requires_grad=False))

    def to_processed(self, layer: FusedMoE) -> None:
        """The scales have another shape and dtype."""
        for weight, scale in _PAIRS:
            count, rows, columns = getattr(layer, weight).shape
            self._renew(layer, scale, fp8.packed_scale_shape(count, rows, columns), torch.int32)

    def to_raw(self, layer: FusedMoE) -> None:
        """The scales as created."""
        for weight, scale in _PAIRS:
            self._renew(layer, scale, self._raw_scale(getattr(layer, weight)), F32)

    def quant_scales(self, layer: FusedMoE) -> BlockScales:
        """All scales."""
        return BlockScales(layer.w3_w1_weight_scaling_factor, layer.w2_weight_scaling_factor)

    def apply(self, layer: FusedMoE, expert: int, x: torch.Tensor) -> torch.Tensor:
        """Dequantise, and multiply in float32."""
        scales = layer.quant_scales
        assert isinstance(scales, BlockScales)
        read = fp8.dequantise_packed if layer.weights_are_packed else fp8.dequantise_blocks
        w3_w1 = read(layer.w3_w1_weight[expert], scales.fc_weight_scales[expert])
        up, gate = F.linear(self.activations(x, None), w3_w1).to(x.dtype).chunk(2, dim=-1)
        w2 = read(layer.w2_weight[expert], scales.proj_weight_scales[expert])
        return F.linear(self.activations(F.silu(gate) * up, None), w2)

    def activations(self, x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:  # noqa: ARG002 - each has its own
        """By the scale of each 128 columns of each token."""
        return fp8.round_trip_blocks(x)

    def _raw_scale(self, weight: torch.Tensor) -> tuple[int, ...]:
        count, rows, columns = weight.shape
        return count, *self._grid.shape(rows, columns)

    @staticmethod
    def _renew(layer: FusedMoE, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        old: torch.Tensor = getattr(layer, name)
        if old.shape != shape or old.dtype is not dtype:
            setattr(layer, name, new_parameter(*shape, dtype=dtype, device=old.device))
