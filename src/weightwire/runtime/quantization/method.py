"""What all quantized ``LinearMethod``s have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from weightwire.errors import CheckpointError, ManifestMismatch
from weightwire.manifest.sharding import Cut, Sharding, stacked, whole
from weightwire.runtime.config import KernelLayout
from weightwire.runtime.layers.linear import Linear, LinearMethod, OutPart, TensorParallelMode
from weightwire.runtime.layers.shards import Part, new_parameter
from weightwire.runtime.mapping import TpCoordinates, shard_range
from weightwire.runtime.quantization.slices import COLUMNS, read_part
from weightwire.types import Json

Scales = Mapping[str, torch.Tensor]
"""Of one part, by leaf name; for the time of one load."""

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class QuantizedLinearMethod(LinearMethod):
    """Stages A (``fill``) and B (``process``) of loading, with the bias, which is never quantized."""

    leaves: tuple[str, ...] = ("weight", "weight_scale")
    """Checkpoint tensors beside the bias."""
    optional: tuple[str, ...] = ()

    def create_weights(self, layer: Linear) -> None:
        """As ``create``, and the bias."""
        layer.bias = new_parameter(layer.local_out, dtype=layer.context.dtype) if layer.has_bias else None
        self.create(layer)

    def checkpoint_tensors(self, layer: Linear) -> tuple[str, ...]:
        """The method's leaves, and the bias."""
        return (*self.leaves, "bias") if layer.has_bias else self.leaves

    def optional_tensors(self) -> tuple[str, ...]:
        """The method's."""
        return self.optional

    def load_weights(self, layer: Linear, parts: Sequence[Part], tp: TpCoordinates) -> frozenset[str]:
        """Stages A and B. What a receiver of peer's bytes skips is exactly this."""
        for leaf in self.optional:
            if len({leaf in tensors for tensors in parts}) > 1:
                raise CheckpointError(
                    f"{parts[0]['weight'].origin}: only some parts of a fused layer have {leaf}",
                    "use a checkpoint that belongs to its config.json",
                )
        self.process(layer, self.fill(layer, parts, tp))
        if layer.bias is not None:
            offset = 0
            for part, tensors in zip(layer.parts, parts, strict=True):
                rows = layer.local_rows(part)
                layer.copy_bias(layer.bias.narrow(0, offset, rows), tensors, part, tp)
                offset += rows
        return frozenset(name for name, _ in layer.named_parameters(recurse=False))

    def create(self, layer: Linear) -> None:
        """Register everything but the bias."""
        raise NotImplementedError

    def fill(self, layer: Linear, parts: Sequence[Part], tp: TpCoordinates) -> list[Scales]:
        """Stage A: cut, fuse, copy. What of each part ``process`` needs."""
        raise NotImplementedError

    def process(self, layer: Linear, scales: Sequence[Scales]) -> None:
        """Stage B: what needs all parts at once."""

    def apply(self, layer: Linear, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The reference kernel: dequantise, and multiply in float32."""
        shift = None if bias is None else bias.float()
        return nn.functional.linear(self.activations(layer, x).float(), self.dequantised(layer), shift)

    def activations(self, layer: Linear, x: torch.Tensor) -> torch.Tensor:  # noqa: ARG002 - for those that quantise them
        """What the kernel makes of ``x``."""
        return x

    def dequantised(self, layer: Linear) -> torch.Tensor:
        """The weight that the kernel computes with: (local out, local in), float32."""
        raise NotImplementedError


def is_packed(layer: Linear) -> bool:
    """Whether the kernel layout asked for has the weights transformed."""
    return layer.context.layout is KernelLayout.PACKED


def device_of(layer: Linear) -> torch.device:
    """Where the layer is."""
    return layer.weight.device


def rows_of(layer: Linear) -> list[tuple[int, OutPart, slice]]:
    """Number, part and local rows of each part."""
    found, at = [], 0
    for number, part in enumerate(layer.parts):
        rows = layer.local_rows(part)
        found.append((number, part, slice(at, at + rows)))
        at += rows
    return found


def weight_cuts(layer: Linear) -> Sharding:
    """Of a weight of (local out, local in), one element for each number of it."""
    return stacked([layer.cut(part, at, layer.in_features) for at, part in enumerate(layer.parts)])


def row_cuts(layer: Linear) -> Sharding:
    """Of what has one element for each row: a bias, scales by row."""
    return stacked([layer.cut(part, at) for at, part in enumerate(layer.parts)])


def bias_cuts(layer: Linear) -> dict[str, Sharding]:
    """Of the bias, where there is one."""
    return {"bias": row_cuts(layer)} if layer.has_bias else {}


class PreQuantScale:
    """``pre_quant_scale``: a parameter that only loading creates, where the checkpoint has one (AWQ).

    It multiplies the layer's input, so it is cut with the weight's columns.
    """

    leaf = "pre_quant_scale"

    @staticmethod
    def clear(layer: Linear) -> None:
        """None, as constructed."""
        layer.register_parameter(PreQuantScale.leaf, None)

    @staticmethod
    def create(layer: Linear) -> None:
        """Uninitialised."""
        layer.pre_quant_scale = new_parameter(layer.local_in, dtype=torch.float32, device=device_of(layer))

    @staticmethod
    def load(layer: Linear, parts: Sequence[Part], tp: TpCoordinates) -> None:
        """Created where the parts have one; they must have the same, for their input is the same."""
        if PreQuantScale.leaf not in parts[0]:
            PreQuantScale.clear(layer)
            return
        found = [
            read_part(layer, number, tensors, PreQuantScale.leaf, COLUMNS, FLOATS, tp)
            for number, tensors in enumerate(parts)
        ]
        if not all(torch.equal(found[0], other) for other in found):
            raise CheckpointError(
                f"{parts[0][PreQuantScale.leaf].origin}: the parts of a fused layer have different pre_quant_scale",
                "export the checkpoint with scales that fused layers share",
            )
        PreQuantScale.create(layer)
        assert layer.pre_quant_scale is not None
        layer.pre_quant_scale.copy_(found[0])

    @staticmethod
    def shards(layer: Linear) -> dict[str, Sharding]:
        """Which columns of the whole layer's it is for."""
        columns = (layer.in_features,)
        if layer.mode is not TensorParallelMode.ROW:
            return {PreQuantScale.leaf: whole(columns)}
        return {PreQuantScale.leaf: stacked([Cut(columns, 0, *shard_range(layer.in_features, layer.context.tp))])}

    @staticmethod
    def export(layer: Linear) -> Json:
        """Whether there is one."""
        return layer.pre_quant_scale is not None

    @staticmethod
    def take(layer: Linear, value: Json) -> None:
        """As ``export`` told it."""
        if boolean(PreQuantScale.leaf, value):
            PreQuantScale.create(layer)
        else:
            PreQuantScale.clear(layer)

    @staticmethod
    def apply(layer: Linear, x: torch.Tensor) -> torch.Tensor:
        """The input times it."""
        scale = layer.pre_quant_scale
        return x if scale is None else x.float() * scale


def boolean(name: str, value: Json) -> bool:
    """``value`` of a peer, which must be true or false."""
    if not isinstance(value, bool):
        raise ManifestMismatch(f"declared state {name} is {value!r:.40}, not true or false", "the peer is broken")
    return value


def number(name: str, value: Json) -> float:
    """``value`` of a peer, which must be a number."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ManifestMismatch(f"declared state {name} is {value!r:.40}, not a number", "the peer is broken")
    return float(value)
