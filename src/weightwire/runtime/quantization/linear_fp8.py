"""FP8 weights: one scale for a tensor, for a row, or for a block of 128 x 128."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from weightwire.manifest import sharding
from weightwire.manifest.sharding import Sharding, whole
from weightwire.runtime.layers.linear import Linear
from weightwire.runtime.layers.method import TransformEffect, refuse_state
from weightwire.runtime.layers.shards import Part, new_parameter
from weightwire.runtime.mapping import TpCoordinates
from weightwire.runtime.quantization import fp8
from weightwire.runtime.quantization.config import FP8_BLOCK, FP8_QDQ, FP8_ROWWISE
from weightwire.runtime.quantization.method import (
    FLOATS,
    QuantizedLinearMethod,
    Scales,
    bias_cuts,
    boolean,
    device_of,
    is_packed,
    row_cuts,
    rows_of,
    weight_cuts,
)
from weightwire.runtime.quantization.slices import ROWS, SCALAR, Grid, check_cuts, read_part
from weightwire.types import Json

F32 = torch.float32
_STATIC = "static_input"
_INPUT_SCALES = ("input_scale", "inv_input_scale")


class Fp8QdqMethod(QuantizedLinearMethod):
    """``weight`` e4m3 with one scale for all of a fused layer; static activation scales, or dynamic ones.

    Loading rounds each part of a fused layer anew, in place, so that all have the largest part's scale, and removes
    ``input_scale`` and ``inv_input_scale`` where the checkpoint has none: activations are then scaled token by token.
    """

    name = FP8_QDQ
    optional = ("input_scale",)

    def create(self, layer: Linear) -> None:
        """The weight and three scalars."""
        layer.weight = new_parameter(layer.local_out, layer.local_in, dtype=fp8.FP8)
        layer.weight_scale = new_parameter(dtype=F32)
        self._static(layer)

    def fill(self, layer: Linear, parts: Sequence[Part], tp: TpCoordinates) -> list[Scales]:
        """Weights as they are; the parts' scales are for ``process``."""
        found: list[Scales] = []
        for number, _, rows in rows_of(layer):
            part = parts[number]
            layer.weight[rows].copy_(read_part(layer, number, part, "weight", Grid(), [fp8.FP8], tp))
            names = [name for name in ("weight_scale", "input_scale") if name in part]
            found.append({name: _scalar(read_part(layer, number, part, name, SCALAR, FLOATS, tp)) for name in names})
        return found

    def process(self, layer: Linear, scales: Sequence[Scales]) -> None:
        """One scale for all parts; no input scale where there was none."""
        common = torch.stack([part["weight_scale"] for part in scales]).max()
        for number, _, rows in rows_of(layer):
            own = scales[number]["weight_scale"]
            if own != common:
                fp8.requantise(layer.weight[rows], own, common)
        layer.weight_scale.copy_(common)
        if "input_scale" not in scales[0]:
            layer.input_scale = layer.inv_input_scale = None
            return
        largest = torch.stack([part["input_scale"] for part in scales]).max()
        self.to_raw(layer)
        for scale, value in ((layer.input_scale, largest), (layer.inv_input_scale, 1 / largest)):
            assert scale is not None
            scale.copy_(value)  # in place: where it lies may be known already

    def tensor_shards(self, layer: Linear) -> dict[str, Sharding]:
        """Scales are those of the whole layer, so the weight is cut like any other."""
        scalars = ("weight_scale", *_INPUT_SCALES)
        return {"weight": weight_cuts(layer), **{name: whole(()) for name in scalars}, **bias_cuts(layer)}

    def to_raw(self, layer: Linear) -> None:
        """With input scales, as constructed."""
        if layer.input_scale is None:
            self._static(layer)

    def export_state(self, layer: Linear) -> dict[str, Json]:
        """Which of the two kernels runs."""
        return {_STATIC: layer.input_scale is not None}

    def import_state(self, layer: Linear, state: dict[str, Json]) -> None:
        """Have input scales, or not."""
        refuse_state(state, (_STATIC,))
        if not boolean(_STATIC, state[_STATIC]):
            layer.input_scale = layer.inv_input_scale = None
        elif layer.input_scale is None:
            self._static(layer)

    def activations(self, layer: Linear, x: torch.Tensor) -> torch.Tensor:
        """By the checkpoint's scale, or by each token's own."""
        if layer.input_scale is None:
            return fp8.round_trip(x, fp8.scale_of(x, -1))
        return fp8.round_trip(x, layer.input_scale)

    def dequantised(self, layer: Linear) -> torch.Tensor:
        """By the one scale."""
        return fp8.dequantise(layer.weight, layer.weight_scale)

    @staticmethod
    def _static(layer: Linear) -> None:
        """Both scales at 1, which is what a kernel would take for a scale if nobody told otherwise."""
        for name in _INPUT_SCALES:
            _set_scalar(layer, name, torch.ones((), dtype=F32, device=device_of(layer)))


class Fp8RowwiseMethod(QuantizedLinearMethod):
    """``weight`` e4m3 and ``weight_scale`` (local out); activations are scaled token by token."""

    name = FP8_ROWWISE
    optional = ("input_scale_ub",)

    def create(self, layer: Linear) -> None:
        """Both."""
        layer.weight = new_parameter(layer.local_out, layer.local_in, dtype=fp8.FP8)
        layer.weight_scale = new_parameter(layer.local_out, dtype=F32)

    def fill(self, layer: Linear, parts: Sequence[Part], tp: TpCoordinates) -> list[Scales]:
        """Scales are cut as rows are."""
        for number, _, rows in rows_of(layer):
            part = parts[number]
            layer.weight[rows].copy_(read_part(layer, number, part, "weight", Grid(), [fp8.FP8], tp))
            layer.weight_scale[rows].copy_(read_part(layer, number, part, "weight_scale", ROWS, FLOATS, tp))
        return []

    def tensor_shards(self, layer: Linear) -> dict[str, Sharding]:
        """Scales are cut as rows are, never as columns."""
        return {"weight": weight_cuts(layer), "weight_scale": row_cuts(layer), **bias_cuts(layer)}

    def activations(self, layer: Linear, x: torch.Tensor) -> torch.Tensor:  # noqa: ARG002 - each token by itself
        """By each token's own scale."""
        return fp8.round_trip(x, fp8.scale_of(x, -1))

    def dequantised(self, layer: Linear) -> torch.Tensor:
        """Each row by its scale."""
        return fp8.dequantise(layer.weight, layer.weight_scale.unsqueeze(1))


class Fp8BlockMethod(QuantizedLinearMethod):
    """``weight`` e4m3 and ``weight_scale`` for each block of 128 x 128.

    Packed: both are replaced. Scales become powers of two (e8m0), the weight is rounded anew to fit them, and they are
    laid out as the kernel reads them (``fp8.lay_out_e8m0``).
    """

    name = FP8_BLOCK
    leaves = ("weight", "weight_scale_inv")
    transform_protocol = "e8m0-v1"
    _grid = Grid(fp8.BLOCK, fp8.BLOCK)

    def create(self, layer: Linear) -> None:
        """Both."""
        check_cuts(layer, self._grid, self.name)
        layer.weight = new_parameter(layer.local_out, layer.local_in, dtype=fp8.FP8)
        layer.weight_scale = new_parameter(*self._raw_scale(layer), dtype=F32)

    def fill(self, layer: Linear, parts: Sequence[Part], tp: TpCoordinates) -> list[Scales]:
        """Rows of scales lie below one another as blocks of rows do."""
        for number, _, rows in rows_of(layer):
            part = parts[number]
            layer.weight[rows].copy_(read_part(layer, number, part, "weight", Grid(), [fp8.FP8], tp))
            blocks = slice(rows.start // fp8.BLOCK, -(-rows.stop // fp8.BLOCK))
            scale = read_part(layer, number, part, "weight_scale_inv", self._grid, FLOATS, tp)
            layer.weight_scale[blocks].copy_(scale)
        return []

    def tensor_shards(self, layer: Linear) -> dict[str, Sharding]:
        """Scales are cut as blocks are."""
        weight = weight_cuts(layer)
        return {"weight": weight, "weight_scale": sharding.scales(weight, (fp8.BLOCK, fp8.BLOCK)), **bias_cuts(layer)}

    def transform_effect(self, layer: Linear) -> dict[str, TransformEffect]:
        """Both are replaced."""
        return {"weight": "replaces", "weight_scale": "replaces"} if is_packed(layer) else {}

    def transform(self, layer: Linear) -> None:
        """Resmooth and lay out."""
        weight, powers = fp8.resmooth(layer.weight.detach(), layer.weight_scale.detach())
        layer.weight = nn.Parameter(weight, requires_grad=False)
        laid_out = fp8.lay_out_e8m0(powers, layer.local_out)
        layer.weight_scale = nn.Parameter(laid_out, requires_grad=False)

    def to_processed(self, layer: Linear) -> None:
        """The scales have another shape and dtype."""
        blocks = self._raw_scale(layer)[1]
        self._renew(layer, (-(-blocks // 4), layer.local_out), torch.int32)

    def to_raw(self, layer: Linear) -> None:
        """The scales as created."""
        self._renew(layer, self._raw_scale(layer), F32)

    def activations(self, layer: Linear, x: torch.Tensor) -> torch.Tensor:  # noqa: ARG002 - each token by itself
        """By the scale of each 128 columns of each token."""
        return fp8.round_trip_blocks(x)

    def dequantised(self, layer: Linear) -> torch.Tensor:
        """Each block by its scale, as they lie now."""
        read = fp8.dequantise_packed if layer.weights_are_packed else fp8.dequantise_blocks
        return read(layer.weight, layer.weight_scale)

    @staticmethod
    def _raw_scale(layer: Linear) -> tuple[int, int]:
        return -(-layer.local_out // fp8.BLOCK), -(-layer.local_in // fp8.BLOCK)

    @staticmethod
    def _renew(layer: Linear, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        if layer.weight_scale.shape != shape or layer.weight_scale.dtype is not dtype:
            layer.weight_scale = new_parameter(*shape, dtype=dtype, device=device_of(layer))


def _set_scalar(layer: Linear, name: str, value: torch.Tensor) -> None:
    setattr(layer, name, nn.Parameter(value.to(device_of(layer), copy=True), requires_grad=False))


def _scalar(value: torch.Tensor) -> torch.Tensor:
    return value.float().reshape(())
