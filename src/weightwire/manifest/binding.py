"""Which memory of this process a layout's logical byte string lies in."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping

import torch

from weightwire.errors import ManifestMismatch
from weightwire.manifest.address import AddressSpace, Region, Segment
from weightwire.manifest.footprint import Footprint
from weightwire.manifest.records import Entry, Layout


def bind(
    own: Layout, footprints: Mapping[str, Footprint], tensors: Mapping[str, torch.Tensor], layout: Layout
) -> AddressSpace:
    """Map ``layout``'s logical byte string onto the memory of the entries of ``own``.

    Args:
        own: this process's layout.
        footprints: of its entries, by name.
        tensors: of its entries, by name; they keep the memory alive and say which storages it lies in.
        layout: the one that the bytes travel under: ``own``, or one that ``plan`` accepted. Its entry names may be
            aliases here.

    Raises:
        ManifestMismatch: an entry of ``layout`` is unknown here or has another size.
    """
    homes = {name: entry for entry in own.entries for name in (entry.name, *entry.aliases)}
    used = [_home(homes, entry) for entry in layout.entries]
    segments = list(_segments(footprints[entry.name] for entry in used))
    owners = [tensors[entry.name] for entry in used]
    return AddressSpace(segments, regions(owners), owners)


def regions(tensors: Iterable[torch.Tensor]) -> list[Region]:
    """The whole storages that ``tensors`` lie in, disjoint, ascending; adjacent ones on a device are one."""
    found = set()
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes() and tensor.numel():
            device = tensor.device
            label = device.type if device.type == "cpu" else f"{device.type}:{device.index or 0}"
            found.add(Region(storage.data_ptr(), storage.nbytes(), label))
    return list(_merged(sorted(found, key=lambda r: (r.device, r.address))))


def _home(homes: Mapping[str, Entry], entry: Entry) -> Entry:
    home = homes.get(entry.name)
    if home is None or home.nbytes != entry.nbytes:
        raise ManifestMismatch(f"{entry.name} has no such tensor here", "plan the transfer first")
    return home


def _segments(footprints: Iterable[Footprint]) -> Iterator[Segment]:
    offset = 0
    for print_ in footprints:
        for address, nbytes in print_.runs():
            yield Segment(offset, address, nbytes, print_.device)
            offset += nbytes


def _merged(found: list[Region]) -> Iterator[Region]:
    """Overlapping regions become one; touching ones too where they are one allocation of a device."""
    if not found:
        return
    open_ = found[0]
    for region in itertools.islice(found, 1, None):
        end = open_.address + open_.nbytes
        touches = region.address <= end if region.device != "cpu" else region.address < end
        if region.device == open_.device and touches:
            nbytes = max(end, region.address + region.nbytes) - open_.address
            open_ = Region(open_.address, nbytes, open_.device)
        else:
            yield open_
            open_ = region
    yield open_
