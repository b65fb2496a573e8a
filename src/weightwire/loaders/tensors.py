"""Tensors by name from whoever publishes a module that holds them, into host memory: no module is needed here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from weightwire.errors import LoadError, ManifestMismatch, MismatchError, WeightwireError
from weightwire.manifest.catalogue import Catalogue
from weightwire.manifest.dtypes import ITEM_BYTES
from weightwire.manifest.footprint import measure
from weightwire.manifest.records import Entry, Layout, View
from weightwire.target.offer import Offer
from weightwire.target.receiver import Receiver
from weightwire.target.report import LoadReport
from weightwire.types import TensorClass

_INTO_A_MODULE = "receive them into a module that takes them (weightwire.receive)"


@dataclass(frozen=True, kw_only=True)
class NamedTensors:
    """One rank's tensors as a peer published them, every byte verified.

    Attributes:
        tensors: all of class weight, in host memory, under every name that they have at the source: names of one tensor
            lead to one object, and a view shares the memory of what it is a view of.
        absent: names of optional tensors that are ``None`` at the source.
        derived: names of tensors that the source computes itself (rotary caches); these are not handed over.
        report: how they came.
    """

    tensors: Mapping[str, torch.Tensor]
    absent: tuple[str, ...] = ()
    derived: tuple[str, ...] = ()
    report: LoadReport = field(default_factory=LoadReport)


def take_tensors(receiver: Receiver, max_nbytes: int) -> NamedTensors:
    """Find what ``receiver`` wants, make room for just what is offered, and fill it. Use a receiver once.

    Args:
        receiver: of one rank; its ranks decide together.
        max_nbytes: nothing is allocated where more is offered to this rank.

    Raises:
        MismatchError: more is offered than that.
        ManifestMismatch: what is offered is more than tensors: declared state, build facts.
        LoadError: there is no memory for it.
        WeightwireError: as ``Receiver.find`` and ``Receiver.fill``; all ranks raise if one does.
    """
    offer = receiver.find()
    try:
        layout = _accepted(offer, max_nbytes)
        held = _allocated(layout)
        tensors = _by_name(layout, held)
    except WeightwireError as error:
        receiver.decline(error)
        raise
    report = receiver.fill(held)
    derived = [name for entry in layout.entries if entry.kind is TensorClass.DERIVED for name in _names(entry)]
    return NamedTensors(tensors=tensors, absent=layout.absent, derived=tuple(derived), report=report)


def _accepted(offer: Offer, max_nbytes: int) -> Layout:
    """The layout that is offered, if tensors by name are all that there is to it, and there is room for them."""
    layout = offer.offered.apart(provisional=bool(offer.choice.follow)).layout
    who = offer.header.coordinates.label()
    if layout.state:
        path = min(layout.state)
        raise ManifestMismatch(
            f"{who}: the source declares state of {path or 'the root module'}, which tensors by name do not carry",
            _INTO_A_MODULE,
        )
    if offer.header.build_facts:
        fact = min(offer.header.build_facts)
        raise ManifestMismatch(
            f"{who}: the source names the build fact {fact}, which tensors by name do not carry", _INTO_A_MODULE
        )
    if layout.nbytes > max_nbytes:
        raise MismatchError(
            f"{who}: {layout.nbytes} bytes of tensors are offered, more than the {max_nbytes} that are allowed",
            "allow more (max_nbytes) if that is what is wanted and there is memory for it, or ask for another source",
        )
    return layout


def _allocated(layout: Layout) -> Catalogue:
    """A tensor for every entry, as a catalogue of just this layout: there is no module to take one of."""
    try:
        tensors = {entry.name: _empty(entry) for entry in layout.entries}
    except RuntimeError as error:
        raise LoadError(
            f"no memory for {layout.nbytes} bytes of tensors", "free some, or use a larger machine"
        ) from error
    footprints = {name: measure(name, tensor) for name, tensor in tensors.items()}
    return Catalogue(layout, tensors, footprints, parameters=frozenset(tensors))


def _empty(entry: Entry) -> torch.Tensor:
    tensor = torch.empty([entry.shape[dim] for dim in entry.order], dtype=_dtype(entry))
    return tensor.permute([entry.order.index(dim) for dim in range(len(entry.order))])


def _by_name(layout: Layout, held: Catalogue) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for entry in layout.entries:
        if entry.kind is TensorClass.WEIGHT:
            tensor = held.tensors[entry.name]
            found |= dict.fromkeys((entry.name, *entry.aliases), tensor)
            found |= {view.name: _shown(view, tensor) for view in entry.views}
    return found


def _shown(view: View, tensor: torch.Tensor) -> torch.Tensor:
    offset, rest = divmod(view.offset, ITEM_BYTES[view.dtype])
    if rest:
        raise ManifestMismatch(f"{view.name} is a view that begins within an element", _INTO_A_MODULE)
    return torch.empty(0, dtype=_dtype(view)).set_(tensor.untyped_storage(), offset, view.shape, view.stride)


def _dtype(described: Entry | View) -> torch.dtype:
    found = getattr(torch, described.dtype, None)
    if not isinstance(found, torch.dtype):
        raise ManifestMismatch(f"{described.name} has dtype {described.dtype}, which torch lacks here", "update torch")
    return found


def _names(entry: Entry) -> tuple[str, ...]:
    return entry.name, *entry.aliases, *(view.name for view in entry.views)
