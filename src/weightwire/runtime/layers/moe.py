"""Routed experts: each rank holds some of them (expert parallelism), a part of each (tensor parallelism), or both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import nn

from weightwire.errors import ConfigError
from weightwire.manifest.boxes import Box
from weightwire.manifest.sharding import Piece, Sharding, whole
from weightwire.runtime.config import KernelLayout
from weightwire.runtime.family_config import MoeConfig
from weightwire.runtime.layers.context import LayerContext
from weightwire.runtime.layers.linear import multiply
from weightwire.runtime.layers.method import LoadableLayer, TransformEffect, WeightMethod
from weightwire.runtime.layers.shards import Part, copy_shard, copy_whole, new_parameter
from weightwire.runtime.mapping import TpCoordinates, shard_range


class MoeMethod(WeightMethod["FusedMoE"]):
    """How a ``FusedMoE`` stores and multiplies its experts.

    ``load_weights`` is given this rank's experts, in local order, and after them the other ranks', of which there is
    only what ``tensors_elsewhere`` names. ``tp`` is the layer's ``moe_tp``, or ``WHOLE`` where the experts were cut
    before: by no other coordinates may anything be cut, scales included.
    """

    def tensors_elsewhere(self) -> tuple[str, ...]:
        """Leaf names that a rank needs of other ranks' experts, too (where the checkpoint has them)."""
        return ()

    def quant_scales(self, layer: FusedMoE) -> tuple[torch.Tensor | None, ...]:  # noqa: ARG002 - for those with some
        """References to the layer's own tensors that kernels want in one tuple, and read there alone."""
        return ()

    def apply(self, layer: FusedMoE, expert: int, x: torch.Tensor) -> torch.Tensor:
        """``x`` (tokens, hidden) through local ``expert``: (tokens, hidden), a part of the sum over ``moe_tp``."""
        raise NotImplementedError


class UnquantizedMoeMethod(MoeMethod):
    """``w3_w1_weight``: (experts, 2 x local width, hidden), up (w3) first; ``w2_weight``: (experts, hidden, width).

    Packed: ``w3_w1_weight`` is replaced by its contiguous transpose (local experts, hidden, 2 x local width).
    """

    def create_weights(self, layer: FusedMoE) -> None:
        """Register both weights."""
        count, width, hidden = len(layer.local_experts), layer.local_width, layer.hidden
        layer.w3_w1_weight = new_parameter(count, 2 * width, hidden, dtype=layer.context.dtype)
        layer.w2_weight = new_parameter(count, hidden, width, dtype=layer.context.dtype)

    def checkpoint_tensors(self, layer: FusedMoE) -> tuple[str, ...]:  # noqa: ARG002 - the protocol's
        """Three weights for each expert."""
        return ("gate_proj.weight", "up_proj.weight", "down_proj.weight")

    def load_weights(self, layer: FusedMoE, parts: Sequence[Part], tp: TpCoordinates) -> frozenset[str]:
        """Up first, then gate, one below the other; down is cut by column."""
        width = layer.local_width
        for local, tensors in enumerate(parts[: len(layer.local_experts)]):
            w3_w1, w2 = layer.w3_w1_weight[local], layer.w2_weight[local]
            halves = (("up_proj.weight", w3_w1[:width], 0), ("gate_proj.weight", w3_w1[width:], 0))
            for name, destination, dim in (*halves, ("down_proj.weight", w2, 1)):
                if tp != layer.moe_tp:  # cut before
                    copy_whole(destination, tensors[name])
                else:
                    full = (layer.intermediate, layer.hidden) if dim == 0 else (layer.hidden, layer.intermediate)
                    copy_shard(destination, tensors[name], full, dim, tp)
        return frozenset({"w3_w1_weight", "w2_weight"})

    def tensor_shards(self, layer: FusedMoE) -> dict[str, Sharding]:
        """Each expert's rows (or columns) are boxes of the whole layer's (experts, rows, columns)."""
        count, first = len(layer.local_experts), layer.local_experts.start
        begin, end = shard_range(layer.intermediate, layer.moe_tp)
        if begin == end:
            return {"w3_w1_weight": Sharding(), "w2_weight": Sharding()}
        rows = (layer.num_experts, layer.intermediate, layer.hidden)
        mine = Box((first, begin, 0), (count, end - begin, layer.hidden))
        columns = (layer.num_experts, layer.hidden, layer.intermediate)
        down = Box((first, 0, begin), (count, layer.hidden, end - begin))
        return {
            "w3_w1_weight": Sharding(
                (Piece("w3", rows, mine, (0, 0, 0)), Piece("w1", rows, mine, (0, layer.local_width, 0)))
            ),
            "w2_weight": Sharding((Piece("", columns, down, (0, 0, 0)),)),
        }

    def apply(self, layer: FusedMoE, expert: int, x: torch.Tensor) -> torch.Tensor:
        """``w2 (silu(w1 x) * (w3 x))``."""
        w3_w1 = layer.w3_w1_weight[expert]
        up, gate = multiply(x, w3_w1.t() if layer.weights_are_packed else w3_w1, None).to(x.dtype).chunk(2, dim=-1)
        return multiply(F.silu(gate) * up, layer.w2_weight[expert], None)

    def transform_effect(self, layer: FusedMoE) -> dict[str, TransformEffect]:
        """Packed replaces ``w3_w1_weight``."""
        return {"w3_w1_weight": "replaces"} if layer.context.layout is KernelLayout.PACKED else {}

    def transform(self, layer: FusedMoE) -> None:
        """Pack."""
        packed = layer.w3_w1_weight.detach().transpose(1, 2).clone(memory_format=torch.contiguous_format)
        layer.w3_w1_weight = nn.Parameter(packed, requires_grad=False)

    def to_processed(self, layer: FusedMoE) -> None:
        """Packed has another shape."""
        self._shape(layer, (len(layer.local_experts), layer.hidden, 2 * layer.local_width))

    def to_raw(self, layer: FusedMoE) -> None:
        """As ``create_weights`` made it."""
        self._shape(layer, (len(layer.local_experts), 2 * layer.local_width, layer.hidden))

    @staticmethod
    def _shape(layer: FusedMoE, shape: tuple[int, ...]) -> None:
        old = layer.w3_w1_weight
        if old.shape != shape:
            layer.w3_w1_weight = new_parameter(*shape, dtype=old.dtype, device=old.device)


class FusedMoE(LoadableLayer):
    """All routed experts of one layer, of which this rank holds ``local_experts``, each ``local_width`` wide.

    Experts are counted over the whole model; parameters hold them in local order. ``quant_scales`` are references to
    the layer's own tensors, taken anew whenever these may have been exchanged.
    """

    method: MoeMethod
    w3_w1_weight: nn.Parameter
    w2_weight: nn.Parameter
    quant_scales: tuple[torch.Tensor | None, ...]
    # what methods of quantized weights register besides, one value an expert (FP8 tensors and NVFP4) or fewer
    fc31_dequant: nn.Parameter
    fc2_dequant: nn.Parameter
    fc2_quant: nn.Parameter | None
    fc31_input_dequant: nn.Parameter | None
    w3_w1_weight_scaling_factor: nn.Parameter
    w2_weight_scaling_factor: nn.Parameter
    w3_w1_weight_scale: nn.Parameter
    w2_weight_scale: nn.Parameter
    fc31_input_scale: nn.Parameter
    fc2_input_scale: nn.Parameter
    fc31_weight_scale_2: nn.Parameter
    fc2_weight_scale_2: nn.Parameter
    fc31_alpha: nn.Parameter
    fc2_alpha: nn.Parameter

    def __init__(self, context: LayerContext, hidden: int, config: MoeConfig, method: MoeMethod | None = None) -> None:
        super().__init__()
        self.context = context
        self.hidden = hidden
        self.intermediate = config.intermediate_size
        self.num_experts = config.num_experts
        self.moe_tp = context.mapping.moe_tp
        self.local_experts = local_experts(config.num_experts, context.mapping.moe_ep)
        start, stop = shard_range(config.intermediate_size, self.moe_tp)
        self.local_width = stop - start
        quantized = context.methods and context.methods.experts(self._projections())
        self.method = method or quantized or UnquantizedMoeMethod()
        self.method.create_weights(self)
        self.refer()

    def refer(self) -> None:
        """Take references to the tensors that there are now."""
        self.quant_scales = self.method.quant_scales(self)

    def _projections(self) -> list[str]:
        """Names of the checkpoint modules of all experts, also of those that other ranks hold."""
        leaves = ("gate_proj", "up_proj", "down_proj")
        return [f"{self.context.path}.{expert}.{leaf}" for expert in range(self.num_experts) for leaf in leaves]

    def checkpoint_prefixes(self, name: str) -> tuple[str, ...]:
        """Where this rank's experts are in the checkpoint."""
        return tuple(f"{name}.{expert}" for expert in self.local_experts)

    def checkpoint_elsewhere(self, name: str) -> tuple[str, ...]:
        """Where other ranks' experts are."""
        others = (expert for expert in range(self.num_experts) if expert not in self.local_experts)
        return tuple(f"{name}.{expert}" for expert in others)

    def tensors_elsewhere(self) -> tuple[str, ...]:
        """Leaf names that this rank needs of those, too."""
        return self.method.tensors_elsewhere()

    def load_weights(self, parts: Sequence[Part], tp: TpCoordinates) -> frozenset[str]:
        """As ``Loadable.load_weights``; ``parts`` are this rank's experts, then the others'."""
        return super().load_weights(parts, self.moe_tp if tp == self.context.tp else tp)

    def forward(self, x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """``x`` (tokens, hidden), each through its ``experts`` (tokens, k) by ``weights``: summed over all ranks."""
        total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for local, expert in enumerate(self.local_experts):
            tokens, chosen = (experts == expert).nonzero(as_tuple=True)
            if tokens.numel():
                out = self.method.apply(self, local, x[tokens]).to(torch.float32)
                total.index_add_(0, tokens, out * weights[tokens, chosen].unsqueeze(-1))
        return self.context.group.all_reduce(total).to(x.dtype)


def local_experts(num_experts: int, ep: TpCoordinates) -> range:
    """The experts of expert-parallel rank ``ep``: as many for each rank.

    Raises:
        ConfigError: they cannot be shared evenly.
    """
    each, rest = divmod(num_experts, ep.size)
    if rest:
        legal = [size for size in range(1, num_experts + 1) if num_experts % size == 0]
        raise ConfigError(
            f"{num_experts} experts cannot be shared by {ep.size} expert-parallel ranks",
            f"use one of: {', '.join(map(str, legal))}",
        )
    return range(ep.rank * each, (ep.rank + 1) * each)


class Router(nn.Module):
    """Which experts each token goes to, and with what weights. Whole on every rank; computed in float32.

    ``e_score_correction_bias`` (float32, whatever the model's dtype) moves the choice and not the weights; there is
    one where scores are sigmoids.
    """

    e_score_correction_bias: nn.Parameter | None

    def __init__(self, context: LayerContext, hidden: int, config: MoeConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = new_parameter(config.num_experts, hidden, dtype=context.dtype)
        sigmoid = config.scoring == "sigmoid"
        self.e_score_correction_bias = new_parameter(config.num_experts, dtype=torch.float32) if sigmoid else None

    def checkpoint_tensors(self) -> tuple[str, ...]:
        """Leaf names in the checkpoint."""
        return ("weight",) if self.e_score_correction_bias is None else ("weight", "e_score_correction_bias")

    def tensor_shards(self) -> dict[str, Sharding]:
        """Every rank holds all of it."""
        return {name: whole(tensor.shape) for name, tensor in self.named_parameters(recurse=False)}

    def load_weights(self, parts: Sequence[Part], tp: TpCoordinates) -> frozenset[str]:  # noqa: ARG002 - never cut
        """As ``Loadable.load_weights``."""
        for name, tensor in self.named_parameters(recurse=False):
            copy_whole(tensor, parts[0][name])
        return frozenset(self.checkpoint_tensors())

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(tokens, hidden) to expert numbers and weights, each (tokens, experts_per_token)."""
        logits = F.linear(x.to(torch.float32), self.weight.to(torch.float32))
        if self.e_score_correction_bias is None:
            scores = choice = logits.softmax(-1)
        else:
            scores = logits.sigmoid()
            choice = self._within_groups(scores + self.e_score_correction_bias)
        experts = choice.topk(self.config.experts_per_token, dim=-1).indices
        weights = scores.gather(1, experts)
        if self.config.normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + (1e-20 if self.config.scoring == "sigmoid" else 0.0))
        return experts, weights * self.config.scaling

    def _within_groups(self, choice: torch.Tensor) -> torch.Tensor:
        """Minus infinity outside the groups whose two best experts are best together."""
        grouped = choice.view(choice.shape[0], self.config.groups, -1)
        best = grouped.topk(2, dim=-1).values.sum(-1).topk(self.config.groups_per_token, dim=-1).indices
        kept = torch.zeros(grouped.shape[:2], dtype=torch.bool, device=choice.device).scatter_(1, best, value=True)
        return grouped.masked_fill(~kept.unsqueeze(-1), float("-inf")).view_as(choice)


def expert_map(num_experts: int, ep_size: int) -> Mapping[int, tuple[int, int]]:
    """First and last expert of each expert-parallel rank."""
    found = (local_experts(num_experts, TpCoordinates(size=ep_size, rank=rank)) for rank in range(ep_size))
    return {rank: (mine.start, mine.stop - 1) for rank, mine in enumerate(found)}
