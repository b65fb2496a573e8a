"""The one way to write in which order a tensor's elements lie. Pure."""

from __future__ import annotations

import functools
from collections.abc import Sequence


@functools.cache
def ascending(dims: int) -> tuple[int, ...]:
    """Of a contiguous tensor: one object for all of them, of which a shard may have many thousand."""
    return tuple(range(dims))


def canonical_dims(shape: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    """Dimensions of size 1 do not count and stand last, and a contiguous order is ascending.

    Args:
        shape: sizes.
        order: a permutation of the dimensions, slowest first.
    """
    if tuple(order) == ascending(len(shape)):
        return ascending(len(shape))
    real = [dim for dim in order if shape[dim] != 1]
    if real == sorted(real) or 0 in shape:
        return ascending(len(shape))
    return (*real, *(dim for dim in range(len(shape)) if shape[dim] == 1))
