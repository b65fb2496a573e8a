"""Grouped-query attention over this rank's heads, with a cache of keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import nn

from weightwire.errors import ConfigError
from weightwire.runtime.config import ModelConfig
from weightwire.runtime.layers.context import LayerContext
from weightwire.runtime.layers.linear import Linear, OutPart, TensorParallelMode
from weightwire.runtime.layers.norm import RMSNorm
from weightwire.runtime.layers.packing import QkvLinear
from weightwire.runtime.layers.rotary import deinterleaved, rotate


@dataclass(frozen=True)
class AttentionStep:
    """What all layers need for one forward pass of ``length`` new tokens of each sequence.

    ``positions``: (batch, length). ``cos``, ``sin``: (batch, length, 1, head_dim / 2). ``mask``: (batch, 1, length,
    cached), true where a token may look.
    """

    positions: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    mask: torch.Tensor


def check_heads(config: ModelConfig, tp_size: int) -> None:
    """Refuse a number of ranks that cannot share the heads evenly.

    Raises:
        ConfigError: ranks do not divide the heads, or KV heads and ranks do not divide one another.
    """
    heads, kv_heads = config.num_heads, config.num_kv_heads
    if heads % tp_size or (kv_heads % tp_size and tp_size % kv_heads):
        legal = [n for n in range(1, heads + 1) if heads % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)]
        raise ConfigError(
            f"{heads} heads and {kv_heads} KV heads cannot be shared by {tp_size} tensor-parallel ranks",
            f"use one of: {', '.join(map(str, legal))}",
        )


def softcapped(x: torch.Tensor, cap: float | None) -> torch.Tensor:
    """``cap * tanh(x / cap)``; ``x`` where there is no cap."""
    return x if cap is None else torch.tanh(x / cap) * cap


class SelfAttention(nn.Module):
    """What every layer's attention is: (batch, length, hidden) and a step to the same, with a cache of its own."""

    def allocate_cache(self, batch: int, length: int, device: torch.device) -> None:
        """Room for ``length`` tokens of ``batch`` sequences."""
        raise NotImplementedError

    def release_cache(self) -> None:
        """Drop the cache."""
        raise NotImplementedError


class Attention(SelfAttention):
    """Causal self-attention. ``k_cache`` and ``v_cache`` are run-time state: they hold users' text.

    With ``qk_norm`` the heads of queries and keys are normalised before they are rotated.
    """

    k_cache: torch.Tensor | None
    v_cache: torch.Tensor | None

    def __init__(self, context: LayerContext, config: ModelConfig, layer: int) -> None:
        super().__init__()
        check_heads(config, context.tp.size)
        self.layer = layer
        self.qk_norm = config.qk_norm
        self.context = context
        self.head_dim = config.head_dim
        sizes = (config.num_heads, config.num_kv_heads, config.head_dim)
        qkv = context.within("qkv_proj")
        self.qkv_proj = QkvLinear(qkv, config.hidden_size, sizes, bias=config.attention_bias)
        self.o_proj = Linear(
            context.within("o_proj"),
            config.num_heads * config.head_dim,
            [OutPart(config.hidden_size)],
            mode=TensorParallelMode.ROW,
            bias=config.attention_bias,
        )
        if self.qk_norm:
            self.q_norm = RMSNorm(context, config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(context, config.head_dim, config.rms_norm_eps)
        self.k_cache = None
        self.v_cache = None

    def tensor_classes(self) -> dict[str, Literal["weight", "derived", "runtime"]]:
        """The cache is never anyone else's business."""
        return {"k_cache": "runtime", "v_cache": "runtime"}

    def allocate_cache(self, batch: int, length: int, device: torch.device) -> None:
        """Room for ``length`` tokens of ``batch`` sequences. Zeroed: masked positions are multiplied by nought."""
        kv_heads = self.qkv_proj.kv_rows // self.head_dim
        shape = (batch, length, kv_heads, self.head_dim)
        self.k_cache = torch.zeros(shape, dtype=self.context.dtype, device=device)
        self.v_cache = torch.zeros(shape, dtype=self.context.dtype, device=device)

    def release_cache(self) -> None:
        """Drop the cache."""
        self.k_cache = self.v_cache = None

    def forward(self, x: torch.Tensor, step: AttentionStep) -> torch.Tensor:
        """(batch, length, hidden) to the same, summed over ranks; new keys and values go to the cache."""
        assert self.k_cache is not None
        assert self.v_cache is not None
        qkv = self.qkv_proj(x)
        sizes = [self.qkv_proj.q_rows, self.qkv_proj.kv_rows, self.qkv_proj.kv_rows]
        q, k, v = (part.reshape(*part.shape[:-1], -1, self.head_dim) for part in qkv.split(sizes, -1))
        interleaved = self.qkv_proj.rows_are_interleaved
        if self.qk_norm:
            q, k = (deinterleaved(part) if interleaved else part for part in (q, k))
            q, k, interleaved = self.q_norm(q), self.k_norm(k), False
        q = rotate(q, step.cos, step.sin, interleaved=interleaved)
        k = rotate(k, step.cos, step.sin, interleaved=interleaved)
        sequences = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
        self.k_cache[sequences, step.positions] = k
        self.v_cache[sequences, step.positions] = v
        seen = step.mask.shape[-1]
        heads = self.attend(q.transpose(1, 2), *self.cached(seen), step)
        summed: torch.Tensor = self.o_proj(heads.transpose(1, 2).flatten(-2))
        return summed

    def cached(self, seen: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first ``seen`` keys and values, each (batch, KV heads, seen, head_dim)."""
        assert self.k_cache is not None
        assert self.v_cache is not None
        return self.k_cache[:, :seen].transpose(1, 2), self.v_cache[:, :seen].transpose(1, 2)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: AttentionStep) -> torch.Tensor:
        """Queries (batch, heads, length, head_dim) over the cache: (batch, heads, length, head_dim)."""
        return F.scaled_dot_product_attention(q, k, v, attn_mask=step.mask, enable_gqa=True)


class CappedAttention(Attention):
    """Gemma 2's: a scale of its own, a cap on attention's logits, and a window on even layers."""

    def __init__(self, context: LayerContext, config: ModelConfig, layer: int) -> None:
        super().__init__(context, config, layer)
        assert config.gemma is not None
        self.gemma = config.gemma
        self.window = None if layer % 2 else config.gemma.sliding_window

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: AttentionStep) -> torch.Tensor:
        """As in ``Attention``."""
        mask = step.mask
        if self.window is not None:
            cached = torch.arange(mask.shape[-1], device=mask.device)
            mask = mask & (cached > step.positions.unsqueeze(-1) - self.window).unsqueeze(1)
        k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for part in (k, v))
        logits = softcapped(q @ k.transpose(2, 3) * self.gemma.query_pre_attn_scalar**-0.5, self.gemma.attn_softcap)
        weights = logits.masked_fill(~mask, float("-inf")).softmax(-1, dtype=torch.float32)
        return weights.to(q.dtype) @ v
