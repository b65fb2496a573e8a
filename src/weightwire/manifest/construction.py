"""What a module looked like when it was constructed, by name: taken before storage is bound and aliases are wired.

Works on the meta device. Holds text only, so it keeps nothing alive and survives ``to_empty``, which gives new tensor
objects and breaks ties and views into storages of their own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from weightwire.manifest.records import View
from weightwire.manifest.tree import Origin, Slot, module_paths, slots


@dataclass(frozen=True, slots=True, kw_only=True)
class ConstructionNames:
    """Canonical names at construction.

    Attributes:
        modules: canonical module paths in traversal order.
        names: all tensor names, in order of preference: registered ones first, then plain attributes.
        ties: name -> the first name of the same tensor or storage, for every name but the first.
        views: name -> (the name that contains it, how it lies there).
        absent: names of parameters and buffers that were ``None``, sorted.
    """

    modules: tuple[str, ...]
    names: tuple[str, ...]
    ties: Mapping[str, str] = field(default_factory=dict)
    views: Mapping[str, tuple[str, View]] = field(default_factory=dict)
    absent: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Seen:
    slot: Slot
    start: int
    extent: int
    dense: bool
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str


def capture(module: nn.Module) -> ConstructionNames:
    """Names and ties of ``module`` as constructed; call it before alias wiring, ``to_empty`` and loading.

    Ties are found by tensor object and by storage object, never by address, which is 0 on the meta device.

    Raises:
        CatalogueError: tensors are held where they have no name (see ``manifest.tree``).
    """
    with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001  (plain data of tensor subclasses)
        paths = module_paths(module)
        held = [slot for slot in slots(paths) if isinstance(slot, Slot)]
        ties, views = _relations(held)
    return ConstructionNames(
        modules=tuple(paths),
        names=tuple(slot.name for slot in held if slot.tensor is not None),
        ties=ties,
        views=views,
        absent=tuple(sorted(slot.name for slot in held if slot.tensor is None)),
    )


def _relations(held: list[Slot]) -> tuple[dict[str, str], dict[str, tuple[str, View]]]:
    storages: dict[int, list[_Seen]] = defaultdict(list)
    objects: dict[int, str] = {}
    ties: dict[str, str] = {}
    for slot in held:
        if slot.tensor is None:
            continue
        first = objects.setdefault(id(slot.tensor), slot.name)
        if first != slot.name:
            ties[slot.name] = first
        elif slot.tensor.layout == torch.strided:
            storages[slot.tensor.untyped_storage()._cdata].append(_seen(slot, slot.tensor))  # noqa: SLF001
    views: dict[str, tuple[str, View]] = {}
    for seen in storages.values():
        _relate(seen, ties, views)
    return {name: ties.get(first, first) for name, first in ties.items()}, views  # object, then storage


def _seen(slot: Slot, tensor: torch.Tensor) -> _Seen:
    item, sizes = tensor.element_size(), list(zip(tensor.shape, tensor.stride(), strict=True))
    extent = (1 + sum((n - 1) * s for n, s in sizes)) * item if tensor.numel() else 0
    return _Seen(
        slot,
        int(tensor.storage_offset()) * item,
        extent,
        extent == tensor.numel() * item,
        tuple(tensor.shape),
        tuple(tensor.stride()),
        str(tensor.dtype).removeprefix("torch."),
    )


def _relate(seen: list[_Seen], ties: dict[str, str], views: dict[str, tuple[str, View]]) -> None:
    """Ties and views within one storage; only a registered, gapless tensor contains others."""
    firsts: dict[tuple[object, ...], _Seen] = {}
    for one in seen:
        first = firsts.setdefault((one.start, one.shape, one.stride, one.dtype), one)
        if first is not one:
            ties[one.slot.name] = first.slot.name
    owners = [one for one in firsts.values() if one.dense and one.slot.origin is not Origin.ATTRIBUTE]
    owners.sort(key=lambda one: -one.extent)
    for one in firsts.values():
        owner = next((o for o in owners if o is not one and _contains(o, one)), None)
        if owner is not None:
            views[one.slot.name] = (owner.slot.name, _view(one, owner))


def _contains(owner: _Seen, one: _Seen) -> bool:
    inside = owner.start <= one.start and one.start + one.extent <= owner.start + owner.extent
    return inside and one.extent > 0 and owner.extent > one.extent


def _view(one: _Seen, owner: _Seen) -> View:
    return View(name=one.slot.name, dtype=one.dtype, shape=one.shape, stride=one.stride, offset=one.start - owner.start)
