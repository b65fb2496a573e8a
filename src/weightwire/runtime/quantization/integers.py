"""Arithmetic of integer weights: int8 with a scale for each row, int4 with a scale for each group of columns. Pure."""

from __future__ import annotations

import torch

_SMALLEST_SCALE = 1e-12


def quantise_int8(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, columns) to int8 of the same shape and (rows,) float32 scales."""
    scales = (values.float().abs().amax(1) / 127).clamp_min(_SMALLEST_SCALE)
    return (values.float() / scales.unsqueeze(1)).round().clamp(-127, 127).to(torch.int8), scales


def quantise_int4(values: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, columns) to bytes (rows / 2, columns) and (rows, columns / group) scales.

    A byte holds two rows of one column, the even row in its low half.
    """
    groups = values.float().reshape(values.shape[0], -1, group)
    scales = (groups.abs().amax(-1) / 7).clamp_min(_SMALLEST_SCALE)
    numbers = (groups / scales.unsqueeze(-1)).round().clamp(-8, 7).to(torch.int8).flatten(1)
    nibbles = numbers.view(torch.uint8) & 15
    return nibbles[0::2] | nibbles[1::2] << 4, scales


def int4_rows(packed: torch.Tensor) -> torch.Tensor:
    """The rows of bytes (rows / 2, columns): (rows, columns), float32."""
    nibbles = torch.stack([packed & 15, packed >> 4], 1).flatten(0, 1)
    return ((nibbles.to(torch.int16) ^ 8) - 8).float()


def dequantise_int4(packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """float32, (rows, columns)."""
    numbers = int4_rows(packed).reshape(scales.shape[0], scales.shape[1], -1)
    return (numbers * scales.float().unsqueeze(-1)).flatten(1)
