"""Planning how one rank is filled from the ranks of a replica with another tensor-parallel size. Pure.

Both sides declare which boxes of the whole model's tensors they hold (``manifest.sharding``). The plan reads whole
leaves, so that each can be verified, and names the boxes to copy out of them. Whatever cannot be shown to be covered
is refused by name before the first byte. Derived tensors are no part of it: each construction computes its own.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from weightwire.errors import ManifestMismatch
from weightwire.manifest import state as declared
from weightwire.manifest.boxes import Box, byte_runs
from weightwire.manifest.dtypes import ITEM_BYTES
from weightwire.manifest.leaves import LEAF_BYTES
from weightwire.manifest.plan import compare_names, validate_manifest
from weightwire.manifest.records import Entry, Layout, Manifest
from weightwire.manifest.sharding import Piece
from weightwire.types import Span, Stage, TensorClass

MAX_AMPLIFICATION = 2.0
"""Bytes read over bytes needed, by default at most."""
MAX_RANKS = 64
MAX_COPIES = 1 << 22

_REMEDY = "use a source of the same tensor-parallel size, or the disk"


@dataclass(frozen=True, slots=True)
class Copy:
    """A box of a source rank's tensor and where it goes.

    Attributes:
        source: name of the entry at the source.
        box: of that entry.
        entry: name of the entry here.
        at: where the box begins in it.
        check: another rank has given these bytes before: compare them instead.
    """

    source: str
    box: Box
    entry: str
    at: tuple[int, ...]
    check: bool = False


@dataclass(frozen=True, slots=True)
class RankPlan:
    """What is read of one source rank: ``leaves`` whole, in order, then ``copies`` out of them."""

    leaves: tuple[int, ...]
    copies: tuple[Copy, ...]


@dataclass(frozen=True, kw_only=True)
class ReshardPlan:
    """How to fill one rank. Source ranks are read in order: a ``Copy`` with ``check`` comes after the one it repeats.

    Attributes:
        ranks: by source rank; without leaves where nothing is needed of it.
        zeros: (entry here, box of it) that hold padding.
        needed: bytes that are filled from the sources.
        read: bytes of the leaves that are read for it.
    """

    ranks: tuple[RankPlan, ...]
    zeros: tuple[tuple[str, Box], ...]
    needed: int
    read: int

    @property
    def amplification(self) -> float:
        """Bytes read over bytes needed; 1 where nothing is needed."""
        return self.read / self.needed if self.needed else 1.0


def plan_reshard(
    expected: Layout, sources: Sequence[Manifest], *, stage: Stage, max_amplification: float = MAX_AMPLIFICATION
) -> ReshardPlan:
    """Plan how a target of layout ``expected`` is filled from all ranks of one source replica.

    Args:
        expected: the target's own, with its sharding declared.
        sources: the manifests of *all* ranks of one replica, in rank order; may come from strangers.
        stage: of the sources' bytes.
        max_amplification: bytes read over bytes needed, at most.

    Raises:
        ProtocolError: a manifest is out of bounds or contradicts itself.
        ManifestMismatch: names, dtypes, classes or state differ; a tensor's sharding is undeclared or opaque on either
            side, or does not cover it exactly; the stage is not ``LOADED``; too much would be read. Names the tensor.
    """
    if stage is not Stage.LOADED:
        raise ManifestMismatch(f"bytes of stage {stage} cannot be resharded", _REMEDY)
    if not 1 <= len(sources) <= MAX_RANKS:
        raise ManifestMismatch(f"{len(sources)} source ranks cannot be resharded", f"1 to {MAX_RANKS} are legal")
    for manifest in sources:
        validate_manifest(manifest)
        compare_names(expected, manifest.layout)
        differing = declared.differences(expected.state, manifest.layout.state)
        if differing:
            raise ManifestMismatch(differing[0], "give both sides the same model, dtype and build facts")
    return _Planner(expected, sources).plan(max_amplification)


@dataclass(frozen=True, slots=True)
class _Held:
    """One rank's copy of a region that the target needs."""

    rank: int
    entry: Entry
    box: Box  # of the rank's tensor


@dataclass(slots=True)
class _Region:
    """A box that the target needs and that one or more ranks hold, each whole."""

    entry: Entry
    at: tuple[int, ...]
    holders: list[_Held]


class _Rank:
    """One source rank's leaves, and which of them are to be read."""

    def __init__(self, manifest: Manifest) -> None:
        layout = manifest.layout
        offsets = itertools.accumulate((entry.nbytes for entry in layout.entries), initial=0)
        self.offsets = dict(zip((entry.name for entry in layout.entries), offsets, strict=False))
        self.homes = {name: entry for entry in layout.entries for name in (entry.name, *entry.aliases)}
        self.leaves = layout.leaves
        self._begins = [leaf.span.offset for leaf in layout.leaves]
        self.read: set[int] = set()

    def of(self, held: _Held) -> set[int]:
        """The leaves that hold ``held``."""
        order, start = held.entry.order, self.offsets[held.entry.name]
        shape = [held.entry.shape[dim] for dim in order]
        found: set[int] = set()
        for begin, end in byte_runs(shape, held.box.permuted(order), ITEM_BYTES[held.entry.dtype], LEAF_BYTES):
            first = bisect.bisect_right(self._begins, start + begin) - 1
            found.update(range(first, bisect.bisect_left(self._begins, start + end)))
        return found

    def nbytes(self, leaves: Iterable[int]) -> int:
        return sum(self.leaves[leaf].span.nbytes for leaf in leaves)


@dataclass(slots=True)
class _Tally:
    """What one entry costs, to name the worst."""

    needed: int = 0
    leaves: set[tuple[int, int]] = field(default_factory=set)


class _Planner:
    def __init__(self, expected: Layout, sources: Sequence[Manifest]) -> None:
        self.expected = expected
        self.ranks = [_Rank(manifest) for manifest in sources]
        self.copies: list[list[Copy]] = [[] for _ in sources]
        self.tallies: dict[str, _Tally] = {}
        self.needed = 0

    def plan(self, max_amplification: float) -> ReshardPlan:
        regions: list[_Region] = []
        zeros: list[tuple[str, Box]] = []
        for entry in self.expected.entries:
            if entry.kind is not TensorClass.WEIGHT:
                self._same_class(entry)
                continue
            regions += self._regions(entry)
            assert entry.sharding is not None
            zeros += [(entry.name, box) for box in entry.sharding.padding]
            if len(regions) > MAX_COPIES:
                raise ManifestMismatch(f"more than {MAX_COPIES} pieces at {entry.name}", _REMEDY)
        self._assign(regions)
        ranks = tuple(
            RankPlan(tuple(sorted(rank.read)), tuple(copies))
            for rank, copies in zip(self.ranks, self.copies, strict=True)
        )
        read = sum(rank.nbytes(rank.read) for rank in self.ranks)
        planned = ReshardPlan(ranks=ranks, zeros=tuple(zeros), needed=self.needed, read=read)
        if planned.amplification > max_amplification:
            raise ManifestMismatch(
                f"{planned.amplification:.1f} times the bytes that are needed would be read, above all for "
                f"{self._worst()}; at most {max_amplification:g} times is allowed",
                "raise the bound (max_amplification), or " + _REMEDY,
            )
        return planned

    def _same_class(self, entry: Entry) -> None:
        for rank in self.ranks:
            other = rank.homes.get(entry.name)
            if other is not None and other.kind is not entry.kind:
                raise ManifestMismatch(f"{entry.name} is {entry.kind} here and {other.kind} at the source", _REMEDY)

    def _regions(self, entry: Entry) -> Iterator[_Region]:
        held = [_source_of(entry, rank.homes, number) for number, rank in enumerate(self.ranks)]
        _refuse_unproven(entry, "here")
        assert entry.sharding is not None
        parts = _parts(held)
        for piece in entry.sharding.pieces:
            self.needed += piece.box.volume * ITEM_BYTES[entry.dtype]
            yield from _region(entry, piece, parts)

    def _assign(self, regions: Sequence[_Region]) -> None:
        """Choose who gives each region: where several can, whoever has most of it in leaves that are read anyway."""
        for region in (one for one in regions if len(one.holders) == 1):
            self._take(region.holders[0], region)
        for region in (one for one in regions if len(one.holders) > 1):
            self._take(min(region.holders, key=self._extra), region)
        for region in regions:
            ready = [held for held in region.holders if not self._extra(held)]
            for number, held in enumerate(ready):
                copy = Copy(held.entry.name, held.box, region.entry.name, region.at, check=number > 0)
                self.copies[held.rank].append(copy)

    def _extra(self, held: _Held) -> int:
        rank = self.ranks[held.rank]
        return rank.nbytes(rank.of(held) - rank.read)

    def _take(self, held: _Held, region: _Region) -> None:
        leaves = self.ranks[held.rank].of(held)
        self.ranks[held.rank].read |= leaves
        tally = self.tallies.setdefault(region.entry.name, _Tally())
        tally.needed += held.box.volume * ITEM_BYTES[region.entry.dtype]
        tally.leaves |= {(held.rank, leaf) for leaf in leaves}

    def _worst(self) -> str:
        """The entry for which most is read beyond what it needs."""

        def wasted(name: str) -> int:
            tally = self.tallies[name]
            return sum(self.ranks[rank].nbytes([leaf]) for rank, leaf in tally.leaves) - tally.needed

        return max(sorted(self.tallies), key=wasted)


def _source_of(entry: Entry, homes: Mapping[str, Entry], rank: int) -> _Held:
    """The entry of a source rank that ``entry`` is filled from, and everything of it."""
    names = (entry.name, *entry.aliases)
    found = {homes[name].name for name in names if name in homes}
    if len(found) != 1 or not all(name in homes for name in names):
        raise ManifestMismatch(
            f"{entry.name} is tied or shown otherwise at source rank {rank}", "apply the source's build facts"
        )
    other = homes[entry.name]
    if (other.dtype, other.kind) != (entry.dtype, entry.kind):
        raise ManifestMismatch(
            f"{entry.name} is {entry.dtype} ({entry.kind}) here and {other.dtype} ({other.kind}) at source rank {rank}",
            "give both sides the same model, dtype and build facts",
        )
    if {view.name for view in entry.views} - {view.name for view in other.views}:
        raise ManifestMismatch(f"views of {entry.name} are tensors of their own at source rank {rank}", _REMEDY)
    _refuse_unproven(other, f"at source rank {rank}")
    return _Held(rank, other, Box.whole(other.shape))


def _refuse_unproven(entry: Entry, where: str) -> None:
    if entry.sharding is None:
        raise ManifestMismatch(f"{entry.name} does not say {where} which part of the whole tensor it is", _REMEDY)
    if entry.sharding.opaque:
        raise ManifestMismatch(f"{entry.name} cannot be resharded {where}: {entry.sharding.opaque}", _REMEDY)


_Parts = Mapping[str, Mapping[tuple[tuple[int, ...], Box], list[tuple[_Held, Piece]]]]


def _parts(held: Sequence[_Held]) -> _Parts:
    """Who holds which box of each part; boxes that several hold appear once."""
    found: dict[str, dict[tuple[tuple[int, ...], Box], list[tuple[_Held, Piece]]]] = {}
    for one in held:
        assert one.entry.sharding is not None
        for piece in one.entry.sharding.pieces:
            found.setdefault(piece.part, {}).setdefault((piece.shape, piece.box), []).append((one, piece))
    return found


def _region(entry: Entry, piece: Piece, parts: _Parts) -> Iterator[_Region]:
    """``piece`` of the target as regions of the sources' boxes, which must cover it exactly once or by equal boxes."""
    what = f"{piece.part} of {entry.name}" if piece.part else entry.name
    boxes = parts.get(piece.part, {})
    shapes = {shape for shape, _ in boxes}
    if shapes - {piece.shape}:
        raise ManifestMismatch(f"{what} is {list(piece.shape)} in all here and {list(shapes.pop())} there", _REMEDY)
    covered = 0
    distinct = [box for _, box in boxes]
    for one, other in itertools.combinations(distinct, 2):
        if one.common(other):
            raise ManifestMismatch(f"source ranks overlap in a part of {what}", _REMEDY)
    for (_, box), holders in boxes.items():
        common = box.common(piece.box)
        if common is None:
            continue
        covered += common.volume
        at = common.moved(piece.box.offset, piece.at).offset
        yield _Region(entry, at, [_of_holder(one, theirs, common) for one, theirs in holders])
    if covered != piece.box.volume:
        raise ManifestMismatch(f"source ranks hold only a part of {what}", _REMEDY)


def _of_holder(one: _Held, piece: Piece, common: Box) -> _Held:
    return _Held(one.rank, one.entry, common.moved(piece.box.offset, piece.at))


def leaf_runs(spans: Sequence[Span], leaves: Sequence[int], most: int) -> Iterator[range]:
    """Neighbouring leaves put together, none above ``most`` bytes unless it is a single leaf.

    Args:
        spans: of all leaves.
        leaves: ascending.
        most: bytes.
    """
    begin = 0
    for at in range(1, len(leaves) + 1):
        follows = at < len(leaves) and leaves[at] == leaves[at - 1] + 1
        if not follows or spans[leaves[at]].end - spans[leaves[begin]].offset > most:
            yield range(leaves[begin], leaves[at - 1] + 1)
            begin = at
