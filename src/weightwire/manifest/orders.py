"""The one way to write in which order a tensor's elements lie. Pure."""

from __future__ import annotations

from collections.abc import Sequence


def canonical_dims(shape: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    """Dimensions of size 1 do not count and stand last, and a contiguous order is ascending.

    Args:
        shape: sizes.
        order: a permutation of the dimensions, slowest first.
    """
    ascending = tuple(range(len(shape)))
    if tuple(order) == ascending:
        return ascending
    real = [dim for dim in order if shape[dim] != 1]
    if real == sorted(real) or 0 in shape:
        return ascending
    return (*real, *(dim for dim in range(len(shape)) if shape[dim] == 1))
