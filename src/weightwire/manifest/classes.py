"""Which class a tensor has: said by the caller, by its module, or by how it is held."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping

from torch import nn

from weightwire.errors import CatalogueError
from weightwire.manifest.tree import Origin, Slot
from weightwire.types import TensorClass

_DEFAULT = {
    Origin.PARAMETER: TensorClass.WEIGHT,
    Origin.BUFFER: TensorClass.WEIGHT,
    Origin.TRANSIENT: TensorClass.DERIVED,
}


class Classifier:
    """Gives the class of each slot, or ``None`` for a plain attribute that nobody classified.

    Args:
        classes: full name, or ``fnmatch`` pattern over full names, -> class. Full names win; then the first pattern
            that matches. A name covers the whole container that it holds.

    Raises:
        CatalogueError: a class that does not exist; names it.
    """

    def __init__(self, classes: Mapping[str, str]) -> None:
        self._exact = {name: _parse(name, kind) for name, kind in classes.items()}
        self._patterns = [
            (re.compile(fnmatch.translate(name)), kind) for name, kind in self._exact.items() if set(name) & set("*?[")
        ]
        self._declared: dict[int, dict[str, TensorClass]] = {}

    def __call__(self, slot: Slot) -> TensorClass | None:
        """The class of ``slot``."""
        for name in (slot.name, slot.attribute):
            if name in self._exact:
                return self._exact[name]
        for pattern, kind in self._patterns:
            if pattern.match(slot.name) or pattern.match(slot.attribute):
                return kind
        return self._by_module(slot.module).get(slot.local, _DEFAULT.get(slot.origin))

    def _by_module(self, module: nn.Module) -> dict[str, TensorClass]:
        found = self._declared.get(id(module))
        if found is None:
            method = getattr(type(module), "tensor_classes", None)  # a module's own getattr is slow where it fails
            declared = method(module) if callable(method) else {}
            found = {name: _parse(f"{type(module).__name__}.{name}", kind) for name, kind in declared.items()}
            self._declared[id(module)] = found
        return found


def _parse(name: str, kind: str) -> TensorClass:
    try:
        return TensorClass(kind)
    except ValueError as error:
        raise CatalogueError(f"{name} is declared {kind!r}", "use weight, derived or runtime") from error
