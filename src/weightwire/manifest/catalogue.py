"""What a module consists of: its layout, and the tensors that the layout stands for. Taken once, at its stage.

Names are the construction-time ones (:func:`~weightwire.manifest.construction.capture`), so alias wiring and storage
binding change nothing. Tensors are grouped by the bytes that they cover; ties and views travel once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from weightwire.errors import CatalogueError
from weightwire.manifest import state as declared
from weightwire.manifest.address import AddressSpace
from weightwire.manifest.binding import bind
from weightwire.manifest.classes import Classifier
from weightwire.manifest.collection import no_collection
from weightwire.manifest.construction import ConstructionNames, capture
from weightwire.manifest.declared_sharding import ShardDeclarations
from weightwire.manifest.footprint import Footprint, measure
from weightwire.manifest.leaves import canonical_order
from weightwire.manifest.naming import Named, Stale, name_groups
from weightwire.manifest.plan import MAX_NAME_CHARS
from weightwire.manifest.records import Layout
from weightwire.manifest.relations import Member, relate
from weightwire.manifest.tree import Hidden, Origin, Slot, module_paths, slots
from weightwire.types import State, TensorClass

POISON = 0xA5
_COMPARE_BYTES = 16 << 20

__all__ = ["Catalogue", "ConstructionNames", "Mirror", "Saved", "capture", "catalogue"]


@dataclass(frozen=True, slots=True)
class Mirror:
    """A storage that shows bytes of an entry without sharing them: a tie or view that ``to_empty`` broke.

    Attributes:
        entry: canonical name of the entry.
        name: the name that the mirror is held under.
        tensor: bytes of the mirror, ``uint8``, shape ``shape + (item size,)``.
        primary: the same elements in the entry's own memory.
    """

    entry: str
    name: str
    tensor: torch.Tensor
    primary: torch.Tensor


@dataclass(frozen=True, slots=True)
class Saved:
    """Copies of some entries' bytes, by name; ``nbytes`` says what they cost."""

    copies: Mapping[str, torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Memory held."""
        return sum(copy.numel() for copy in self.copies.values())


class Catalogue:
    """The tensors of one module at one stage. Holds them, so their memory stays valid while it lives.

    Attributes:
        layout: what the module consists of.
        tensors: plain tensor of every entry by canonical name, sharing the module's memory.
        mirrors: see :class:`Mirror`; no part of the layout.
        parameters: names of the entries that are parameters (not buffers or attributes).
    """

    def __init__(
        self,
        layout: Layout,
        tensors: Mapping[str, torch.Tensor],
        footprints: Mapping[str, Footprint],
        mirrors: tuple[Mirror, ...] = (),
        owners: object = None,
        parameters: frozenset[str] = frozenset(),
    ) -> None:
        self.layout = layout
        self.tensors = dict(tensors)
        self.footprints = dict(footprints)
        self.mirrors = mirrors
        self.owners = owners
        self.parameters = parameters

    @functools.cached_property
    def memory(self) -> AddressSpace:
        """This module's memory under its own layout's logical byte string."""
        return self._bound(self.layout)

    def bind(self, layout: Layout) -> AddressSpace:
        """This module's memory under ``layout``'s logical byte string; ``layout`` is one that ``plan`` accepted.

        Raises:
            ManifestMismatch: an entry of ``layout`` is none of this module's, or has another size.
        """
        return self.memory if layout is self.layout else self._bound(layout)

    @no_collection()
    def _bound(self, layout: Layout) -> AddressSpace:
        return bind(self.layout, self.footprints, self.tensors, layout)

    def declare(self, state: State) -> None:
        """Add state that the modules do not export themselves; legal before the layout is used.

        Args:
            state: as in ``Layout.state``; wins over what a module exports under the same path.
        """
        self.layout = dataclasses.replace(self.layout, state={**self.layout.state, **state})

    def restore_references(self) -> None:
        """Copy every entry to its mirrors; a target calls it once its entries are filled and verified."""
        for mirror in self.mirrors:
            mirror.tensor.copy_(mirror.primary)

    def check_mirrors(self) -> None:
        """A source calls it before it publishes.

        Raises:
            CatalogueError: names that were tied at construction hold different bytes; names both.
        """
        for mirror in self.mirrors:
            if not _equal(mirror.tensor, mirror.primary):
                raise CatalogueError(
                    f"{mirror.name} and {mirror.entry} were tied at construction but hold different bytes",
                    "apply the checkpoint's build facts (untie) before construction, or tie them again",
                )

    def apply_copies(self, copies: Iterable[tuple[str, str]]) -> None:
        """Carry out ``TransferPlan.copies`` on the filled and verified memory: (from entry, to entry) by name."""
        for source, destination in copies:
            self._bytes(destination).copy_(self._bytes(source))

    def poison(self, value: int = POISON) -> None:
        """Overwrite every covered byte, mirrors too, so that whatever is not filled afterwards shows (tests, debug)."""
        for name in self.footprints:
            self._bytes(name).fill_(value)
        for mirror in self.mirrors:
            mirror.tensor.fill_(value)

    def save(self, names: Iterable[str]) -> Saved:
        """Copy the bytes of the entries ``names``."""
        return Saved({name: self._bytes(name).clone() for name in names})

    def save_derived(self) -> Saved:
        """Copy the bytes of all derived entries, which a failed fill must give back."""
        return self.save(entry.name for entry in self.layout.entries if entry.kind is TensorClass.DERIVED)

    def restore(self, saved: Saved) -> None:
        """Write back what ``save`` or ``save_derived`` of this object copied, to mirrors too."""
        for name, copy in saved.copies.items():
            self._bytes(name).copy_(copy)
        for mirror in self.mirrors:
            if mirror.entry in saved.copies:
                mirror.tensor.copy_(mirror.primary)

    restore_derived = restore

    def _bytes(self, name: str) -> torch.Tensor:
        return self.footprints[name].bytes_at()


def catalogue(
    module: nn.Module, names: ConstructionNames | None = None, *, classes: Mapping[str, str] | None = None
) -> Catalogue:
    """Take the catalogue of ``module`` as it is now.

    Args:
        module: materialised; only read.
        names: what :func:`capture` gave at construction; without it names are made from the tree as it is.
        classes: tensor name or ``fnmatch`` pattern -> class, for callers who cannot edit the modules; wins over what
            modules declare in ``tensor_classes() -> dict[attribute, class]``.

    Raises:
        CatalogueError: something has no exact description: a tensor of no class, without plain bytes, overlapping in
            part, or sharing storage with runtime state. Names it.
    """
    with no_collection(), torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001  (plain data of subclasses)
        paths = module_paths(module, names.modules if names else ())
        held = _held(paths)
        classify = Classifier(classes or {})
        kinds = [classify(slot) for slot in held]
        stale = Stale(names)
        members = _members(held, kinds, stale)
        named = name_groups(relate(members), names, stale)
        absent = sorted(
            slot.name
            for slot, kind in zip(held, kinds, strict=True)
            if slot.tensor is None and kind is not TensorClass.RUNTIME
        )
        sharded = map(ShardDeclarations(), named)
        layout = Layout(entries=canonical_order(sharded), state=declared.collect(paths), absent=tuple(absent))
        return _assemble(layout, named)


def _held(paths: Mapping[str, nn.Module]) -> list[Slot]:
    """All slots; modules that hide in plain attributes are refused unless the tree holds them as well."""
    known = {id(module) for module in paths.values()}
    found = []
    for item in slots(paths):
        if not isinstance(item, Hidden):
            found.append(item)
        elif id(item.module) not in known and any(True for _ in (*item.module.parameters(), *item.module.buffers())):
            raise CatalogueError(
                f"{item.name} is a module that is no registered submodule", "register it, so that its tensors are seen"
            )
    for slot in found:
        if len(slot.name) > MAX_NAME_CHARS or not slot.name.isprintable():
            raise CatalogueError(f"tensor name {slot.name[:80]!r} is not plain text", "rename the attribute or key")
    return found


def _members(held: list[Slot], kinds: list[TensorClass | None], stale: Stale) -> list[Member]:
    """Everything that may travel: runtime state is left out together with whatever shares its storage."""
    runtime = {
        storage: slot.name
        for slot, kind in zip(held, kinds, strict=True)
        if kind is TensorClass.RUNTIME
        for storage in [_storage(slot)]
        if storage
    }
    members = []
    for rank, (slot, kind) in enumerate(zip(held, kinds, strict=True)):
        if slot.tensor is None or kind is TensorClass.RUNTIME or stale.skips(slot):
            continue
        footprint = measure(slot.name, slot.tensor)
        sharer = runtime.get(_storage(slot))
        if sharer is None:
            members.append(Member(rank, slot, _storage(slot), kind, footprint))
        elif kind is not None and footprint.nbytes:
            raise CatalogueError(
                f"{slot.name} shares a storage with {sharer}, which is runtime state", "give it a storage of its own"
            )
    return members


def _storage(slot: Slot) -> int:
    """Identity of the storage object; 0 for what has none."""
    if slot.tensor is None or slot.tensor.layout != torch.strided:
        return 0
    return int(slot.tensor.untyped_storage()._cdata)  # noqa: SLF001  (the storage object's identity)


def _assemble(layout: Layout, named: Iterable[Named]) -> Catalogue:
    tensors, footprints, mirrors, owners, parameters = {}, {}, [], [], set()
    for item in named:
        name, tensor = item.entry.name, item.primary.slot.tensor
        assert tensor is not None
        tensors[name], footprints[name] = tensor.detach(), item.primary.footprint
        if item.primary.slot.origin is Origin.PARAMETER:
            parameters.add(name)
        for mirror in item.mirrors:
            owners.append(mirror.member.slot.tensor)
            primary = item.primary.footprint
            part = mirror.shown(primary).bytes_at()
            mirrors.append(Mirror(name, mirror.member.slot.name, mirror.member.footprint.bytes_at(), part))
    return Catalogue(layout, tensors, footprints, tuple(mirrors), owners, frozenset(parameters))


def _equal(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Compare bytes, a bounded piece at a time."""
    if left.numel() <= _COMPARE_BYTES or left.shape[0] == 1:
        return torch.equal(left, right.to(left.device))
    rows = max(1, _COMPARE_BYTES * left.shape[0] // left.numel())
    pieces = zip(_rows(left, rows), _rows(right, rows), strict=True)
    return all(_equal(one, other) for one, other in pieces)


def _rows(tensor: torch.Tensor, count: int) -> list[torch.Tensor]:
    return [tensor[at : at + count] for at in range(0, tensor.shape[0], count)]
