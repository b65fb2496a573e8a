"""Multi-head latent attention: keys and values of all heads are projected from one small vector, which is cached."""

from __future__ import annotations

import math
from typing import Literal

import torch

from weightwire.errors import ConfigError
from weightwire.runtime.config import KernelLayout, ModelConfig
from weightwire.runtime.family_config import MlaConfig
from weightwire.runtime.layers.attention import AttentionStep
from weightwire.runtime.layers.context import LayerContext
from weightwire.runtime.layers.latent import LatentHeads
from weightwire.runtime.layers.linear import (
    Linear,
    LinearMethod,
    OutPart,
    TensorParallelMode,
    UnquantizedLinearMethod,
    WeightMode,
)
from weightwire.runtime.layers.method import TransformEffect
from weightwire.runtime.layers.norm import RMSNorm
from weightwire.runtime.layers.packing import PackedLinear
from weightwire.runtime.layers.rotary import rotate, yarn_mscale

_LATENT_EPS = 1e-6
"""Of the norms of latent vectors: the family's own, whatever the config says of the others."""


class SplittingMethod(UnquantizedLinearMethod):
    """Packed: the rotary rows of each head go, in place, from neighbouring pairs to split halves."""

    def transform_effect(self, layer: Linear) -> dict[str, TransformEffect]:
        """Weight and bias are changed in place, where the checkpoint has pairs."""
        assert isinstance(layer, _RotaryRows)
        if not (layer.interleaved and layer.context.layout is KernelLayout.PACKED):
            return {}
        return {"weight": "in_place", "bias": "in_place"} if layer.has_bias else {"weight": "in_place"}

    def transform(self, layer: Linear) -> None:
        """Split."""
        assert isinstance(layer, _RotaryRows)
        rows, start, stop = layer.rotary
        for _, tensor in layer.named_parameters(recurse=False):
            heads = tensor.detach().reshape(-1, rows, *tensor.shape[1:])
            pairs = heads[:, start:stop].reshape(heads.shape[0], -1, 2, *tensor.shape[1:])
            halves = pairs.transpose(1, 2).reshape(heads.shape[0], stop - start, *tensor.shape[1:])
            heads[:, start:stop].copy_(halves)


class _RotaryRows(PackedLinear):
    """A layer of which some rows are rotary."""

    interleaved: bool
    """Whether the checkpoint has pairs; else there is nothing to do."""
    rotary: tuple[int, int, int]
    """Rows of a head, and where among them the rotary ones begin and end; other heads' follow at the same distance."""

    def unquantized(self) -> LinearMethod:
        """Splits pairs."""
        return SplittingMethod()

    @property
    def rows_are_pairs(self) -> bool:
        """Whether rotary rows come as neighbouring pairs, as the checkpoint may have them, and not as two halves."""
        return self.interleaved and not (self.weights_are_packed and isinstance(self.method, SplittingMethod))


class LatentLinear(_RotaryRows):
    """Hidden state to the latent vector of queries (where there is one), that of keys and values, and the rotary key.

    Whole on every rank; the checkpoint's ``q_a_proj`` and ``kv_a_proj_with_mqa``, one below the other.
    """

    def __init__(self, context: LayerContext, config: ModelConfig, mla: MlaConfig) -> None:
        kv = OutPart(mla.kv_lora_rank + mla.qk_rope_head_dim)
        parts = [kv] if mla.q_lora_rank is None else [OutPart(mla.q_lora_rank), kv]
        # two tensors, one below the other: what gate and up are
        mode = WeightMode.VANILLA if mla.q_lora_rank is None else WeightMode.FUSED_GATE_UP
        super().__init__(context, config.hidden_size, parts, mode, bias=config.attention_bias, parallel=None)
        self.interleaved = mla.rope_interleaved
        self.rotary = (self.local_out, self.local_out - mla.qk_rope_head_dim, self.local_out)

    def checkpoint_prefixes(self, name: str) -> tuple[str, ...]:
        """One or two modules."""
        queries = f"{name.rpartition('.')[0]}.q_a_proj"
        return (name,) if len(self.parts) == 1 else (queries, name)

    def checkpoint_elsewhere(self, name: str) -> tuple[str, ...]:  # noqa: ARG002 - the protocol's
        """No rank lacks any of it."""
        return ()

    def tensors_elsewhere(self) -> tuple[str, ...]:
        """None either."""
        return ()


class QueryLinear(_RotaryRows):
    """Queries of this rank's heads, from their latent vector or from the hidden state."""

    def __init__(self, context: LayerContext, in_features: int, heads: int, mla: MlaConfig) -> None:
        parts = [OutPart(heads * mla.qk_head_dim, heads=heads)]
        super().__init__(context, in_features, parts, WeightMode.VANILLA, bias=False)
        self.interleaved = mla.rope_interleaved
        self.rotary = (mla.qk_head_dim, mla.qk_nope_head_dim, mla.qk_head_dim)


class MlaAttention(LatentHeads):
    """Latent attention over this rank's heads. ``latent_cache`` is run-time state.

    A single new token is attended to in the latent space, by what is made of ``kv_b_proj``; several tokens by
    ``kv_b_proj`` itself.
    """

    latent_cache: torch.Tensor | None

    def __init__(self, context: LayerContext, config: ModelConfig, layer: int) -> None:
        super().__init__()
        assert config.mla is not None
        check_mla_heads(config.num_heads, context.tp.size)
        self.layer, self.mla = layer, config.mla
        self.scale = _scale(config, config.mla)
        self.kv_a_proj_with_mqa = LatentLinear(context.within("kv_a_proj_with_mqa"), config, self.mla)
        queries_from = config.hidden_size if self.mla.q_lora_rank is None else self.mla.q_lora_rank
        if self.mla.q_lora_rank is not None:
            self.q_a_layernorm = RMSNorm(context, self.mla.q_lora_rank, _LATENT_EPS)
        leaf = "q_proj" if self.mla.q_lora_rank is None else "q_b_proj"
        self.add_module(leaf, QueryLinear(context.within(leaf), queries_from, config.num_heads, self.mla))
        self.kv_a_layernorm = RMSNorm(context, self.mla.kv_lora_rank, _LATENT_EPS)
        self.make_heads(context, config.num_heads, self.mla)
        self.o_proj = Linear(
            context.within("o_proj"),
            config.num_heads * self.mla.v_head_dim,
            [OutPart(config.hidden_size)],
            mode=TensorParallelMode.ROW,
            bias=config.attention_bias,
        )
        self.latent_cache = None

    @property
    def queries(self) -> QueryLinear:
        """``q_b_proj``, or ``q_proj`` where queries have no latent vector."""
        found = self.q_proj if self.mla.q_lora_rank is None else self.q_b_proj
        assert isinstance(found, QueryLinear)
        return found

    def tensor_classes(self) -> dict[str, Literal["weight", "derived", "runtime"]]:
        """The cache is never anyone else's business."""
        return {"latent_cache": "runtime"}

    def allocate_cache(self, batch: int, length: int, device: torch.device) -> None:
        """Room for the latent vectors and rotary keys of ``length`` tokens of ``batch`` sequences, zeroed."""
        width = self.mla.kv_lora_rank + self.mla.qk_rope_head_dim
        self.latent_cache = torch.zeros(batch, length, width, dtype=self.context.dtype, device=device)

    def release_cache(self) -> None:
        """Drop the cache."""
        self.latent_cache = None

    def forward(self, x: torch.Tensor, step: AttentionStep) -> torch.Tensor:
        """(batch, length, hidden) to the same, summed over ranks; what is cached goes to the cache."""
        assert self.latent_cache is not None
        q_nope, q_rope, cached = self._project(x, step)
        sequences = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
        self.latent_cache[sequences, step.positions] = cached
        seen = self.latent_cache[:, : step.mask.shape[-1]]
        latent, k_rope = seen.tensor_split([self.mla.kv_lora_rank], dim=-1)
        logits = torch.einsum("blhr,bsr->bhls", q_rope, k_rope)
        if x.shape[1] > 1:
            keys, values = self.kv_b_proj(latent)
            logits = logits + torch.einsum("blhn,bshn->bhls", q_nope, keys)
            heads = torch.einsum("bhls,bshv->blhv", self._weigh(logits, step), values)
        else:
            keys, values = (part.to(latent.dtype) for part in (self.method.keys(self), self.method.values(self)))
            logits = logits + torch.einsum("blhc,bsc->bhls", torch.einsum("blhn,hcn->blhc", q_nope, keys), latent)
            context = torch.einsum("bhls,bsc->blhc", self._weigh(logits, step), latent)
            heads = torch.einsum("blhc,hvc->blhv", context, values)
        summed: torch.Tensor = self.o_proj(heads.flatten(-2))
        return summed

    def _project(self, x: torch.Tensor, step: AttentionStep) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries without and with rotation, each (batch, length, heads, width), and what is cached of new tokens."""
        mla, projected = self.mla, self.kv_a_proj_with_mqa(x)
        if mla.q_lora_rank is not None:
            x, projected = projected.tensor_split([mla.q_lora_rank], dim=-1)
            x = self.q_a_layernorm(x)
        q = self.queries(x).reshape(*x.shape[:-1], -1, mla.qk_head_dim)
        q_nope, q_rope = q.tensor_split([mla.qk_nope_head_dim], dim=-1)
        latent, k_rope = projected.tensor_split([mla.kv_lora_rank], dim=-1)
        # one of the two may be quantized, which has no packed order of rows, and the other left out
        q_rope = rotate(q_rope, step.cos, step.sin, interleaved=self.queries.rows_are_pairs)
        pairs = self.kv_a_proj_with_mqa.rows_are_pairs
        k_rope = rotate(k_rope.unsqueeze(2), step.cos, step.sin, interleaved=pairs).squeeze(2)
        return q_nope, q_rope, torch.cat((self.kv_a_layernorm(latent), k_rope), dim=-1)

    def _weigh(self, logits: torch.Tensor, step: AttentionStep) -> torch.Tensor:
        masked = (logits * self.scale).masked_fill(~step.mask, float("-inf"))
        return masked.softmax(-1, dtype=torch.float32).to(logits.dtype)


def check_mla_heads(heads: int, tp_size: int) -> None:
    """Refuse a number of ranks that cannot share the heads evenly, with ``ConfigError``."""
    if heads % tp_size:
        legal = [size for size in range(1, heads + 1) if heads % size == 0]
        raise ConfigError(
            f"{heads} heads cannot be shared by {tp_size} tensor-parallel ranks",
            f"use one of: {', '.join(map(str, legal))}",
        )


def _scale(config: ModelConfig, mla: MlaConfig) -> float:
    rope, scale = config.rope, 1.0 / math.sqrt(mla.qk_head_dim)
    magnitude = yarn_mscale(rope.factor, rope.mscale_all_dim) if rope.kind == "yarn" and rope.mscale_all_dim else 1.0
    return scale * magnitude * magnitude
