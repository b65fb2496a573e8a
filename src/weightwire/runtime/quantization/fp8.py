"""Arithmetic of FP8 (e4m3) weights and their scales. Pure: tensors in, new tensors out."""

from __future__ import annotations

import torch

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest number of e4m3."""
BLOCK = 128
"""Rows and columns that share a scale in block-scaled weights."""
_SMALLEST_SCALE = 1e-12
_E8M0_BIAS = 127


def quantise(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``values / scale`` as e4m3, clamped; ``scale`` broadcasts."""
    return (values.float() / scale).clamp(-LARGEST, LARGEST).to(FP8)


def dequantise(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """float32; ``scale`` broadcasts."""
    return weight.float() * scale


def scale_of(values: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """The scale that brings the largest of ``values`` to the largest e4m3 number: of all, or along ``dim`` (kept)."""
    size = values.float().abs()
    largest = size.max() if dim is None else size.amax(dim, keepdim=True)
    return (largest / LARGEST).clamp_min(_SMALLEST_SCALE)


def requantise(weight: torch.Tensor, scale: torch.Tensor, common: torch.Tensor, rows: int = BLOCK) -> None:
    """Round ``weight``, which has ``scale``, anew, in place, so that it has the scale ``common``.

    ``rows``: so many at a time, so that float32 copies of the weight stay small beside it.
    """
    for at in range(0, weight.shape[0], rows):
        part = weight[at : at + rows]
        part.copy_(quantise(dequantise(part, scale), common))


def round_trip(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """What is left of activations after static or dynamic quantization: float32."""
    return dequantise(quantise(x, scale), scale)


def expand(scales: torch.Tensor, rows: int, columns: int, block: int = BLOCK) -> torch.Tensor:
    """One scale for each element of a (rows, columns) weight, from one for each block; the last blocks may be short."""
    return scales.repeat_interleave(block, 0)[:rows].repeat_interleave(block, 1)[:, :columns]


def block_scales(values: torch.Tensor, block: int = BLOCK) -> torch.Tensor:
    """(ceil(rows / block), ceil(columns / block)), float32."""
    rows, columns = values.shape
    down, across = -(-rows // block), -(-columns // block)
    padded = torch.zeros(down * block, across * block, device=values.device)
    padded[:rows, :columns] = values.float().abs()
    largest = padded.view(down, block, across, block).amax((1, 3))
    return (largest / LARGEST).clamp_min(_SMALLEST_SCALE)


def resmooth(weight: torch.Tensor, scales: torch.Tensor, rows: int = BLOCK) -> tuple[torch.Tensor, torch.Tensor]:
    """The same weight with scales that are powers of two (what e8m0 holds): weight and scales, both new.

    ``rows``: so many at a time, whole blocks, so that float32 copies of the weight stay small beside it.
    """
    found = torch.empty_like(weight)
    powers = torch.empty_like(scales)
    for at in range(0, weight.shape[0], rows):
        part, blocks = weight[at : at + rows], slice(at // BLOCK, -(-min(at + rows, weight.shape[0]) // BLOCK))
        exact = dequantise(part, expand(scales[blocks], *part.shape))
        powers[blocks] = torch.exp2(torch.ceil(torch.log2(block_scales(exact))))
        found[at : at + rows] = quantise(exact, expand(powers[blocks], *part.shape))
    return found, powers


def lay_out_e8m0(powers: torch.Tensor, rows: int) -> torch.Tensor:
    """Scales as a kernel reads them: one for each row, the e8m0 bytes of four column blocks in an int32.

    (ceil(rows / 128), blocks) powers of two to (ceil(blocks / 4), rows), rows contiguous.
    """
    blocks = powers.shape[1]
    exponents = (torch.log2(powers) + _E8M0_BIAS).to(torch.uint8).repeat_interleave(BLOCK, 0)[:rows]
    padded = torch.zeros(rows, -(-blocks // 4) * 4, dtype=torch.uint8, device=powers.device)
    padded[:, :blocks] = exponents
    return padded.view(torch.int32).t().contiguous()


def read_e8m0(laid_out: torch.Tensor, blocks: int) -> torch.Tensor:
    """The inverse of ``lay_out_e8m0``, still one for each row: (rows, blocks), float32."""
    rows = laid_out.shape[1]  # flat in between: a dimension of size 1 may have any stride
    exponents = laid_out.t().reshape(-1).view(torch.uint8).view(rows, -1)[:, :blocks]
    return torch.exp2(exponents.float() - _E8M0_BIAS)


def packed_scale_shape(count: int, rows: int, columns: int) -> tuple[int, int, int]:
    """Of what ``pack_blocks`` makes of the scales of (count, rows, columns) weights."""
    blocks = -(-columns // BLOCK)
    return count, -(-blocks // 4), rows


def pack_blocks(weights: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Several block-scaled weights, ``resmooth``-ed and laid out: (count, rows, columns), ``packed_scale_shape``."""
    found = torch.empty(weights.shape, dtype=weights.dtype, device=weights.device)
    laid_out = torch.empty(packed_scale_shape(*weights.shape), dtype=torch.int32, device=weights.device)
    for at, both in enumerate(zip(weights, scales, strict=True)):  # one at a time, as ``nvfp4.pad_all``
        found[at], powers = resmooth(*both)
        laid_out[at] = lay_out_e8m0(powers, weights.shape[1])
    return found, laid_out


def dequantise_blocks(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """(rows, columns) float32, from a scale for each block."""
    return dequantise(weight, expand(scales, *weight.shape))


def dequantise_packed(weight: torch.Tensor, laid_out: torch.Tensor) -> torch.Tensor:
    """(rows, columns) float32, from scales that ``lay_out_e8m0`` laid out."""
    columns = weight.shape[1]
    powers = read_e8m0(laid_out, -(-columns // BLOCK))
    return dequantise(weight, powers.repeat_interleave(BLOCK, 1)[:, :columns])


def round_trip_blocks(x: torch.Tensor) -> torch.Tensor:
    """What is left of activations that have a scale for each 128 columns of each token: float32."""
    padded = torch.nn.functional.pad(x.float(), (0, -x.shape[-1] % BLOCK))
    blocks = padded.reshape(*padded.shape[:-1], -1, BLOCK)
    return round_trip(blocks, scale_of(blocks, -1)).flatten(-2)[..., : x.shape[-1]]
