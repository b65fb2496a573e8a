"""What modules declare about the whole tensors that theirs are parts of, put into entries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from weightwire.errors import CatalogueError
from weightwire.manifest.naming import Named
from weightwire.manifest.records import Entry
from weightwire.manifest.sharding import Sharding, fault
from weightwire.types import TensorClass


class ShardDeclarations:
    """Gives each named tensor's entry, with what its module declares in ``tensor_shards()``, if anything.

    Raises (when called):
        CatalogueError: a declaration does not fit its tensor; names it.
    """

    def __init__(self) -> None:
        self._declared: dict[int, Mapping[str, Sharding]] = {}

    def __call__(self, item: Named) -> Entry:
        """The entry of ``item``. Derived tensors have none: each construction computes its own."""
        slot, entry = item.primary.slot, item.entry
        if entry.kind is not TensorClass.WEIGHT or slot.name != slot.attribute:
            return entry
        sharding = self._of(slot.module).get(slot.local)
        if sharding is None:
            return entry
        wrong = fault(sharding, entry.shape)
        if wrong:
            raise CatalogueError(
                f"the sharding declared for {entry.name} {wrong}", "correct tensor_shards() of its module"
            )
        return replace(entry, sharding=sharding)

    def _of(self, module: nn.Module) -> Mapping[str, Sharding]:
        found = self._declared.get(id(module))
        if found is None:
            method = getattr(type(module), "tensor_shards", None)  # a module's own getattr is slow where it fails
            found = method(module) if callable(method) else {}
            self._declared[id(module)] = found
        return found
