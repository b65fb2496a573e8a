"""What a shard's tensors are parts of: declared by modules, carried by manifests, used where TP sizes differ. Pure.

A module declares it in ``tensor_shards() -> dict[attribute, Sharding]``, as it declares classes in
``tensor_classes()``. It enters no content id: the same bytes are the same weights however they are described. What is
not declared cannot be resharded, and is refused by name where that is tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from weightwire.manifest.boxes import Box, tiled

VERSION = 1
"""Of what a declaration means; one of another version counts as opaque."""

MAX_PIECES = 64
"""Pieces, and padding boxes, of one tensor."""
MAX_SIZE = 1 << 44


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a tensor that is a box of a whole model's tensor.

    Attributes:
        part: which one, where a tensor is fused of several (``q``, ``k``, ``v``); else empty.
        shape: of the whole model's tensor.
        box: of it.
        at: where that begins in this rank's tensor.
    """

    part: str
    shape: tuple[int, ...]
    box: Box
    at: tuple[int, ...]

    @property
    def local(self) -> Box:
        """Where it lies in this rank's tensor."""
        return Box(self.at, self.box.size)


@dataclass(frozen=True, slots=True)
class Sharding:
    """How one rank's tensor is made of whole ones: pieces and padding cover it exactly once.

    Attributes:
        pieces: no empty ones. Ranks may hold the same box (norms, replicated KV heads): then with equal bytes.
        padding: boxes that hold zeros and stand for nothing (rows beyond the vocabulary).
        opaque: why it cannot be described (swizzled, packed, blocks across a cut), empty where it can.
    """

    pieces: tuple[Piece, ...] = ()
    padding: tuple[Box, ...] = ()
    opaque: str = ""


def whole(shape: Sequence[int]) -> Sharding:
    """A tensor that every rank holds in full."""
    box = Box.whole(shape)
    return Sharding((Piece("", tuple(shape), box, box.offset),) if box.volume else ())


def opaque(reason: str) -> Sharding:
    """A tensor that cannot be taken apart, for instance ``opaque("its scales are swizzled")``."""
    return Sharding(opaque=reason)


@dataclass(frozen=True, slots=True)
class Cut:
    """``begin .. end`` along dimension ``dim`` of the whole tensor ``part`` of ``shape``."""

    shape: tuple[int, ...]
    dim: int
    begin: int
    end: int
    part: str = ""

    @property
    def box(self) -> Box:
        """Of the whole tensor."""
        offset, size = [0] * len(self.shape), list(self.shape)
        offset[self.dim], size[self.dim] = self.begin, self.end - self.begin
        return Box(tuple(offset), tuple(size))


def stacked(cuts: Sequence[Cut], dim: int = 0, length: int | None = None) -> Sharding:
    """Cuts one after the other along ``dim`` of this rank's tensor, and zeros up to ``length`` where it is longer."""
    pieces, at = [], 0
    for cut in cuts:
        box = cut.box
        begin = tuple(at if d == dim else 0 for d in range(len(cut.shape)))
        if box.volume:
            pieces.append(Piece(cut.part, cut.shape, box, begin))
        at += box.size[dim]
    if length is None or length == at:
        return Sharding(tuple(pieces))
    offset, size = list(Box.whole(cuts[-1].shape).offset), list(cuts[-1].box.size)
    offset[dim], size[dim] = at, length - at
    return Sharding(tuple(pieces), (Box(tuple(offset), tuple(size)),))


def scales(weight: Sharding, block: Sequence[int]) -> Sharding:
    """The sharding of a weight's scales, one for each ``block`` of elements.

    Opaque where a block lies across a cut: then no rank has the scale that the parts of such a block need.
    """
    if weight.opaque:
        return weight
    pieces = [_scaled(piece, block) for piece in weight.pieces]
    padding = [_blocks(box, None, block) for box in weight.padding]
    if None in pieces or None in padding:
        return opaque(f"blocks of {'x'.join(map(str, block))} that share a scale lie across a cut")
    return Sharding(tuple(filter(None, pieces)), tuple(filter(None, padding)))


def transposed(of: Sharding) -> Sharding:
    """The sharding of a tensor of two dimensions that is stored the other way round, as a whole one would be."""

    def turn(box: Box) -> Box:
        return Box(box.offset[::-1], box.size[::-1])

    pieces = [replace(p, shape=p.shape[::-1], box=turn(p.box), at=p.at[::-1]) for p in of.pieces]
    return replace(of, pieces=tuple(pieces), padding=tuple(map(turn, of.padding)))


def _scaled(piece: Piece, block: Sequence[int]) -> Piece | None:
    box = _blocks(piece.box, piece.shape, block)
    begin = _blocks(Box(piece.at, (0,) * len(piece.at)), None, block)
    if box is None or begin is None:
        return None
    shape = tuple(-(-size // step) for size, step in zip(piece.shape, block, strict=True))
    return replace(piece, shape=shape, box=box, at=begin.offset)


def _blocks(box: Box, shape: Sequence[int] | None, block: Sequence[int]) -> Box | None:
    """``box`` counted in blocks; ``None`` where it cuts one. The last block of a whole tensor may be short."""
    ends = [at + size for at, size in zip(box.offset, box.size, strict=True)]
    short = shape or (-1,) * len(ends)
    whole_ = all(
        at % step == 0 and (end % step == 0 or end == full)
        for at, end, full, step in zip(box.offset, ends, short, block, strict=True)
    )
    if not whole_:
        return None
    offset = tuple(at // step for at, step in zip(box.offset, block, strict=True))
    return Box(offset, tuple(-(-end // step) - at for end, step, at in zip(ends, block, offset, strict=True)))


def fault(sharding: Sharding, shape: Sequence[int]) -> str:
    """What is wrong with the declaration of a tensor of ``shape``, from a module or a peer; empty where nothing is."""
    if max(len(sharding.pieces), len(sharding.padding)) > MAX_PIECES:
        return f"has more than {MAX_PIECES} pieces"
    if sharding.opaque:
        return "is opaque and has pieces" if sharding.pieces or sharding.padding else ""
    wholes: dict[str, tuple[int, ...]] = {}
    for piece in sharding.pieces:
        if max(len(piece.shape), len(piece.at)) > len(shape) or not _natural(piece):
            return "has a piece without a place"
        if not piece.box.fits(piece.shape) or not piece.box.volume:
            return f"has a piece that is no part of {piece.part or 'the whole tensor'}"
        if wholes.setdefault(piece.part, piece.shape) != piece.shape:
            return f"gives {piece.part or 'the whole tensor'} two shapes"
    return tiled([*(piece.local for piece in sharding.pieces), *sharding.padding], shape)


def _natural(piece: Piece) -> bool:
    if not len(piece.shape) == len(piece.at) == len(piece.box.offset) == len(piece.box.size):
        return False
    numbers = (*piece.shape, *piece.at, *piece.box.offset, *piece.box.size)
    return all(type(number) is int and 0 <= number <= MAX_SIZE for number in numbers)
