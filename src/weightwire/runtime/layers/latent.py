"""From latent attention's latent vector to keys and values: ``kv_b_proj``, and what is made of it for each head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from weightwire.manifest.sharding import Cut, Sharding, stacked
from weightwire.runtime.config import KernelLayout
from weightwire.runtime.family_config import MlaConfig
from weightwire.runtime.layers.attention import SelfAttention
from weightwire.runtime.layers.context import LayerContext
from weightwire.runtime.layers.linear import multiply
from weightwire.runtime.layers.method import LoadableLayer, MethodLayer, TransformEffect, WeightMethod
from weightwire.runtime.layers.shards import Part, copy_slice, copy_whole, new_parameter
from weightwire.runtime.mapping import TpCoordinates, shard_range

OWNER = "kv_b_proj"


class KeyValueMethod(WeightMethod["KeyValueLinear"]):
    """How ``kv_b_proj`` is stored and multiplied: here as it is, (local rows, lora), in the layer's dtype."""

    def create_weights(self, layer: KeyValueLinear) -> None:
        """Register ``weight``."""
        layer.weight = new_parameter(layer.rows, layer.mla.kv_lora_rank, dtype=layer.context.dtype)

    def checkpoint_tensors(self, layer: KeyValueLinear) -> tuple[str, ...]:  # noqa: ARG002 - the protocol's
        """One."""
        return ("weight",)

    def load_weights(self, layer: KeyValueLinear, parts: Sequence[Part], tp: TpCoordinates) -> frozenset[str]:
        """Cut the checkpoint's tensor by head, then reorder its rows."""
        each, lora = layer.mla.qk_nope_head_dim + layer.mla.v_head_dim, layer.mla.kv_lora_rank
        cut = torch.empty(layer.rows, lora, dtype=layer.weight.dtype, device=layer.weight.device)
        if tp != layer.context.tp:  # cut before
            copy_whole(cut, parts[0]["weight"])
        else:
            start, stop = shard_range(layer.heads, tp)
            copy_slice(cut, parts[0]["weight"], (layer.heads * each, lora), 0, (start * each, stop * each))
        layer.weight.copy_(layer.reordered(cut))
        return frozenset({"weight"})

    def tensor_shards(self, layer: KeyValueLinear) -> dict[str, Sharding]:
        """Rows of keys, then of values, as if the whole model had them in that order."""
        start, stop = shard_range(layer.heads, layer.context.tp)
        widths = {"k": layer.mla.qk_nope_head_dim, "v": layer.mla.v_head_dim}
        cuts = [
            Cut((layer.heads * width, layer.mla.kv_lora_rank), 0, start * width, stop * width, part)
            for part, width in widths.items()
        ]
        return {"weight": stacked(cuts)}

    def apply(self, layer: KeyValueLinear, latent: torch.Tensor) -> torch.Tensor:
        """(..., lora) to (..., local rows)."""
        return multiply(latent, layer.weight, None)


class KeyValueLinear(MethodLayer):
    """Latent vector to this rank's heads: all of their keys, then all of their values.

    The checkpoint has each head's key rows followed by its value rows; heads are cut first and reordered then. Its
    owner fills it, together with what is made of it.
    """

    method: KeyValueMethod
    weight: nn.Parameter
    weight_scale: nn.Parameter

    def __init__(self, context: LayerContext, heads: int, mla: MlaConfig) -> None:
        super().__init__()
        self.context = context
        self.mla = mla
        self.heads = heads
        start, stop = shard_range(heads, context.tp)
        self.local_heads = stop - start
        self.rows = self.local_heads * (mla.qk_nope_head_dim + mla.v_head_dim)
        quantized = context.methods and context.methods.key_values(context.path)
        self.method = quantized or KeyValueMethod()
        self.method.create_weights(self)

    @property
    def key_rows(self) -> int:
        """Rows of keys, which come first."""
        return self.local_heads * self.mla.qk_nope_head_dim

    def keys(self, tensor: torch.Tensor, step: int = 1) -> torch.Tensor:
        """A view of the key rows of ``tensor``, which has one row for each ``step`` rows of the weight, by head."""
        return tensor.detach()[: self.key_rows // step].view(self.local_heads, -1, tensor.shape[1])

    def values(self, tensor: torch.Tensor, step: int = 1) -> torch.Tensor:
        """A view of the value rows, as ``keys``."""
        return tensor.detach()[self.key_rows // step :].view(self.local_heads, -1, tensor.shape[1])

    def reordered(self, tensor: torch.Tensor, step: int = 1) -> torch.Tensor:
        """A new tensor: from each head's keys and values to all keys, then all values; ``step`` as in ``keys``."""
        by_head = tensor.view(self.local_heads, -1, tensor.shape[1])
        each = self.mla.qk_nope_head_dim // step
        return torch.cat((by_head[:, :each].flatten(0, 1), by_head[:, each:].flatten(0, 1)))

    def forward(self, latent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch, length, lora) to keys and values, each (batch, length, local heads, width)."""
        both = self.method.apply(self, latent).to(latent.dtype)
        keys, values = both.tensor_split([self.key_rows], dim=-1)
        shape = (*latent.shape[:-1], self.local_heads, -1)
        return keys.reshape(shape), values.reshape(shape)


class HeadsMethod(WeightMethod["LatentHeads"]):
    """How the two parameters are stored that loading makes of ``kv_b_proj``.

    ``k_b_proj_trans`` (local heads, lora, nope) is a copy, ``v_b_proj`` (local heads, v, lora) a view of value rows.

    Packed: both are replaced by their contiguous transposes (local heads, nope, lora) and (local heads, lora, v),
    neither of which is a view any more.
    """

    def create_weights(self, layer: LatentHeads) -> None:
        """The copy, and the view."""
        layer.k_b_proj_trans = new_parameter(*self._raw_keys(layer), dtype=layer.kv_b_proj.weight.dtype)
        self.view(layer)

    def checkpoint_tensors(self, layer: LatentHeads) -> tuple[str, ...]:
        """The ones that all parameters come from."""
        return tuple(f"{OWNER}.{leaf}" for leaf in layer.kv_b_proj.method.checkpoint_tensors(layer.kv_b_proj))

    def load_weights(self, layer: LatentHeads, parts: Sequence[Part], tp: TpCoordinates) -> frozenset[str]:
        """``kv_b_proj``, then what is made of it."""
        part = {name.removeprefix(f"{OWNER}."): source for name, source in parts[0].items()}
        filled = layer.kv_b_proj.method.load_weights(layer.kv_b_proj, [part], tp)
        self.derive(layer)
        own = (name for name, _ in layer.named_parameters(recurse=False))
        return frozenset({*(f"{OWNER}.{name}" for name in filled), *own})

    def derive(self, layer: LatentHeads) -> None:
        """Fill the copies from ``kv_b_proj``."""
        keys = layer.kv_b_proj.keys(layer.kv_b_proj.weight)
        layer.k_b_proj_trans.copy_(keys.transpose(1, 2))

    def view(self, layer: LatentHeads) -> None:
        """Make the views of ``kv_b_proj``."""
        layer.v_b_proj = nn.Parameter(layer.kv_b_proj.values(layer.kv_b_proj.weight), requires_grad=False)

    def tensor_shards(self, layer: LatentHeads) -> dict[str, Sharding]:
        """Heads of the copy; the view is described by what it is a view of."""
        heads, mla = layer.kv_b_proj.heads, layer.kv_b_proj.mla
        start, stop = shard_range(heads, layer.context.tp)
        return {"k_b_proj_trans": stacked([Cut((heads, mla.kv_lora_rank, mla.qk_nope_head_dim), 0, start, stop)])}

    def transform_effect(self, layer: LatentHeads) -> dict[str, TransformEffect]:
        """Packed replaces both."""
        packs = layer.context.layout is KernelLayout.PACKED
        return {"k_b_proj_trans": "replaces", "v_b_proj": "replaces"} if packs else {}

    def transform(self, layer: LatentHeads) -> None:
        """Transpose."""
        for name in self.transform_effect(layer):
            packed = getattr(layer, name).detach().transpose(1, 2).clone(memory_format=torch.contiguous_format)
            setattr(layer, name, nn.Parameter(packed, requires_grad=False))

    def to_processed(self, layer: LatentHeads) -> None:
        """Transposed shapes."""
        mla, old = layer.kv_b_proj.mla, layer.k_b_proj_trans
        heads, dtype, device = layer.kv_b_proj.local_heads, old.dtype, old.device
        layer.k_b_proj_trans = new_parameter(heads, mla.qk_nope_head_dim, mla.kv_lora_rank, dtype=dtype, device=device)
        layer.v_b_proj = new_parameter(heads, mla.kv_lora_rank, mla.v_head_dim, dtype=dtype, device=device)

    def to_raw(self, layer: LatentHeads) -> None:
        """The shapes and the views of construction."""
        layer.kv_b_proj.prepare_raw()  # what the views are of
        old = layer.k_b_proj_trans
        if old.shape != self._raw_keys(layer):
            layer.k_b_proj_trans = new_parameter(*self._raw_keys(layer), dtype=old.dtype, device=old.device)
        self.view(layer)

    def keys(self, layer: LatentHeads) -> torch.Tensor:
        """(local heads, lora, nope), as the kernel computes with it."""
        return layer.k_b_proj_trans.transpose(1, 2) if layer.weights_are_packed else layer.k_b_proj_trans

    def values(self, layer: LatentHeads) -> torch.Tensor:
        """(local heads, v, lora), as the kernel computes with it."""
        return layer.v_b_proj.transpose(1, 2) if layer.weights_are_packed else layer.v_b_proj

    @staticmethod
    def _raw_keys(layer: LatentHeads) -> tuple[int, int, int]:
        mla = layer.kv_b_proj.mla
        return layer.kv_b_proj.local_heads, mla.kv_lora_rank, mla.qk_nope_head_dim


class LatentHeads(SelfAttention, LoadableLayer):
    """The part of latent attention that holds ``kv_b_proj`` and the parameters that its heads are absorbed by."""

    method: HeadsMethod
    context: LayerContext
    kv_b_proj: KeyValueLinear
    k_b_proj_trans: nn.Parameter
    v_b_proj: nn.Parameter
    k_b_proj_trans_scale: nn.Parameter
    v_b_proj_scale: nn.Parameter

    def make_heads(self, context: LayerContext, heads: int, mla: MlaConfig) -> None:
        """Construct them; once, at construction."""
        self.context = context
        owner = context.within(OWNER)
        self.kv_b_proj = KeyValueLinear(owner, heads, mla)
        quantized = context.methods and context.methods.heads(owner.path)
        self.method = quantized or HeadsMethod()
        self.method.create_weights(self)
