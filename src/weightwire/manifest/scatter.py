"""Copying the boxes of a reshard plan out of verified leaves, into the tensors of a catalogue."""

from __future__ import annotations

import bisect
import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch

from weightwire.errors import DigestMismatch
from weightwire.manifest.boxes import Box, flat_boxes
from weightwire.manifest.catalogue import Catalogue
from weightwire.manifest.dtypes import ITEM_BYTES
from weightwire.manifest.records import Entry, Layout
from weightwire.manifest.reshard import Copy, ReshardPlan

_RAW = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
"""Item bytes -> a dtype that copies and compares them as they are."""


class Disagreement(DigestMismatch):
    """Two ranks of one source hold different bytes of what both say is the same part: no peer's fault alone."""


class Scatter:
    """Fills ``catalogue`` as ``planned`` says. Ranks come in order, each rank's leaves in any order; no thread-safety.

    Args:
        catalogue: of the target; nothing is written before ``zero`` or ``take``.
        sources: layouts of all source ranks.
        planned: of the two.
    """

    def __init__(self, catalogue: Catalogue, sources: Sequence[Layout], planned: ReshardPlan) -> None:
        self._tensors = {name: _raw(tensor) for name, tensor in catalogue.tensors.items()}
        self._zeros = planned.zeros
        self._ranks = [_Rank(layout, rank.copies) for layout, rank in zip(sources, planned.ranks, strict=True)]

    def zero(self) -> None:
        """Write the padding."""
        for name, box in self._zeros:
            _narrow(self._tensors[name], box).zero_()

    def take(self, rank: int, offset: int, data: torch.Tensor) -> None:
        """Copy what is needed out of some whole leaves of one rank.

        Args:
            rank: of the source.
            offset: of the first byte in the rank's logical byte string.
            data: verified bytes, ``uint8``, contiguous, on the host.

        Raises:
            Disagreement: another rank gave other bytes for what both say is the same part; names the tensor.
        """
        for entry, start, copies in self._ranks[rank].within(offset, offset + data.numel()):
            begin, end = max(start, offset), min(start + entry.nbytes, offset + data.numel())
            item = ITEM_BYTES[entry.dtype]
            values = _aligned(data[begin - offset : end - offset], item)
            first, last = (begin - start) // item, (end - start) // item
            shape = [entry.shape[dim] for dim in entry.order]
            for part in flat_boxes(shape, first, last):
                for copy in copies:
                    common = part.common(copy.box.permuted(entry.order))
                    if common is not None:
                        self._put(entry, copy, common, _shown(values, shape, common, first))

    def _put(self, entry: Entry, copy: Copy, common: Box, values: torch.Tensor) -> None:
        """``common`` and ``values`` have the entry's dimensions in the order in which they lie in memory."""
        inverse = sorted(range(len(entry.order)), key=entry.order.__getitem__)
        box = common.permuted(inverse).moved(copy.box.offset, copy.at)
        into, values = _narrow(self._tensors[copy.entry], box), values.permute(inverse)
        if not copy.check:
            into.copy_(values)
        elif not torch.equal(into, values.to(into.device)):
            raise Disagreement(
                f"ranks of the source hold different bytes of {copy.entry}, which they should share",
                "load that source again; use another one, or the disk",
            )


class _Rank:
    """Where a source rank's entries lie, and what is copied out of each."""

    def __init__(self, layout: Layout, copies: Sequence[Copy]) -> None:
        by_entry: Mapping[str, list[Copy]] = defaultdict(list)
        for copy in copies:
            by_entry[copy.source].append(copy)
        starts = itertools.accumulate((entry.nbytes for entry in layout.entries), initial=0)
        placed = zip(layout.entries, starts, strict=False)
        self._wanted = [(entry, at, by_entry[entry.name]) for entry, at in placed if entry.name in by_entry]
        self._ends = [at + entry.nbytes for entry, at, _ in self._wanted]

    def within(self, begin: int, end: int) -> list[tuple[Entry, int, list[Copy]]]:
        found = []
        at = bisect.bisect_right(self._ends, begin)
        while at < len(self._wanted) and self._wanted[at][1] < end:
            found.append(self._wanted[at])
            at += 1
        return found


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(_RAW[tensor.element_size()])


def _aligned(data: torch.Tensor, item: int) -> torch.Tensor:
    """Bytes as items; small tensors of several dtypes may lie at odd offsets."""
    return (data.clone() if data.storage_offset() % item else data).view(_RAW[item])


def _narrow(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    for dim, (at, size) in enumerate(zip(box.offset, box.size, strict=True)):
        tensor = tensor.narrow(dim, at, size)
    return tensor


def _shown(values: torch.Tensor, shape: Sequence[int], box: Box, first: int) -> torch.Tensor:
    """``box`` of a tensor of ``shape``, of which ``values`` are the elements from ``first`` on."""
    stride = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    begin = sum(at * step for at, step in zip(box.offset, stride, strict=True)) - first
    return values.as_strided(box.size, stride, values.storage_offset() + begin)
