"""Which memory of this process a layout's logical byte string lies in."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping

import torch

from weightwire.errors import ManifestMismatch
from weightwire.manifest.address import AddressSpace, Columns, Region
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
    used = own.entries
    if layout is not own:
        homes = {name: entry for entry in own.entries for name in (entry.name, *entry.aliases)}
        used = tuple(_home(homes, entry) for entry in layout.entries)
    owners = [tensors[entry.name] for entry in used]
    return AddressSpace(_places(footprints[entry.name] for entry in used), regions(owners), owners)


def regions(tensors: Iterable[torch.Tensor]) -> list[Region]:
    """The whole storages that ``tensors`` lie in, disjoint, ascending; adjacent ones on a device are one."""
    found = set()
    for tensor in tensors:
        storage = tensor.untyped_storage()
        nbytes = storage.nbytes()
        if nbytes and tensor.numel():
            device = tensor.device
            label = "cpu" if device.type == "cpu" else f"{device.type}:{device.index or 0}"
            found.add((label, storage.data_ptr(), nbytes))
    return list(_merged([Region(address, nbytes, label) for label, address, nbytes in sorted(found)]))


def _home(homes: Mapping[str, Entry], entry: Entry) -> Entry:
    home = homes.get(entry.name)
    if home is None or home.nbytes != entry.nbytes:
        raise ManifestMismatch(f"{entry.name} has no such tensor here", "plan the transfer first")
    return home


def _places(footprints: Iterable[Footprint]) -> Columns:
    addresses: list[int] = []
    sizes: list[int] = []
    devices: list[str] = []
    for print_ in footprints:
        for address, nbytes in ((print_.address, print_.nbytes),) if print_.dense else print_.runs():
            if nbytes:
                addresses.append(address)
                sizes.append(nbytes)
                devices.append(print_.device)
    return Columns.of(addresses, sizes, devices)


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
