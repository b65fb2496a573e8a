"""Leaves of one shard as a set of bits: bit *n* is leaf *n* of its layout. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator


def mask_of(leaves: Iterable[int]) -> int:
    """A set of leaf indices as bits."""
    if isinstance(leaves, range) and leaves.step == 1:
        return ((1 << len(leaves)) - 1) << leaves.start if leaves else 0
    chosen = list(leaves)
    bits = bytearray(max(chosen, default=0) // 8 + 1)  # a number would be copied for each of a hundred thousand
    for index in chosen:
        bits[index >> 3] |= 1 << (index & 7)
    return int.from_bytes(bits, "little")


def indices(mask: int) -> Iterator[int]:
    """The leaf indices of a set of bits, ascending."""
    for run in runs(mask):
        yield from run


def runs(mask: int) -> Iterator[range]:
    """The leaf indices of a set of bits, as runs of neighbours, ascending."""
    at = 0
    while mask:
        skip = lowest(mask)
        mask >>= skip
        count = lowest(~mask)
        mask >>= count
        yield range(at + skip, at + skip + count)
        at += skip + count


def lowest(mask: int) -> int:
    """The first leaf of ``mask``, which is not empty; -1 if it is."""
    return (mask & -mask).bit_length() - 1
