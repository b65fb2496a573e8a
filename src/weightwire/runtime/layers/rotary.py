"""Rotary position embedding."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import nn

from weightwire.runtime.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """The ``head_dim / 2`` angular frequencies, float32, with the config's stretching applied."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").to(torch.float32) / head_dim
    inv_freq = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return inv_freq / rope.factor
    if rope.kind == "yarn":
        return _yarn(inv_freq, rope, head_dim)
    return _llama3(inv_freq, rope) if rope.kind == "llama3" else inv_freq


def yarn_mscale(factor: float, mscale: float) -> float:
    """What YaRN multiplies magnitudes by where positions are stretched by ``factor``."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def attention_factor(rope: RopeConfig) -> float:
    """What cosines and sines are multiplied by."""
    if rope.kind != "yarn":
        return 1.0
    if rope.mscale and rope.mscale_all_dim:
        return yarn_mscale(rope.factor, rope.mscale) / yarn_mscale(rope.factor, rope.mscale_all_dim)
    return yarn_mscale(rope.factor, 1.0)


def _yarn(inv_freq: torch.Tensor, rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """YaRN: frequencies below ``beta_slow`` turns are stretched, those above ``beta_fast`` kept, a ramp between."""

    def dimension(turns: float) -> float:
        return head_dim * math.log(rope.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = max(math.floor(dimension(rope.beta_fast)), 0)
    high = min(math.ceil(dimension(rope.beta_slow)), head_dim - 1)
    steps = torch.arange(head_dim // 2, dtype=torch.float32, device="cpu")
    kept = 1 - ((steps - low) / (high - low or 0.001)).clamp(0, 1)
    return inv_freq / rope.factor * (1 - kept) + inv_freq * kept


def _llama3(inv_freq: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    """Llama 3.1: low frequencies are stretched by ``factor``, high ones kept, those between interpolated."""
    original, low, high = rope.original_max_position, rope.low_freq_factor, rope.high_freq_factor
    wavelength = 2 * math.pi / inv_freq
    stretched = torch.where(wavelength > original / low, inv_freq / rope.factor, inv_freq)
    blend = (original / wavelength - low) / (high - low)
    between = ~(wavelength < original / high) & ~(wavelength > original / low)
    return torch.where(between, (1 - blend) * stretched / rope.factor + blend * stretched, stretched)


class RotaryEmbedding(nn.Module):
    """Frequencies and a table of cosines and sines, shared by all layers; computed, never in a checkpoint.

    ``inv_freq`` is a buffer, ``cos_sin_cache`` (positions, head_dim: cosines then sines, float32) a plain attribute.
    Both are of class ``derived``: shaped by construction, and garbage until ``init_derived`` ran on a real device.
    """

    inv_freq: torch.Tensor
    cos_sin_cache: torch.Tensor

    def __init__(self, rope: RopeConfig, head_dim: int, max_position: int) -> None:
        super().__init__()
        self.rope = rope
        self.head_dim = head_dim
        self.register_buffer("inv_freq", torch.empty(head_dim // 2, dtype=torch.float32), persistent=False)
        self.cos_sin_cache = torch.empty(max_position, head_dim, dtype=torch.float32)

    def tensor_classes(self) -> dict[str, Literal["weight", "derived", "runtime"]]:
        """Both tensors are what construction computes."""
        return {"inv_freq": "derived", "cos_sin_cache": "derived"}

    @torch.no_grad()
    def init_derived(self) -> None:
        """Compute both tensors in place, in the memory that they have. Idempotent; not legal on meta."""
        self.inv_freq.copy_(inverse_frequencies(self.rope, self.head_dim))
        positions = torch.arange(self.cos_sin_cache.shape[0], dtype=torch.float32, device=self.inv_freq.device)
        angles = torch.outer(positions, self.inv_freq)
        half = self.head_dim // 2
        factor = attention_factor(self.rope)
        self.cos_sin_cache[:, :half] = angles.cos() * factor
        self.cos_sin_cache[:, half:] = angles.sin() * factor

    def forward(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines for (batch, length) positions, each (batch, length, 1, head_dim / 2), in ``dtype``."""
        cos, sin = self.cos_sin_cache[positions].to(dtype).unsqueeze(2).chunk(2, dim=-1)
        return cos, sin


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool) -> torch.Tensor:
    """Rotate the pairs of every head of ``x`` (batch, length, heads, head_dim).

    A pair is (i, i + d/2), or neighbours where ``interleaved``. The result is in split halves either way, so that
    what follows adds in one order and both layouts give equal bits.
    """
    first, second = x.reshape(*x.shape[:-1], -1, 2).unbind(-1) if interleaved else x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def deinterleaved(x: torch.Tensor) -> torch.Tensor:
    """Neighbouring pairs of every head of ``x`` (..., head_dim) to split halves, as ``rotate`` leaves them."""
    return torch.cat(x.reshape(*x.shape[:-1], -1, 2).unbind(-1), dim=-1)
