"""Boxes of an index space, and how they lie in the bytes of a tensor without gaps. Pure.

Every function takes dimensions from slowest to fastest varying in memory, unless it does not care about memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Self


@dataclass(frozen=True, slots=True)
class Box:
    """The indices ``offset[d] <= i < offset[d] + size[d]`` in every dimension ``d``."""

    offset: tuple[int, ...]
    size: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Self:
        """All of a tensor."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def volume(self) -> int:
        """How many indices it holds."""
        return math.prod(self.size)

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether it is a box of a tensor of ``shape``."""
        if not len(self.offset) == len(self.size) == len(shape):
            return False
        sides = zip(self.offset, self.size, shape, strict=True)
        return all(at >= 0 and size >= 0 and at + size <= full for at, size, full in sides)

    def common(self, other: Box) -> Box | None:
        """What both hold; ``None`` where that is nothing."""
        begin = tuple(map(max, self.offset, other.offset))
        size = tuple(
            min(a + m, b + n) - at
            for a, m, b, n, at in zip(self.offset, self.size, other.offset, other.size, begin, strict=True)
        )
        return Box(begin, size) if all(extent > 0 for extent in size) else None

    def moved(self, origin: Sequence[int], to: Sequence[int]) -> Box:
        """The same box where ``origin`` is called ``to``."""
        return Box(tuple(at - o + t for at, o, t in zip(self.offset, origin, to, strict=True)), self.size)

    def permuted(self, order: Sequence[int]) -> Box:
        """With the dimensions in another order."""
        return Box(tuple(self.offset[dim] for dim in order), tuple(self.size[dim] for dim in order))


def tiled(boxes: Iterable[Box], shape: Sequence[int]) -> str:
    """What keeps ``boxes`` from covering a tensor of ``shape`` exactly once; empty where nothing does."""
    held = [box for box in boxes if box.volume]
    if not all(box.fits(shape) for box in held):
        return "reaches beyond it"
    if any(one.common(other) for one, other in combinations(held, 2)):
        return "covers a part of it twice"
    return "" if sum(box.volume for box in held) == math.prod(shape) else "leaves a part of it out"


def byte_runs(shape: Sequence[int], box: Box, item: int, near: int) -> Iterator[tuple[int, int]]:
    """Byte ranges of a tensor that hold all of ``box``, ascending.

    Args:
        shape: of the tensor.
        box: of it.
        item: bytes of one element.
        near: rows that begin at most so many bytes apart are one range, with what lies between them.
    """
    if box.volume:
        yield from _runs(shape, box, item, near, (0, 0))


def _runs(shape: Sequence[int], box: Box, item: int, near: int, place: tuple[int, int]) -> Iterator[tuple[int, int]]:
    dim, base = place
    if dim == len(shape):
        yield base, base + item
        return
    stride = math.prod(shape[dim + 1 :]) * item
    begin, last = base + box.offset[dim] * stride, base + (box.offset[dim] + box.size[dim] - 1) * stride
    if stride <= near or box.size[dim + 1 :] == tuple(shape[dim + 1 :]):
        yield begin + _reach(shape, box.offset, item, dim), last + item + _reach(shape, _ends(box), item, dim)
        return
    for at in range(begin, last + 1, stride):
        yield from _runs(shape, box, item, near, (dim + 1, at))


def _ends(box: Box) -> tuple[int, ...]:
    return tuple(at + size - 1 for at, size in zip(box.offset, box.size, strict=True))


def _reach(shape: Sequence[int], index: Sequence[int], item: int, dim: int) -> int:
    """Bytes from the beginning of a row of ``dim`` to its element ``index``."""
    return sum(index[d] * math.prod(shape[d + 1 :]) * item for d in range(dim + 1, len(shape)))


def flat_boxes(shape: Sequence[int], begin: int, end: int) -> Iterator[Box]:
    """The elements ``begin .. end`` of a tensor, as few boxes: at most two a dimension, less one."""
    if begin >= end:
        return
    if not shape:
        yield Box((), ())
        return
    inner = math.prod(shape[1:])
    (first, head), (last, tail) = divmod(begin, inner), divmod(end, inner)
    if first == last:
        yield from _row(first, flat_boxes(shape[1:], head, tail))
        return
    if head:
        yield from _row(first, flat_boxes(shape[1:], head, inner))
        first += 1
    if first < last:
        yield Box((first, *(0 for _ in shape[1:])), (last - first, *shape[1:]))
    yield from _row(last, flat_boxes(shape[1:], 0, tail))


def _row(at: int, boxes: Iterable[Box]) -> Iterator[Box]:
    return (Box((at, *box.offset), (1, *box.size)) for box in boxes)
