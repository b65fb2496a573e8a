"""What all quantized ``MoeMethod``s have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from weightwire.errors import CheckpointError, ConfigError
from weightwire.runtime.config import KernelLayout
from weightwire.runtime.layers.moe import FusedMoE, MoeMethod
from weightwire.runtime.layers.shards import Part
from weightwire.runtime.mapping import WHOLE, TpCoordinates
from weightwire.runtime.quantization.method import FLOATS
from weightwire.runtime.quantization.slices import SCALAR, Grid, Weight

UP, GATE, DOWN = "up_proj", "gate_proj", "down_proj"
PROJECTIONS = (GATE, UP, DOWN)
"""w1, w3 and w2 of each expert."""
INPUT_SCALE = "input_scale"

ExpertScales = Mapping[tuple[str, str], torch.Tensor]
"""Of one expert, by projection and leaf name; for the time of one load."""


class QuantizedMoeMethod(MoeMethod):
    """Stages A (``fill``) and B (``process``) of loading.

    Where activations have static scales, all experts of the layer share the largest one, also over those that other
    ranks hold: a token is quantized before it is known which experts it goes to.
    """

    leaves: tuple[str, ...] = ("weight", "weight_scale")
    """Checkpoint tensors of each projection."""
    optional: tuple[str, ...] = ()

    def checkpoint_tensors(self, layer: FusedMoE) -> tuple[str, ...]:  # noqa: ARG002 - the protocol's
        """The method's leaves of three projections."""
        return tuple(f"{projection}.{leaf}" for projection in PROJECTIONS for leaf in self.leaves)

    def optional_tensors(self) -> tuple[str, ...]:
        """Likewise."""
        return tuple(f"{projection}.{leaf}" for projection in PROJECTIONS for leaf in self.optional)

    def tensors_elsewhere(self) -> tuple[str, ...]:
        """Input scales, where the method has any."""
        scaled = INPUT_SCALE in (*self.leaves, *self.optional)
        return tuple(f"{projection}.{INPUT_SCALE}" for projection in PROJECTIONS) if scaled else ()

    def load_weights(self, layer: FusedMoE, parts: Sequence[Part], tp: TpCoordinates) -> frozenset[str]:
        """Stages A and B. What a receiver of a peer's bytes skips is exactly this."""
        inputs = self._input_scales(parts)
        mine = parts[: len(layer.local_experts)]
        cut_before = tp != layer.moe_tp
        scales = [self.fill(layer, local, part, cut_before=cut_before) for local, part in enumerate(mine)]
        self.process(layer, scales, inputs)
        return frozenset(name for name, _ in layer.named_parameters(recurse=False))

    def fill(self, layer: FusedMoE, local: int, part: Part, *, cut_before: bool) -> ExpertScales:
        """Stage A, of one expert: cut, fuse, copy. What of it ``process`` needs."""
        raise NotImplementedError

    def process(
        self, layer: FusedMoE, scales: Sequence[ExpertScales], inputs: tuple[torch.Tensor, torch.Tensor] | None
    ) -> None:
        """Stage B: what needs gate and up together, or all experts.

        ``inputs``: the largest input scale of gate and up, and of down; ``None`` where the checkpoint has none.
        """

    @staticmethod
    def _input_scales(parts: Sequence[Part]) -> tuple[torch.Tensor, torch.Tensor] | None:
        names = [f"{projection}.{INPUT_SCALE}" for projection in PROJECTIONS]
        there = {name in part for part in parts for name in names}
        if there != {True}:
            if True in there:
                raise CheckpointError(
                    f"{parts[0][f'{GATE}.weight'].origin}: only some experts of a layer have {INPUT_SCALE}",
                    "use a checkpoint that belongs to its config.json",
                )
            return None
        gate, up, down = (torch.stack([read_scalar(part, name) for part in parts]).max() for name in names)
        return torch.maximum(gate, up), down


def read_scalar(part: Part, name: str) -> torch.Tensor:
    """A scale that no rank cuts: (), float32."""
    return Weight(1, 1, None, WHOLE).read(part[name], SCALAR, FLOATS).float().reshape(())


def weight_of(layer: FusedMoE, projection: str) -> Weight:
    """Of one projection of each expert: gate and up are cut by row, down by column."""
    if projection == DOWN:
        return Weight(layer.hidden, layer.intermediate, 1, layer.moe_tp)
    return Weight(layer.intermediate, layer.hidden, 0, layer.moe_tp)


def places(layer: FusedMoE, local: int, w3_w1: torch.Tensor, w2: torch.Tensor) -> dict[str, torch.Tensor]:
    """Where the projections of one expert lie in two tensors of all experts: up first, then gate."""
    up, gate = w3_w1[local].chunk(2) if layer.local_width else (w3_w1[local], w3_w1[local])
    return {UP: up, GATE: gate, DOWN: w2[local]}


def check_width(layer: FusedMoE, step: int, grid: Grid, what: str) -> None:
    """Refuse experts whose cuts go through what is stored together.

    Raises:
        ConfigError: they do, or the local width is no multiple of ``step``.
    """
    for projection in PROJECTIONS:
        weight_of(layer, projection).bounds(grid, f"{what} experts")
    if not layer.local_width or layer.local_width % step:
        raise ConfigError(
            f"{what}: experts {layer.local_width} wide on this rank are no multiple of {step}",
            "use another number of ranks, or share the experts (ep)",
        )


def is_packed(layer: FusedMoE) -> bool:
    """Whether the kernel layout asked for has the weights transformed."""
    return layer.context.layout is KernelLayout.PACKED
