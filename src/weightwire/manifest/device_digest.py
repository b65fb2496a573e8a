"""The device twin of ``digest``: the same values, computed where the bytes are.

All blocks of a batch are hashed in parallel, stripe by stripe, in 64-bit integer arithmetic (torch's ``int64``
multiplies modulo 2^64; the logical right shift is made from the arithmetic one and a mask). The batch is gathered into
a staging tensor of bounded size, so small tensors and odd alignments cost no extra care. Runs on any torch device,
the CPU included, which is how it is tested. On CUDA one compiled kernel (``device_kernel``) takes its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import xxhash

from weightwire.manifest import device_kernel
from weightwire.manifest.address import Segment
from weightwire.manifest.device_memory import tensor_at
from weightwire.manifest.leaves import LEAF_BYTES

BLOCK_BYTES = 64 * 1024
STRIPE_BYTES = 32
LANES = 4

CPU_BATCH_BYTES = 16 << 20
DEVICE_BATCH_BYTES = 256 << 20
"""Staging memory on an accelerator: enough blocks to fill it; stated in the documentation of memory use."""


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


_P1 = _signed(0x9E3779B185EBCA87)
_P2 = _signed(0xC2B2AE3D27D4EB4F)
_P3 = _signed(0x165667B19E3779F9)
_P4 = _signed(0x85EBCA77C2B2AE63)
_P5 = _signed(0x27D4EB2F165667C5)
_START = (_signed((0x9E3779B185EBCA87 + 0xC2B2AE3D27D4EB4F) % (1 << 64)), _P2, 0, _signed(-_P1 % (1 << 64)))


@dataclass(frozen=True, slots=True)
class _Block:
    leaf: int
    index: int
    nbytes: int
    pieces: tuple[tuple[int, int, Segment, int], ...]
    """(offset in the block, length, segment, offset in the segment)"""


def batch_leaves(device: str) -> int:
    """How many leaves one call of :func:`digest_leaves` should get on ``device``."""
    return (CPU_BATCH_BYTES if device == "cpu" else DEVICE_BATCH_BYTES) // LEAF_BYTES


def digest_leaves(leaves: Sequence[Sequence[Segment]]) -> bytes:
    """Digests of ``leaves``, each given as its segments in logical order, all on one device; one after the other.

    Uses ``sum of the leaves' sizes`` plus about a tenth as staging memory on the device, so give at most
    ``batch_leaves`` of them.
    """
    blocks = sorted(_blocks(leaves), key=lambda block: -block.nbytes)  # stable: full ones stay in logical order
    if not blocks:
        return b"".join(xxhash.xxh3_128_digest(b"") for _ in leaves)
    device = blocks[0].pieces[0][2].device
    stage = torch.empty(len(blocks) * BLOCK_BYTES, dtype=torch.uint8, device=device)
    _gather(stage, blocks)
    rows, lengths = stage.view(len(blocks), BLOCK_BYTES), [block.nbytes for block in blocks]
    hashes = device_kernel.block_hashes(rows, lengths)
    if hashes is None:
        hashes = block_hashes(rows, lengths)
    values = {(block.leaf, block.index): value for block, value in zip(blocks, hashes.tolist(), strict=True)}
    return b"".join(_leaf(values, number) for number in range(len(leaves)))


def block_hashes(stage: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """XXH64 (seed 0) of the first ``lengths[i]`` bytes of each row ``i``, as ``int64`` bit patterns, shape ``(rows,)``.

    Args:
        stage: ``uint8``, shape ``(rows, width)``, contiguous, ``width`` a multiple of 32; what lies beyond a
            length does not count.
        lengths: descending, each from 1 to ``width``.
    """
    words = stage.view(torch.int64)
    state = torch.tensor(_START, dtype=torch.int64, device=stage.device).repeat(len(lengths), 1)
    long = _count(lengths, STRIPE_BYTES)
    _stripes(state, words, lengths)
    total = torch.tensor(lengths, dtype=torch.int64, device=stage.device)
    value = torch.full_like(total, _P5)
    value[:long] = _merged(state[:long])
    value += total
    _tails(value, stage, lengths)
    return _avalanche(value)


def _blocks(leaves: Sequence[Sequence[Segment]]) -> Iterator[_Block]:
    for number, segments in enumerate(leaves):
        pieces: list[tuple[int, int, Segment, int]] = []
        filled = index = 0
        for segment in segments:
            at = 0
            while at < segment.nbytes:
                step = min(BLOCK_BYTES - filled, segment.nbytes - at)
                pieces.append((filled, step, segment, at))
                filled, at = filled + step, at + step
                if filled == BLOCK_BYTES:
                    yield _Block(number, index, filled, tuple(pieces))
                    pieces, filled, index = [], 0, index + 1
        if filled:
            yield _Block(number, index, filled, tuple(pieces))


def _gather(stage: torch.Tensor, blocks: Sequence[_Block]) -> None:
    """Copy every block to its row; runs that are contiguous on both sides go in one copy."""
    run: tuple[int, int, int] | None = None  # (row offset, address, length)
    device = blocks[0].pieces[0][2].device
    for row, block in enumerate(blocks):
        for offset, nbytes, segment, at in block.pieces:
            to, address = row * BLOCK_BYTES + offset, segment.address + at
            if run and run[0] + run[2] == to and run[1] + run[2] == address:
                run = (run[0], run[1], run[2] + nbytes)
                continue
            _copy(stage, run, device)
            run = (to, address, nbytes)
    _copy(stage, run, device)


def _copy(stage: torch.Tensor, run: tuple[int, int, int] | None, device: str) -> None:
    if run is not None:
        to, address, nbytes = run
        stage[to : to + nbytes].copy_(tensor_at(address, nbytes, device))


def _leaf(values: dict[tuple[int, int], int], number: int) -> bytes:
    parts, index = [], 0
    while (number, index) in values:
        parts.append(values[number, index].to_bytes(8, "little", signed=True))
        index += 1
    return xxhash.xxh3_128_digest(b"".join(parts))


def _stripes(state: torch.Tensor, words: torch.Tensor, lengths: Sequence[int]) -> None:
    """All whole stripes into the four lanes of ``state``; rows are sorted, so each step takes a prefix of them."""
    rows = len(lengths)
    lane, high = torch.empty_like(state), torch.empty_like(state)
    for step in range(lengths[0] // STRIPE_BYTES):
        while lengths[rows - 1] // STRIPE_BYTES <= step:
            rows -= 1
        acc, x, y = state[:rows], lane[:rows], high[:rows]
        torch.mul(words[:rows, step * LANES : (step + 1) * LANES], _P2, out=x)
        acc.add_(x)
        _rotate_into(acc, 31, x, y)
        acc.mul_(_P1)


def _rotate_into(acc: torch.Tensor, by: int, low: torch.Tensor, high: torch.Tensor) -> None:
    """``acc = rotl(acc, by)`` in place, with two scratch tensors."""
    torch.bitwise_left_shift(acc, by, out=high)
    torch.bitwise_right_shift(acc, 64 - by, out=low)
    low.bitwise_and_((1 << by) - 1)
    torch.bitwise_or(high, low, out=acc)


def _merged(state: torch.Tensor) -> torch.Tensor:
    one, two, three, four = state.unbind(1)
    value = _rotl(one, 1) + _rotl(two, 7) + _rotl(three, 12) + _rotl(four, 18)
    for lane in (one, two, three, four):
        value = (value ^ _round(lane)) * _P1 + _P4
    return value


def _tails(value: torch.Tensor, stage: torch.Tensor, lengths: Sequence[int]) -> None:
    """The last 0 to 31 bytes of each row: words of eight, one of four, single ones."""
    rest = [length % STRIPE_BYTES for length in lengths]
    for word in range(3):
        rows, picked = _pick(stage.view(torch.int64), lengths, [word * 8 if r >= word * 8 + 8 else None for r in rest])
        if rows is not None:
            value[rows] = _rotl(value[rows] ^ _round(picked), 27) * _P1 + _P4
    rows, picked = _pick(stage.view(torch.int32), lengths, [r // 8 * 8 if r % 8 >= 4 else None for r in rest])
    if rows is not None:
        value[rows] = _rotl(value[rows] ^ ((picked & 0xFFFFFFFF) * _P1), 23) * _P2 + _P3
    for byte in range(3):
        rows, picked = _pick(stage, lengths, [r // 4 * 4 + byte if r % 4 > byte else None for r in rest])
        if rows is not None:
            value[rows] = _rotl(value[rows] ^ (picked * _P5), 11) * _P1


def _pick(
    data: torch.Tensor, lengths: Sequence[int], at: Sequence[int | None]
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Rows whose ``at`` is a byte offset after the last whole stripe, and their element there, as ``int64``."""
    chosen = [
        (row, (length // STRIPE_BYTES * STRIPE_BYTES + offset) // data.element_size())
        for row, (length, offset) in enumerate(zip(lengths, at, strict=True))
        if offset is not None
    ]
    if not chosen:
        return None, data
    rows, columns = (torch.tensor(part, device=data.device) for part in zip(*chosen, strict=True))
    return rows, data[rows, columns].to(torch.int64)


def _count(lengths: Sequence[int], least: int) -> int:
    return sum(length >= least for length in lengths)


def _rotl(value: torch.Tensor, by: int) -> torch.Tensor:
    return (value << by) | _shift(value, 64 - by)


def _shift(value: torch.Tensor, by: int) -> torch.Tensor:
    """Logical right shift: torch's own copies the sign bit in."""
    return (value >> by) & ((1 << (64 - by)) - 1)


def _round(value: torch.Tensor) -> torch.Tensor:
    return _rotl(value * _P2, 31) * _P1


def _avalanche(value: torch.Tensor) -> torch.Tensor:
    value = (value ^ _shift(value, 33)) * _P2
    value = (value ^ _shift(value, 29)) * _P3
    return value ^ _shift(value, 32)
