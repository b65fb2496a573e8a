"""NVFP4 weights and activations, with AWQ's input scale where the checkpoint has one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from weightwire.errors import CheckpointError, ConfigError
from weightwire.manifest import sharding
from weightwire.manifest.sharding import Sharding, opaque, whole
from weightwire.runtime.layers.linear import Linear
from weightwire.runtime.layers.method import TransformEffect, refuse_state
from weightwire.runtime.layers.shards import Part, new_parameter
from weightwire.runtime.mapping import TpCoordinates
from weightwire.runtime.quantization import config, nvfp4
from weightwire.runtime.quantization.method import (
    FLOATS,
    PreQuantScale,
    QuantizedLinearMethod,
    Scales,
    bias_cuts,
    device_of,
    is_packed,
    number,
    rows_of,
    weight_cuts,
)
from weightwire.runtime.quantization.slices import SCALAR, Grid, check_cuts, read_part
from weightwire.types import Json

_ALPHA = "scalar_alpha"
_SCALARS = ("input_scale", "inv_input_scale", "alpha", "weight_scale_2")


class Nvfp4Method(QuantizedLinearMethod):
    """``weight`` bytes (local out, local in / 2); ``weight_scale`` e4m3, interleaved, in one dimension; four scalars.

    ``input_scale`` is the reciprocal of the checkpoint's, ``inv_input_scale`` is the checkpoint's, and ``alpha`` is
    that times ``weight_scale_2``. ``scalar_alpha`` is ``alpha`` as a number of Python's, which the kernel reads.

    Packed: where the weight is no multiple of 32 rows and 16 bytes it is replaced by a padded one, and its scales by
    those of that shape.
    """

    name = config.NVFP4
    leaves = ("weight", "weight_scale", "weight_scale_2", "input_scale")
    transform_protocol = "pad32x16-v1"
    _bytes = Grid(1, 2)
    _blocks = Grid(1, nvfp4.GROUP)

    def create(self, layer: Linear) -> None:
        """Everything but ``pre_quant_scale``."""
        check_cuts(layer, self._blocks, self.name)
        if layer.local_in % nvfp4.GROUP:
            raise ConfigError(
                f"{self.name}: {layer.local_in} columns are no multiple of {nvfp4.GROUP}", "use another number of ranks"
            )
        layer.weight = new_parameter(layer.local_out, layer.local_in // 2, dtype=torch.uint8)
        layer.weight_scale = new_parameter(self._scale_size(layer.weight), dtype=nvfp4.FP8)
        for name in _SCALARS:
            setattr(layer, name, new_parameter(1, dtype=torch.float32))
        self._forget(layer)

    def fill(self, layer: Linear, parts: Sequence[Part], tp: TpCoordinates) -> list[Scales]:
        """Bytes as they are; block scales and global ones are for ``process``."""
        found: list[Scales] = []
        for at, _, rows in rows_of(layer):
            part = parts[at]
            layer.weight[rows].copy_(read_part(layer, at, part, "weight", self._bytes, [torch.uint8], tp))
            blocks = read_part(layer, at, part, "weight_scale", self._blocks, [nvfp4.FP8], tp)
            scalars = ("weight_scale_2", "input_scale")
            pair = {name: read_part(layer, at, part, name, SCALAR, FLOATS, tp).float().reshape(1) for name in scalars}
            found.append({"weight_scale": blocks, **pair})
        return found

    def process(self, layer: Linear, scales: Sequence[Scales]) -> None:
        """One global scale for all parts, block scales interleaved, and what follows from them."""
        common = torch.stack([part["weight_scale_2"] for part in scales]).amax(0)
        largest = torch.stack([part["input_scale"] for part in scales]).amax(0)
        blocks = [nvfp4.rescale(part["weight_scale"], part["weight_scale_2"], common) for part in scales]
        stacked = torch.cat([each.view(torch.uint8) for each in blocks]).view(nvfp4.FP8)
        layer.weight_scale.copy_(nvfp4.interleave(stacked))
        layer.weight_scale_2.copy_(common)
        self._of(layer.inv_input_scale).copy_(largest)
        self._of(layer.input_scale).copy_(1 / largest)
        layer.alpha.copy_(largest * common)
        layer.scalar_alpha = float(layer.alpha.item())

    @staticmethod
    def _of(scale: torch.Tensor | None) -> torch.Tensor:
        assert scale is not None
        return scale

    def tensor_shards(self, layer: Linear) -> dict[str, Sharding]:
        """Tiles of interleaved scales hold rows of both sides of a cut, so that nothing can be said of them."""
        scalars = {name: whole((1,)) for name in _SCALARS}
        interleaved = {"weight_scale": opaque("its block scales are interleaved")}
        weight = {"weight": sharding.scales(weight_cuts(layer), (1, 2))}
        return weight | interleaved | scalars | PreQuantScale.shards(layer) | bias_cuts(layer)

    def transform_effect(self, layer: Linear) -> dict[str, TransformEffect]:
        """Both are replaced, where padding is needed."""
        shape = (layer.local_out, layer.local_in // 2)
        if not is_packed(layer) or shape == self._padded(layer):
            return {}
        return {"weight": "replaces", "weight_scale": "replaces"}

    def transform(self, layer: Linear) -> None:
        """Pad, and interleave anew."""
        weight, scales = nvfp4.pad_both(layer.weight.detach(), layer.weight_scale.detach())
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.weight_scale = nn.Parameter(scales, requires_grad=False)

    def to_processed(self, layer: Linear) -> None:
        """Padded shapes."""
        self._renew(layer, self._padded(layer))

    def to_raw(self, layer: Linear) -> None:
        """Shapes as created, and nothing that loading decided."""
        self._renew(layer, (layer.local_out, layer.local_in // 2))
        self._forget(layer)

    def export_state(self, layer: Linear) -> dict[str, Json]:
        """The scalar that the kernel reads, and whether there is a ``pre_quant_scale``."""
        return {_ALPHA: layer.scalar_alpha, PreQuantScale.leaf: PreQuantScale.export(layer)}

    def import_state(self, layer: Linear, state: dict[str, Json]) -> None:
        """Take both over."""
        refuse_state(state, (_ALPHA, PreQuantScale.leaf))
        layer.scalar_alpha = number(_ALPHA, state[_ALPHA])
        PreQuantScale.take(layer, state[PreQuantScale.leaf])

    def apply(self, layer: Linear, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Numbers times block scales on both sides, multiplied, times ``scalar_alpha``."""
        numbers = self.activations(layer, PreQuantScale.apply(layer, x))
        out = nn.functional.linear(numbers, self._scaled_weight(layer)) * layer.scalar_alpha
        return out if bias is None else out + bias.float()

    def activations(self, layer: Linear, x: torch.Tensor) -> torch.Tensor:
        """In units of the input scale: numbers times block scales."""
        return nvfp4.scaled(*nvfp4.quantise(x, self._of(layer.inv_input_scale)))

    def dequantised(self, layer: Linear) -> torch.Tensor:
        """For comparison; ``apply`` puts the global scale in the output."""
        return self._scaled_weight(layer) * layer.weight_scale_2

    def _scaled_weight(self, layer: Linear) -> torch.Tensor:
        return nvfp4.scaled_flat(layer.weight, layer.weight_scale)[: layer.local_out, : layer.local_in]

    @staticmethod
    def _padded(layer: Linear) -> tuple[int, int]:
        return nvfp4.aligned(layer.local_out, layer.local_in // 2)

    @staticmethod
    def _scale_size(weight: torch.Tensor) -> int:
        return nvfp4.interleaved_size(weight.shape[0], weight.shape[1] * 2 // nvfp4.GROUP)

    def _renew(self, layer: Linear, shape: tuple[int, int]) -> None:
        if layer.weight.shape != shape:
            device = device_of(layer)
            layer.weight = new_parameter(*shape, dtype=torch.uint8, device=device)
            layer.weight_scale = new_parameter(self._scale_size(layer.weight), dtype=nvfp4.FP8, device=device)

    @staticmethod
    def _forget(layer: Linear) -> None:
        layer.scalar_alpha = 1.0
        PreQuantScale.clear(layer)


class Nvfp4AwqMethod(Nvfp4Method):
    """NVFP4 with a ``pre_quant_scale`` (local in), created by loading."""

    name = config.NVFP4_AWQ
    optional = (PreQuantScale.leaf,)

    def fill(self, layer: Linear, parts: Sequence[Part], tp: TpCoordinates) -> list[Scales]:
        """As without it, and the input scale."""
        if PreQuantScale.leaf not in parts[0]:
            raise CheckpointError(
                f"{parts[0]['weight'].origin}: a layer has no {PreQuantScale.leaf}",
                "use a checkpoint that is quantized as its config.json says",
            )
        found = super().fill(layer, parts, tp)
        PreQuantScale.load(layer, parts, tp)
        return found
