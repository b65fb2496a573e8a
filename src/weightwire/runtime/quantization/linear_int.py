"""Integer weights with 16-bit activations: int8 by row, and int4 by group (AWQ)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from weightwire.errors import ConfigError
from weightwire.manifest import sharding
from weightwire.manifest.sharding import Sharding, transposed
from weightwire.runtime.layers.linear import Linear
from weightwire.runtime.layers.method import refuse_state
from weightwire.runtime.layers.shards import Part, new_parameter
from weightwire.runtime.mapping import TpCoordinates
from weightwire.runtime.quantization import integers
from weightwire.runtime.quantization.config import INT8_WEIGHT_ONLY, W4A16_AWQ
from weightwire.runtime.quantization.method import (
    FLOATS,
    PreQuantScale,
    QuantizedLinearMethod,
    Scales,
    bias_cuts,
    row_cuts,
    rows_of,
    weight_cuts,
)
from weightwire.runtime.quantization.slices import ROWS, Grid, check_cuts, read_part
from weightwire.types import Json


class Int8WeightOnlyMethod(QuantizedLinearMethod):
    """``weight`` int8 (local in, local out), which loading transposes; ``weight_scale`` (local out)."""

    name = INT8_WEIGHT_ONLY

    def create(self, layer: Linear) -> None:
        """Both."""
        layer.weight = new_parameter(layer.local_in, layer.local_out, dtype=torch.int8)
        layer.weight_scale = new_parameter(layer.local_out, dtype=torch.float32)

    def fill(self, layer: Linear, parts: Sequence[Part], tp: TpCoordinates) -> list[Scales]:
        """Transpose each part."""
        for number, _, rows in rows_of(layer):
            weight = read_part(layer, number, parts[number], "weight", Grid(), [torch.int8], tp)
            layer.weight[:, rows].copy_(weight.t())
            layer.weight_scale[rows].copy_(read_part(layer, number, parts[number], "weight_scale", ROWS, FLOATS, tp))
        return []

    def tensor_shards(self, layer: Linear) -> dict[str, Sharding]:
        """The weight is cut like any other, and lies the other way round; scales are cut as rows are."""
        return {"weight": transposed(weight_cuts(layer)), "weight_scale": row_cuts(layer), **bias_cuts(layer)}

    def dequantised(self, layer: Linear) -> torch.Tensor:
        """Each row by its scale."""
        return layer.weight.t().float() * layer.weight_scale.unsqueeze(1)


class W4A16AwqMethod(QuantizedLinearMethod):
    """``weight`` bytes (local in, local out / 2), ``weight_scale`` (local in / group, local out): both transposed.

    ``pre_quant_scale`` (local in) is created by loading.
    """

    name = W4A16_AWQ
    optional = (PreQuantScale.leaf,)

    def __init__(self, group: int) -> None:
        self.group = group

    def create(self, layer: Linear) -> None:
        """All but ``pre_quant_scale``."""
        check_cuts(layer, Grid(2, 1), self.name)
        check_cuts(layer, Grid(1, self.group), self.name)
        if layer.local_in % self.group or layer.local_out % 2:
            raise ConfigError(
                f"{self.name}: {layer.local_out} rows of {layer.local_in} columns are no pairs of whole groups",
                "use another number of ranks",
            )
        layer.weight = new_parameter(layer.local_in, layer.local_out // 2, dtype=torch.uint8)
        groups = layer.local_in // self.group
        layer.weight_scale = new_parameter(groups, layer.local_out, dtype=layer.context.dtype)
        PreQuantScale.clear(layer)

    def fill(self, layer: Linear, parts: Sequence[Part], tp: TpCoordinates) -> list[Scales]:
        """Transpose each part."""
        for number, _, rows in rows_of(layer):
            weight = read_part(layer, number, parts[number], "weight", Grid(2, 1), [torch.uint8], tp)
            layer.weight[:, rows.start // 2 : rows.stop // 2].copy_(weight.t())
            scales = read_part(layer, number, parts[number], "weight_scale", Grid(1, self.group), FLOATS, tp)
            layer.weight_scale[:, rows].copy_(scales.t())
        PreQuantScale.load(layer, parts, tp)
        return []

    def tensor_shards(self, layer: Linear) -> dict[str, Sharding]:
        """Pairs of rows, and groups of columns, of which no cut goes through one; both lie the other way round."""
        weight = weight_cuts(layer)
        pairs, groups = sharding.scales(weight, (2, 1)), sharding.scales(weight, (1, self.group))
        scales = {"weight": transposed(pairs), "weight_scale": transposed(groups)}
        return scales | PreQuantScale.shards(layer) | bias_cuts(layer)

    def to_raw(self, layer: Linear) -> None:
        """Forget what loading created."""
        PreQuantScale.clear(layer)

    def export_state(self, layer: Linear) -> dict[str, Json]:
        """Whether there is a ``pre_quant_scale``."""
        return {PreQuantScale.leaf: PreQuantScale.export(layer)}

    def import_state(self, layer: Linear, state: dict[str, Json]) -> None:
        """Create it, or not."""
        refuse_state(state, (PreQuantScale.leaf,))
        PreQuantScale.take(layer, state[PreQuantScale.leaf])

    def activations(self, layer: Linear, x: torch.Tensor) -> torch.Tensor:
        """Scaled."""
        return PreQuantScale.apply(layer, x)

    def dequantised(self, layer: Linear) -> torch.Tensor:
        """Each group by its scale."""
        return integers.dequantise_int4(layer.weight.t(), layer.weight_scale.t())
