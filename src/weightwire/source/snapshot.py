"""Copy-on-transform: published raw bytes never move and never change while the model goes on to transform itself.

Readers were told the addresses of the *original* storages, so those stay. Before a module's transform, every storage
that it may change in place is cloned and all tensors on it (views and aliases anywhere in the model too) are re-pointed
to the clone. Afterwards a clone that did not change is dropped and the tensors return to the original. What a transform
*replaces* is left alone: the original lives on because the publication holds it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

Effect = Literal["in_place", "replaces"]


@dataclass(kw_only=True)
class Held:
    """Bytes that exist a second time because readers may still want the raw ones.

    Attributes:
        in_place: of storages that a transform changed in place.
        replaced: of tensors that a transform replaced.
        peak_clone: most bytes of clones alive at one time beyond what stayed.
    """

    in_place: int = 0
    replaced: int = 0
    peak_clone: int = 0

    @property
    def nbytes(self) -> int:
        """All that is held now."""
        return self.in_place + self.replaced

    def released(self) -> None:
        """The publication let go of the originals."""
        self.in_place = self.replaced = 0


@dataclass(kw_only=True)
class Snapshot:
    """The guard around transforms of one published model. Not thread-safe: transforms run on one thread.

    Args (fields):
        model: the published module; its tensors are found anew at each guard, so that aliases made later count.
        published: data pointers of the storages that readers may read.
        foreign: transforms are not ours. They may keep addresses where nobody sees them (kernels do), so tensors
            stay on their copies even where nothing changed; and each makes aliases in its own module alone, so the
            model is walked once and not at each guard.
    """

    model: nn.Module
    published: frozenset[int]
    held: Held = field(default_factory=Held)
    foreign: bool = False
    _index: dict[int, list[torch.Tensor]] | None = None

    @contextlib.contextmanager
    def guard(self, module: nn.Module, *, writes: bool = True) -> Iterator[None]:
        """Run one module's transform inside.

        Which storages it may change is what ``module.transform_effect()`` declares; a module that declares nothing may
        change anything below it.

        Args:
            module: whose transform runs.
            writes: whether it may write into tensors at all; one that only replaces them needs no copy.
        """
        before = own_tensors(module)
        raw = {name: _Place.of(tensor) for name, tensor in before.items() if _pointer(tensor) in self.published}
        clones = self._detach(_may_change(module, before)) if writes else []
        try:
            yield
        finally:
            counted = self._settle(clones)
            kept = {clone.original.data_ptr(): clone.copy.data_ptr() for clone in clones}
            after = own_tensors(module)
            self._learn(module)
            self.held.replaced += sum(
                place.nbytes
                for name, place in raw.items()
                if place.pointer not in counted and place.left(after.get(name), kept) and not self._lives_on(place)
            )

    def _lives_on(self, place: _Place) -> bool:
        """Whether the model still uses that storage: only a view of it was replaced."""
        return place.partial and bool(self._users({place.pointer})[place.pointer])

    def _detach(self, tensors: list[torch.Tensor]) -> list[_Clone]:
        pointers = {_pointer(tensor) for tensor in tensors} & self.published
        if not pointers:
            return []
        clones = [_Clone.of(group) for group in self._users(pointers).values() if group]
        self.held.peak_clone = max(self.held.peak_clone, sum(clone.nbytes for clone in clones))
        return clones

    def _users(self, pointers: set[int]) -> dict[int, list[torch.Tensor]]:
        """All tensors on those storages."""
        if self._index is None:
            index: dict[int, list[torch.Tensor]] = {}
            for tensor in _all_tensors(self.model):
                if _pointer(tensor) in self.published:
                    index.setdefault(_pointer(tensor), []).append(tensor)
            if not self.foreign:
                return {pointer: index.get(pointer, []) for pointer in pointers}
            self._index = index
        return {
            pointer: [tensor for tensor in self._index.get(pointer, []) if _pointer(tensor) == pointer]
            for pointer in pointers
        }

    def _learn(self, module: nn.Module) -> None:
        """Note what the module's transform made, where the model is walked only once."""
        if self._index is None:
            return
        for tensor in _all_tensors(module):
            users = self._index.setdefault(_pointer(tensor), []) if _pointer(tensor) in self.published else None
            if users is not None and not any(tensor is known for known in users):
                users.append(tensor)

    def _settle(self, clones: list[_Clone]) -> set[int]:
        """Pointers of the originals that were counted."""
        unchanged: dict[int, _Clone] = {}
        counted: set[int] = set()
        for clone in clones:
            if clone.used() if self.foreign else clone.changed():
                self.held.in_place += clone.nbytes
                counted.add(clone.original.data_ptr())
            elif not self.foreign:
                clone.revert()
                unchanged[clone.copy.data_ptr()] = clone
        for tensor in _all_tensors(self.model) if unchanged else ():
            if _pointer(tensor) in unchanged:  # an alias that the transform made
                _repoint(tensor, unchanged[_pointer(tensor)].original)
        return counted


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor was before its module's transform; the transform may give the same object other memory."""

    pointer: int
    nbytes: int
    partial: bool
    """It does not fill its storage."""

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Place:
        nbytes = _bytes_of(tensor)
        return cls(_pointer(tensor), nbytes, nbytes < tensor.untyped_storage().nbytes())

    def left(self, now: torch.Tensor | None, clones: Mapping[int, int]) -> bool:
        """Whether ``now`` is neither there nor in the clone of it (``clones``: pointer of original -> of clone)."""
        return now is None or _pointer(now) not in (self.pointer, clones.get(self.pointer))


@dataclass(frozen=True, kw_only=True)
class _Clone:
    """One storage's clone and the tensors that were re-pointed to it."""

    original: torch.UntypedStorage
    copy: torch.UntypedStorage
    users: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, users: list[torch.Tensor]) -> _Clone:
        original = users[0].untyped_storage()
        copy: torch.UntypedStorage = original.clone()  # type: ignore[no-untyped-call]
        clone = cls(original=original, copy=copy, users=tuple(users))
        for tensor in users:
            _repoint(tensor, clone.copy)
        return clone

    @property
    def nbytes(self) -> int:
        return self.original.nbytes()

    def changed(self) -> bool:
        return not torch.equal(_bytes(self.original), _bytes(self.copy))

    def used(self) -> bool:
        """Whether a tensor that was re-pointed to the copy is still there."""
        return any(_pointer(tensor) == self.copy.data_ptr() for tensor in self.users)

    def revert(self) -> None:
        for tensor in self.users:
            if _pointer(tensor) == self.copy.data_ptr():  # a transform may have re-pointed it elsewhere meanwhile
                _repoint(tensor, self.original)


def storages(tensors: Iterable[torch.Tensor]) -> frozenset[int]:
    """Data pointers of the storages that ``tensors`` lie in."""
    return frozenset(map(_pointer, tensors))


def _repoint(tensor: torch.Tensor, storage: torch.UntypedStorage) -> None:
    with torch.no_grad():
        fresh = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        tensor.data = fresh.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())


def _may_change(module: nn.Module, own: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    declare = getattr(module, "transform_effect", None)
    if declare is None:
        return [tensor for child in module.modules() for tensor in own_tensors(child).values()]
    effects: Mapping[str, Effect] = declare()
    return [own[name] for name, effect in effects.items() if effect == "in_place" and name in own]


def own_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters, buffers and plain tensor attributes of this module alone, by attribute."""
    held = (*module._parameters.items(), *module._buffers.items(), *vars(module).items())  # noqa: SLF001
    return {name: value for name, value in held if isinstance(value, torch.Tensor)}


def _all_tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    seen: set[int] = set()
    for module in model.modules():
        for value in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):  # noqa: SLF001
            for tensor in _inside(value):
                if id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield tensor


def _inside(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _inside(item)
    elif isinstance(value, dict) and all(isinstance(key, (str, int)) for key in value):
        for item in value.values():
            if not isinstance(item, (nn.Module, nn.Parameter)):
                yield from _inside(item)


def _bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _bytes_of(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _pointer(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
