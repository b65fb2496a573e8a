"""NVFP4 experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import nn

from weightwire.runtime.layers.method import TransformEffect
from weightwire.runtime.layers.moe import FusedMoE
from weightwire.runtime.layers.shards import Part, new_parameter
from weightwire.runtime.quantization import nvfp4
from weightwire.runtime.quantization.config import NVFP4
from weightwire.runtime.quantization.experts import (
    DOWN,
    GATE,
    UP,
    ExpertScales,
    QuantizedMoeMethod,
    check_width,
    is_packed,
    places,
    read_scalar,
    weight_of,
)
from weightwire.runtime.quantization.slices import Grid

F32 = torch.float32
_PAIRS = (("w3_w1_weight", "w3_w1_weight_scale"), ("w2_weight", "w2_weight_scale"))


class Nvfp4Scales(NamedTuple):
    """What the kernel reads: activations' factors, block scales of all local experts, and each expert's ``alpha``."""

    fc1_act_global: torch.Tensor
    fc1_weight_block: torch.Tensor
    fc1_global: torch.Tensor
    fc2_act_global: torch.Tensor
    fc2_weight_block: torch.Tensor
    fc2_global: torch.Tensor


class Nvfp4MoeMethod(QuantizedMoeMethod):
    """``w3_w1_weight`` (experts, 2 x local width, hidden / 2) and ``w2_weight`` (experts, hidden, width / 2), in bytes.

    ``…_weight_scale`` are e4m3 block scales, interleaved, in one dimension for each expert; gate and up are interleaved
    together, since padding comes after both. ``fc31_`` and ``fc2_``: ``input_scale`` (), the reciprocal of the
    checkpoint's largest; ``weight_scale_2`` (experts), one for gate and up; ``alpha`` (experts), the quotient of these.

    Packed: as of ``Nvfp4Method``, for each pair of weight and block scales that needs padding.
    """

    name = NVFP4
    leaves = ("weight", "weight_scale", "weight_scale_2", "input_scale")
    transform_protocol = "pad32x16-v1"
    _bytes = Grid(1, 2)
    _blocks = Grid(1, nvfp4.GROUP)

    def create_weights(self, layer: FusedMoE) -> None:
        """Everything."""
        check_width(layer, nvfp4.GROUP, self._blocks, self.name)
        for names, shape in zip(_PAIRS, self._shapes(layer), strict=True):
            self._make(layer, names, shape, None)
        for name in ("fc31", "fc2"):
            setattr(layer, f"{name}_input_scale", new_parameter(dtype=F32))
            setattr(layer, f"{name}_weight_scale_2", new_parameter(len(layer.local_experts), dtype=F32))
            setattr(layer, f"{name}_alpha", new_parameter(len(layer.local_experts), dtype=F32))

    def fill(self, layer: FusedMoE, local: int, part: Part, *, cut_before: bool) -> ExpertScales:
        """Bytes as they are; scales are for ``process``."""
        found: dict[tuple[str, str], torch.Tensor] = {}
        for projection, place in places(layer, local, layer.w3_w1_weight, layer.w2_weight).items():
            weight, prefix = weight_of(layer, projection), f"{projection}."
            place.copy_(weight.read(part[prefix + "weight"], self._bytes, [torch.uint8], cut_before=cut_before))
            blocks = weight.read(part[prefix + "weight_scale"], self._blocks, [nvfp4.FP8], cut_before=cut_before)
            found[projection, "weight_scale"] = blocks
            found[projection, "weight_scale_2"] = read_scalar(part, prefix + "weight_scale_2")
        return found

    def process(
        self, layer: FusedMoE, scales: Sequence[ExpertScales], inputs: tuple[torch.Tensor, torch.Tensor] | None
    ) -> None:
        """One global scale for gate and up, block scales interleaved, and what follows from them."""
        assert inputs is not None
        for local, own in enumerate(scales):
            common = torch.maximum(own[UP, "weight_scale_2"], own[GATE, "weight_scale_2"])
            rescaled = [
                nvfp4.rescale(own[each, "weight_scale"], own[each, "weight_scale_2"], common) for each in (UP, GATE)
            ]
            stacked = torch.cat([blocks.view(torch.uint8) for blocks in rescaled]).view(nvfp4.FP8)
            layer.w3_w1_weight_scale[local].copy_(nvfp4.interleave(stacked))
            layer.w2_weight_scale[local].copy_(nvfp4.interleave(own[DOWN, "weight_scale"]))
            layer.fc31_weight_scale_2[local] = common
            layer.fc2_weight_scale_2[local] = own[DOWN, "weight_scale_2"]
        layer.fc31_input_scale.copy_(1 / inputs[0])
        layer.fc2_input_scale.copy_(1 / inputs[1])
        layer.fc31_alpha.copy_(layer.fc31_weight_scale_2 * inputs[0])
        layer.fc2_alpha.copy_(layer.fc2_weight_scale_2 * inputs[1])

    def transform_effect(self, layer: FusedMoE) -> dict[str, TransformEffect]:
        """Pairs are replaced where padding is needed."""
        if not is_packed(layer):
            return {}
        needed = [names for names, raw in zip(_PAIRS, self._shapes(layer), strict=True) if raw != nvfp4.aligned(*raw)]
        return {name: "replaces" for names in needed for name in names}

    def transform(self, layer: FusedMoE) -> None:
        """Pad, and interleave anew."""
        effect = self.transform_effect(layer)
        for names in _PAIRS:
            if names[0] in effect:
                padded = nvfp4.pad_all(*(getattr(layer, name).detach() for name in names))
                for name, tensor in zip(names, padded, strict=True):
                    setattr(layer, name, nn.Parameter(tensor, requires_grad=False))

    def to_processed(self, layer: FusedMoE) -> None:
        """Padded shapes."""
        for names, shape in zip(_PAIRS, self._shapes(layer), strict=True):
            self._renew(layer, names, nvfp4.aligned(*shape))

    def to_raw(self, layer: FusedMoE) -> None:
        """Shapes as created."""
        for names, shape in zip(_PAIRS, self._shapes(layer), strict=True):
            self._renew(layer, names, shape)

    def quant_scales(self, layer: FusedMoE) -> Nvfp4Scales:
        """All that kernels read."""
        return Nvfp4Scales(
            layer.fc31_input_scale,
            layer.w3_w1_weight_scale,
            layer.fc31_alpha,
            layer.fc2_input_scale,
            layer.w2_weight_scale,
            layer.fc2_alpha,
        )

    def apply(self, layer: FusedMoE, expert: int, x: torch.Tensor) -> torch.Tensor:
        """Numbers times block scales on both sides, multiplied, times ``alpha``."""
        scales = layer.quant_scales
        assert isinstance(scales, Nvfp4Scales)
        (rows, _), (hidden, _) = self._shapes(layer)
        w3_w1 = nvfp4.scaled_flat(layer.w3_w1_weight[expert], scales.fc1_weight_block[expert])[:rows, : layer.hidden]
        numbers = self.activations(x, 1 / scales.fc1_act_global)
        up, gate = (F.linear(numbers, w3_w1) * scales.fc1_global[expert]).to(x.dtype).chunk(2, dim=-1)
        w2 = nvfp4.scaled_flat(layer.w2_weight[expert], scales.fc2_weight_block[expert])
        numbers = self.activations(F.silu(gate) * up, 1 / scales.fc2_act_global)
        return F.linear(numbers, w2[:hidden, : layer.local_width]) * scales.fc2_global[expert]

    def activations(self, x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        """What the kernel makes of ``x``, in units of ``scale``: numbers times block scales."""
        assert scale is not None
        return nvfp4.scaled(*nvfp4.quantise(x, scale))

    @staticmethod
    def _shapes(layer: FusedMoE) -> tuple[tuple[int, int], tuple[int, int]]:
        """Rows and bytes of each expert's weights, raw."""
        return (2 * layer.local_width, layer.hidden // 2), (layer.hidden, layer.local_width // 2)

    @staticmethod
    def _make(layer: FusedMoE, names: tuple[str, str], shape: tuple[int, int], device: torch.device | None) -> None:
        count, scales = len(layer.local_experts), nvfp4.interleaved_size(shape[0], shape[1] * 2 // nvfp4.GROUP)
        setattr(layer, names[0], new_parameter(count, *shape, dtype=torch.uint8, device=device))
        setattr(layer, names[1], new_parameter(count, scales, dtype=nvfp4.FP8, device=device))

    def _renew(self, layer: FusedMoE, names: tuple[str, str], shape: tuple[int, int]) -> None:
        old: torch.Tensor = getattr(layer, names[0])
        if old.shape[1:] != shape:
            self._make(layer, names, shape, old.device)
