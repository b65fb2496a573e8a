"""Which regions a reader's agent is told of: few, where they are many and lie side by side. Pure."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np

from weightwire.manifest.address import Region

PAGE_BYTES = 4096


class Places:
    """What one agent that only reads has registered; never two regions that overlap, for NIXL then finds neither.

    Regions of host memory that share or adjoin pages are registered as one: all that lies between them is mapped, too,
    and as the agent's keys are given to nobody it is not exposed. (20,000 tensors of a heap took 0.1 s one by one.)
    """

    def __init__(self) -> None:
        self._known: dict[str, list[Region]] = {}

    def add(self, regions: Sequence[Region]) -> list[Region]:
        """What to register so that all of ``regions`` are; they overlap nothing that was allocated apart from them."""
        new = [region for region in regions if not self._covers(region)] if self._known else regions
        few = joined(new)
        if any(self._meets(region) for region in few):  # something small that was registered before lies in between
            few = list(new)
        for region in few:
            bisect.insort(self._known.setdefault(region.device, []), region)
        return few

    def _covers(self, region: Region) -> bool:
        before = self._before(region)
        return before is not None and region.address + region.nbytes <= before.address + before.nbytes

    def _meets(self, region: Region) -> bool:
        before, known = self._before(region), self._known.get(region.device, [])
        after = bisect.bisect_right(known, region.address, key=_address)
        overlaps = before is not None and before.address + before.nbytes > region.address
        return overlaps or (after < len(known) and known[after].address < region.address + region.nbytes)

    def _before(self, region: Region) -> Region | None:
        known = self._known.get(region.device, [])
        at = bisect.bisect_right(known, region.address, key=_address)
        return known[at - 1] if at else None


def joined(regions: Sequence[Region]) -> list[Region]:
    """``regions``, those of host memory joined where no whole page lies between two; in arrays, as they may be many."""
    host = [region for region in regions if region.device == "cpu"]
    found = [region for region in regions if region.device != "cpu"]
    if host:
        begins = np.fromiter((region.address for region in host), np.int64, len(host))
        ends = begins + np.fromiter((region.nbytes for region in host), np.int64, len(host))
        order = np.argsort(begins, kind="stable")
        begins, ends = begins[order], np.maximum.accumulate(ends[order])
        first = np.flatnonzero(np.append(True, begins[1:] - ends[:-1] >= PAGE_BYTES))
        last = np.append(first[1:], len(host)) - 1
        rows = zip(begins[first].tolist(), (ends[last] - begins[first]).tolist(), strict=True)
        found += [Region(address, nbytes, "cpu") for address, nbytes in rows]
    return sorted(found, key=lambda each: (each.device, each.address))


def _address(region: Region) -> int:
    return region.address
