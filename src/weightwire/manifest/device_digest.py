"""The device twin of ``digest``: the same values, computed where the bytes are.

On CUDA one kernel (``device_kernel``) hashes all blocks at once, where they lie; only blocks that consist of several
pieces of memory, or begin at an odd address, are gathered into a stage of bounded size first. Anywhere else (the CPU
included, which is how it is tested) all blocks of a batch are gathered and hashed in parallel, stripe by stripe, by
tensor operations in 64-bit integer arithmetic (torch's ``int64`` multiplies modulo 2^64; the logical right shift is
made from the arithmetic one and a mask).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import xxhash

from weightwire.manifest import device_kernel
from weightwire.manifest.address import AddressSpace, Segment, Spans
from weightwire.manifest.device_blocks import Blocks, Column, Pieces
from weightwire.manifest.device_kernel import Kernel
from weightwire.manifest.device_memory import tensor_at
from weightwire.manifest.leaves import LEAF_BYTES
from weightwire.manifest.records import BLOCK_BYTES
from weightwire.types import Span

STRIPE_BYTES = 32
LANES = 4

CPU_BATCH_BYTES = 16 << 20
DEVICE_BATCH_BYTES = 256 << 20
"""Most staging memory on an accelerator; stated in the documentation of memory use."""

DEVICE_LEAVES = 4096
"""Leaves digested in one go on an accelerator: enough to fill it many times over, few enough to report progress."""


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


_P1 = _signed(0x9E3779B185EBCA87)
_P2 = _signed(0xC2B2AE3D27D4EB4F)
_P3 = _signed(0x165667B19E3779F9)
_P4 = _signed(0x85EBCA77C2B2AE63)
_P5 = _signed(0x27D4EB2F165667C5)
_START = (_signed((0x9E3779B185EBCA87 + 0xC2B2AE3D27D4EB4F) % (1 << 64)), _P2, 0, _signed(-_P1 % (1 << 64)))


def batch_leaves(device: str) -> int:
    """How many leaves one call should get on ``device``."""
    return CPU_BATCH_BYTES // LEAF_BYTES if device == "cpu" else DEVICE_LEAVES


class SpanDigests:
    """Digests of spans on one device, asked for in runs. The tables are made once; safe to use from several threads.

    Args:
        memory: whose bytes of all ``spans`` lie on one device; kept alive by the caller.
        spans: each of them a leaf's, in any order.

    Raises:
        IndexError: a span is not inside ``memory``.
    """

    def __init__(self, memory: AddressSpace, spans: Sequence[Span] | Spans) -> None:
        spans = spans if isinstance(spans, Spans) else Spans.of(spans)
        segments = memory.columns(spans.hull)
        self._device = segments.devices[segments.homes[0]] if len(segments.homes) else "cpu"
        self._blocks = blocks = Blocks(segments, spans)
        self._ends = np.concatenate(([0], np.cumsum(blocks.counts)))
        self._split = np.flatnonzero(~blocks.whole)
        self._kernel = device_kernel.kernel_on(self._device)
        if self._kernel is not None:  # blocks of several pieces have no bytes here: they are gathered
            self._table = self._kernel.table(np.where(blocks.whole, (blocks.address, blocks.nbytes), 0))

    def of(self, first: int, end: int) -> bytes:
        """Digests of the spans numbered ``first`` to ``end``, one after the other.

        Memory is read on a stream of its own that waits for the current one first; done when this returns.
        """
        begin, stop = int(self._ends[first]), int(self._ends[end])
        if begin == stop:
            values = np.zeros(0, dtype=np.int64)
        elif self._kernel is None:
            values = _by_tensor_operations(self._blocks, np.arange(begin, stop), self._device)
        else:
            values = self._by_kernel(self._kernel, begin, stop)
        return _combined(values, self._blocks.counts[first:end])

    def _by_kernel(self, kernel: Kernel, begin: int, stop: int) -> Column:
        near = np.searchsorted(self._split, (begin, stop))
        split = self._split[near[0] : near[1]]
        with _own_stream(self._device):
            out = torch.empty(stop - begin, dtype=torch.int64, device=self._device)
            kernel.hash(self._table[:, begin:stop], out)
            parts = [_gathered_by_kernel(self._blocks, rows, kernel) for rows in _batches(split, DEVICE_BATCH_BYTES)]
            values: Column = out.cpu().numpy()
        if parts:
            values[split - begin] = np.concatenate(parts)
        return values


def digest_spans(memory: AddressSpace, spans: Sequence[Span] | Spans) -> bytes:
    """Digests of ``spans``, one after the other; see :class:`SpanDigests`. At most ``batch_leaves`` of them."""
    spans = spans if isinstance(spans, Spans) else Spans.of(spans)
    return SpanDigests(memory, spans).of(0, len(spans.offsets))


def digest_leaves(leaves: Sequence[Sequence[Segment]]) -> bytes:
    """As ``digest_spans``, of leaves that are given as their segments in logical order, all on one device."""
    segments: list[Segment] = []
    spans: list[Span] = []
    offset = 0
    for leaf in leaves:
        begin = offset
        for segment in leaf:
            segments.append(Segment(offset, segment.address, segment.nbytes, segment.device))
            offset += segment.nbytes
        spans.append(Span(begin, offset - begin))
    return digest_spans(AddressSpace(segments, (), None), spans)


def _combined(values: Column, counts: Column) -> bytes:
    """XXH3-128 over each leaf's block hashes."""
    data, ends = memoryview(values.astype("<i8").tobytes()), np.cumsum(counts) * 8
    bounds = zip((ends - counts * 8).tolist(), ends.tolist(), strict=True)
    return b"".join(xxhash.xxh3_128_digest(data[begin:end]) for begin, end in bounds)


def _gathered_by_kernel(blocks: Blocks, rows: Column, kernel: Kernel) -> Column:
    stage = torch.empty(len(rows) * BLOCK_BYTES, dtype=torch.uint8, device=kernel.device)
    out = torch.empty(len(rows), dtype=torch.int64, device=kernel.device)
    pieces = blocks.pieces(rows)
    to = stage.data_ptr() + pieces.row * BLOCK_BYTES + pieces.at
    kernel.gather(kernel.table(np.stack((pieces.address, to, pieces.nbytes))))
    home = stage.data_ptr() + np.arange(len(rows)) * BLOCK_BYTES
    kernel.hash(kernel.table(np.stack((home, blocks.nbytes[rows]))), out)
    values: Column = out.cpu().numpy()
    return values


class _Streams(threading.local):
    """Each thread's streams, by device."""

    def __init__(self) -> None:
        self.made: dict[str, torch.cuda.Stream] = {}


_streams = _Streams()


@contextlib.contextmanager
def _own_stream(device: str) -> Iterator[None]:
    """Digests asked for by several threads run beside each other, and not behind what else the process computes."""
    stream = _streams.made.get(device)
    if stream is None:
        stream = _streams.made[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    # first the device: to leave a stream of another device than the thread's makes a context on the thread's
    with torch.cuda.device(device), torch.cuda.stream(stream):
        yield


def _by_tensor_operations(blocks: Blocks, rows: Column, device: str) -> Column:
    values = np.empty(len(rows), dtype=np.int64)
    order = np.argsort(-blocks.nbytes[rows], kind="stable")  # longest first; full ones stay in logical order
    for part in _batches(order, CPU_BATCH_BYTES if device == "cpu" else DEVICE_BATCH_BYTES):
        stage = _gathered(blocks.pieces(rows[part]), len(part), device)
        values[part] = block_hashes(stage, blocks.nbytes[rows[part]].tolist()).cpu().numpy()
        del stage  # before the next one is made
    return values


def _batches(rows: Column, nbytes: int) -> Iterator[Column]:
    """``rows`` in parts whose stages are at most ``nbytes`` large."""
    step = nbytes // BLOCK_BYTES
    return (rows[at : at + step] for at in range(0, len(rows), step))


def _gathered(pieces: Pieces, rows: int, device: str) -> torch.Tensor:
    stage = torch.empty(rows * BLOCK_BYTES, dtype=torch.uint8, device=device)
    for to, address, nbytes in pieces.runs():
        stage[to : to + nbytes].copy_(tensor_at(address, nbytes, device))
    return stage.view(rows, BLOCK_BYTES)


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
