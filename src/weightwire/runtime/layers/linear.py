"""Linear layers cut by column or by row, fused ones included."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import nn

from weightwire.manifest.sharding import Cut, Sharding, stacked
from weightwire.runtime.layers.context import LayerContext
from weightwire.runtime.layers.method import LoadableLayer, WeightMethod
from weightwire.runtime.layers.shards import Part, copy_shard, copy_whole, new_parameter, part_names
from weightwire.runtime.mapping import TpCoordinates, replicated_tp, shard_range


class TensorParallelMode(Enum):
    """Which dimension of the weight ranks share: ``COLUMN`` its output rows, ``ROW`` its input columns."""

    COLUMN = "column"
    ROW = "row"


class WeightMode(Enum):
    """How many checkpoint tensors one layer is made of; the value is that number."""

    VANILLA = 1
    FUSED_GATE_UP = 2
    FUSED_QKV = 3


@dataclass(frozen=True)
class OutPart:
    """``size`` output rows of the whole layer, from one checkpoint tensor.

    ``heads``: the rows are so many indivisible heads, replicated where there are more ranks than heads.
    """

    size: int
    heads: int | None = None

    def coordinates(self, tp: TpCoordinates) -> TpCoordinates:
        """Coordinates by which these rows are cut."""
        return tp if self.heads is None else replicated_tp(tp, self.heads)

    def local_size(self, tp: TpCoordinates) -> int:
        """Rows that rank ``tp`` holds."""
        start, stop = shard_range(self.size, self.coordinates(tp))
        return stop - start


class LinearMethod(WeightMethod["Linear"]):
    """How a ``Linear`` stores and multiplies its weight."""

    def checkpoint_tensors(self, layer: Linear) -> tuple[str, ...]:
        """Leaf names that each part must have."""
        return ("weight", "bias") if layer.has_bias else ("weight",)

    def apply(self, layer: Linear, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``x`` of shape (..., in) times the weight, plus ``bias``: shape (..., local out).

        The dtype is that of ``x``, or wider where the product is: the layer rounds it, once, when all of it is there.
        """
        raise NotImplementedError


def multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``x @ weight.T + bias``; half precision on a CPU gives float32.

    A CPU without units of its own for half precision takes ten times as long in torch's loop for it (280 tokens,
    576 x 1536, AVX2) as with the conversion to float32 and back.
    """
    if x.device.type != "cpu" or x.dtype is torch.float32:
        return F.linear(x, weight, bias)
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float())


class UnquantizedLinearMethod(LinearMethod):
    """The weight as it is: (local out, local in), in the layer's dtype."""

    def create_weights(self, layer: Linear) -> None:
        """Register ``weight``, and ``bias`` where the layer has one."""
        dtype = layer.context.dtype
        layer.weight = new_parameter(layer.local_out, layer.local_in, dtype=dtype)
        layer.bias = new_parameter(layer.local_out, dtype=dtype) if layer.has_bias else None

    def load_weights(self, layer: Linear, parts: Sequence[Part], tp: TpCoordinates) -> frozenset[str]:
        """Cut each part, and put them one below the other."""
        offset = 0
        for part, tensors in zip(layer.parts, parts, strict=True):
            rows = layer.local_rows(part)
            layer.copy_part(layer.weight.narrow(0, offset, rows), tensors, part, tp)
            if layer.bias is not None:
                layer.copy_bias(layer.bias.narrow(0, offset, rows), tensors, part, tp)
            offset += rows
        return frozenset(name for name, _ in layer.named_parameters(recurse=False))

    def tensor_shards(self, layer: Linear) -> dict[str, Sharding]:
        """Each part's rows (or, under ``ROW``, columns); the bias is cut with the rows."""
        found = {"weight": stacked([layer.cut(part, at, layer.in_features) for at, part in enumerate(layer.parts)])}
        if layer.has_bias:
            found["bias"] = stacked([layer.cut(part, at) for at, part in enumerate(layer.parts)])
        return found

    def apply(self, layer: Linear, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``x @ weight.T + bias``."""
        return multiply(x, layer.weight, bias)


class Linear(LoadableLayer):
    """``y = x W^T + b``, of which this rank holds a part.

    Args:
        context: the rank's coordinates, dtype and group.
        in_features: input width of the whole layer.
        parts: output rows of the whole layer, one entry for each checkpoint tensor.
        mode: ``COLUMN`` cuts every part's rows (output is local), ``ROW`` cuts the input (output is summed over
            ranks, the bias added once), ``None`` cuts nothing.
        weight_mode: must agree with the number of parts.
        bias: whether there is one. Under ``ROW`` every rank holds it whole and rank 0 adds it.
        method: storage and arithmetic; without it what the context's checkpoint is quantized with, or ``unquantized``
            where it is not, or leaves this layer out.

    Shares are ``ceil(width / ranks)``; the last ranks' are short or empty.
    """

    method: LinearMethod
    weight: nn.Parameter
    bias: nn.Parameter | None
    # what methods of quantized weights register besides
    weight_scale: nn.Parameter
    weight_scale_2: nn.Parameter
    input_scale: nn.Parameter | None
    inv_input_scale: nn.Parameter | None
    alpha: nn.Parameter
    pre_quant_scale: nn.Parameter | None
    scalar_alpha: float

    def __init__(
        self,
        context: LayerContext,
        in_features: int,
        parts: Sequence[OutPart],
        *,
        mode: TensorParallelMode | None = None,
        weight_mode: WeightMode = WeightMode.VANILLA,
        bias: bool = False,
        method: LinearMethod | None = None,
    ) -> None:
        super().__init__()
        assert len(parts) == weight_mode.value
        self.context = context
        self.in_features = in_features
        self.parts = tuple(parts)
        self.mode = mode
        self.has_bias = bias
        self.method = method or self._quantized() or self.unquantized()
        self.method.create_weights(self)

    def checkpoint_prefixes(self, name: str) -> tuple[str, ...]:
        """Names of the checkpoint modules of a layer called ``name``, one for each part."""
        return part_names(name)

    def _quantized(self) -> LinearMethod | None:
        methods = self.context.methods
        return None if methods is None else methods.linear(self.checkpoint_prefixes(self.context.path))

    def unquantized(self) -> LinearMethod:
        """The method where the checkpoint has floats."""
        return UnquantizedLinearMethod()

    @property
    def local_in(self) -> int:
        """Input columns that this rank holds."""
        if self.mode is not TensorParallelMode.ROW:
            return self.in_features
        start, stop = shard_range(self.in_features, self.context.tp)
        return stop - start

    @property
    def local_out(self) -> int:
        """Output rows that this rank holds, all parts together."""
        return sum(self.local_rows(part) for part in self.parts)

    def local_rows(self, part: OutPart) -> int:
        """Output rows of one part that this rank holds."""
        return part.local_size(self.context.tp) if self.mode is TensorParallelMode.COLUMN else part.size

    def cut(self, part: OutPart, number: int, *columns: int) -> Cut:
        """What this rank holds of part ``number``: of its weight where ``columns`` is its width, else of its bias."""
        shape, name, tp = (part.size, *columns), f"part{number}" if len(self.parts) > 1 else "", self.context.tp
        if self.mode is TensorParallelMode.ROW and columns:
            return Cut(shape, 1, *shard_range(self.in_features, tp), name)
        if self.mode is TensorParallelMode.COLUMN:
            return Cut(shape, 0, *shard_range(part.size, part.coordinates(tp)), name)
        return Cut(shape, 0, 0, part.size, name)

    def copy_part(self, destination: torch.Tensor, tensors: Part, part: OutPart, tp: TpCoordinates) -> None:
        """Copy this rank's slice of one part's weight."""
        source = tensors["weight"]
        if tp != self.context.tp:  # cut before
            copy_whole(destination, source)
        elif self.mode is TensorParallelMode.ROW:
            copy_shard(destination, source, (part.size, self.in_features), 1, tp)
        elif self.mode is TensorParallelMode.COLUMN:
            copy_shard(destination, source, (part.size, self.in_features), 0, part.coordinates(tp))
        else:
            copy_whole(destination, source)

    def copy_bias(self, destination: torch.Tensor, tensors: Part, part: OutPart, tp: TpCoordinates) -> None:
        """Copy this rank's slice of one part's bias."""
        if tp == self.context.tp and self.mode is TensorParallelMode.COLUMN:
            copy_shard(destination, tensors["bias"], (part.size,), 0, part.coordinates(tp))
        else:
            copy_whole(destination, tensors["bias"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., local in) to (..., local out); under ``ROW`` the sum over all ranks, on every rank."""
        if self.mode is not TensorParallelMode.ROW:
            return self.method.apply(self, x, self.bias).to(x.dtype)
        # the sum would count the bias once for every rank
        bias = self.bias if self.context.tp.rank == 0 else None
        return self.context.group.all_reduce(self.method.apply(self, x, bias)).to(x.dtype)
