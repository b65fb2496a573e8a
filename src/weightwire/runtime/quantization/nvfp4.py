"""Arithmetic of NVFP4: e2m1 numbers, two in a byte, an e4m3 scale for 16 of them, a float32 scale for all. Pure."""

from __future__ import annotations

import torch

FP8 = torch.float8_e4m3fn
GROUP = 16
"""Columns that share a block scale."""
ROW_TILE, COLUMN_TILE = 128, 4
"""The kernel reads block scales in tiles of so many rows and scale columns."""
ALIGN_ROWS, ALIGN_BYTES = 32, 16
"""What the kernel wants weights padded to."""
_MAGNITUDES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_MIDDLES = (_MAGNITUDES[1:] + _MAGNITUDES[:-1]) / 2
_LARGEST, _LARGEST_FP8 = 6.0, 448.0
_SMALLEST = 1e-30


def pad(size: int, step: int) -> int:
    """``size`` rounded up to a multiple of ``step``."""
    return -(-size // step) * step


def global_scale(values: torch.Tensor) -> torch.Tensor:
    """The ``weight_scale_2`` (or input scale) that lets the largest block scale be the largest e4m3 number: ()."""
    return (values.float().abs().max() / (_LARGEST * _LARGEST_FP8)).clamp_min(_SMALLEST)


def _groups(values: torch.Tensor) -> torch.Tensor:
    return values.reshape(*values.shape[:-1], values.shape[-1] // GROUP, GROUP)


def quantise(values: torch.Tensor, scale_2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(..., columns) to bytes (..., columns / 2) and e4m3 block scales (..., columns / 16)."""
    groups = _groups(values.float())
    scales = (groups.abs().amax(-1) / (_LARGEST * scale_2)).clamp(max=_LARGEST_FP8).to(FP8)
    step = (scales.float() * scale_2).clamp_min(_SMALLEST).unsqueeze(-1)
    numbers = (groups / step).flatten(-2)
    codes = torch.bucketize(numbers.abs(), _MIDDLES.to(numbers.device)).to(torch.uint8)
    codes |= (numbers < 0).to(torch.uint8) << 3
    return codes[..., 0::2] | codes[..., 1::2] << 4, scales


def numbers_of(packed: torch.Tensor) -> torch.Tensor:
    """The e2m1 numbers of bytes: twice as many columns, float32."""
    codes = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
    magnitude = _MAGNITUDES.to(packed.device)[(codes & 7).long()]
    return torch.where(codes > 7, -magnitude, magnitude)


def scaled(packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Numbers times block scales, without the global scale: float32, (..., columns)."""
    return (_groups(numbers_of(packed)) * scales.float().unsqueeze(-1)).flatten(-2)


def dequantise(packed: torch.Tensor, scales: torch.Tensor, scale_2: torch.Tensor) -> torch.Tensor:
    """float32, (..., columns)."""
    return scaled(packed, scales) * scale_2


def rescale(scales: torch.Tensor, scale_2: torch.Tensor, common: torch.Tensor) -> torch.Tensor:
    """Block scales that go with ``scale_2``, rounded so that they go with the global scale ``common``."""
    return (scales.float() * (scale_2 / common)).clamp(max=_LARGEST_FP8).to(FP8)


def interleaved_size(rows: int, columns: int) -> int:
    """Elements of the interleaved block scales of ``rows`` by ``columns`` of them."""
    return pad(rows, ROW_TILE) * pad(columns, COLUMN_TILE)


def interleave(scales: torch.Tensor) -> torch.Tensor:
    """(rows, columns) block scales as the kernel reads them: one dimension, padded with zeros to whole tiles.

    Within a tile the four groups of 32 rows lie beside each other: (tile row, tile column, 32, 4, 4).
    """
    rows, columns = scales.shape
    padded = torch.zeros(pad(rows, ROW_TILE), pad(columns, COLUMN_TILE), dtype=torch.uint8, device=scales.device)
    padded[:rows, :columns] = scales.view(torch.uint8)
    tiles = padded.view(-1, 4, 32, padded.shape[1] // COLUMN_TILE, COLUMN_TILE)
    return tiles.permute(0, 3, 2, 1, 4).contiguous().flatten().view(scales.dtype)


def deinterleave(flat: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The (rows, columns) block scales that ``interleave`` made ``flat`` of."""
    across = pad(columns, COLUMN_TILE) // COLUMN_TILE
    tiles = flat.view(torch.uint8).view(-1, across, 32, 4, COLUMN_TILE).permute(0, 3, 2, 1, 4)
    plain = tiles.reshape(pad(rows, ROW_TILE), across * COLUMN_TILE)[:rows, :columns]
    return plain.contiguous().view(flat.dtype)


def pad_weight(packed: torch.Tensor) -> torch.Tensor:
    """A new weight, padded with zeros to what the kernel wants."""
    rows, columns = packed.shape
    padded = torch.zeros(aligned(rows, columns), dtype=packed.dtype, device=packed.device)
    padded[:rows, :columns] = packed
    return padded


def aligned(rows: int, columns: int) -> tuple[int, int]:
    """Rows and bytes of a weight of that size after ``pad_weight``."""
    return pad(rows, ALIGN_ROWS), pad(columns, ALIGN_BYTES)


def pad_both(packed: torch.Tensor, flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and its interleaved block scales, padded to what the kernel wants: both new."""
    rows, columns = packed.shape[0], packed.shape[1] * 2 // GROUP
    weight = pad_weight(packed)
    padded = torch.zeros(weight.shape[0], weight.shape[1] * 2 // GROUP, dtype=torch.uint8, device=flat.device)
    padded[:rows, :columns] = deinterleave(flat, rows, columns).view(torch.uint8)
    return weight, interleave(padded.view(flat.dtype))


def pad_all(weights: torch.Tensor, flats: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``pad_both`` of several weights (count, rows, bytes) and their block scales (count, elements)."""
    rows, columns = aligned(*weights.shape[1:])
    found = torch.empty(len(weights), rows, columns, dtype=weights.dtype, device=weights.device)
    size = interleaved_size(rows, columns * 2 // GROUP)
    scales = torch.empty(len(weights), size, dtype=flats.dtype, device=flats.device)
    for at, both in enumerate(zip(weights, flats, strict=True)):  # one at a time: never all of them twice
        found[at], scales[at] = pad_both(*both)
    return found, scales


def scaled_flat(packed: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
    """``scaled``, from interleaved block scales."""
    rows, columns = packed.shape
    return scaled(packed, deinterleave(flat, rows, columns * 2 // GROUP))
