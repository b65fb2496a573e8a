"""Host memory for a shard that has no module yet: bytes arrive and are verified here, beside what is in use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from weightwire.errors import CatalogueError
from weightwire.manifest.catalogue import Catalogue
from weightwire.manifest.footprint import measure
from weightwire.manifest.records import Entry, Layout

ALIGNMENT = 64
"""Bytes; every dtype's item size divides it."""


class Staging:
    """Memory for every entry of ``layout``, in one allocation; its content is undefined until it is filled.

    Args:
        layout: what will be held.

    Attributes:
        catalogue: to fill, to verify, and to publish from.
        tensors: every name of the layout, aliases and views too; ties share memory.

    Raises:
        CatalogueError: there is not enough memory, or a dtype that torch cannot make.
    """

    def __init__(self, layout: Layout) -> None:
        places = _places(layout.entries)
        size = places[-1][1] if places else 0
        try:
            arena = torch.empty(size, dtype=torch.uint8)
            parts = [
                arena[begin : begin + entry.nbytes] for entry, (begin, _) in zip(layout.entries, places, strict=True)
            ]
            made = {entry.name: _shaped(entry, part) for entry, part in zip(layout.entries, parts, strict=True)}
        except (RuntimeError, AttributeError) as error:  # what torch's allocator raises; a dtype of another torch
            reason = str(error).partition("\n")[0]
            raise CatalogueError(f"{size} bytes cannot be staged ({reason})", "free some host memory") from error
        self.catalogue = Catalogue(
            layout, made, {name: measure(name, tensor) for name, tensor in made.items()}, parameters=frozenset(made)
        )
        self.tensors: Mapping[str, torch.Tensor] = made | _others(layout.entries, made, parts)

    @property
    def nbytes(self) -> int:
        """Bytes of the shard."""
        return self.catalogue.layout.nbytes


def _places(entries: Sequence[Entry]) -> list[tuple[int, int]]:
    """Begin of each entry, and the end of its aligned room."""
    found, at = [], 0
    for entry in entries:
        end = at + -(-entry.nbytes // ALIGNMENT) * ALIGNMENT
        found.append((at, end))
        at = end
    return found


def _shaped(entry: Entry, part: torch.Tensor) -> torch.Tensor:
    dtype: torch.dtype = getattr(torch, entry.dtype)
    stride, reach = [0] * len(entry.shape), 1
    for dim in reversed(entry.order):
        stride[dim] = reach
        reach *= max(1, entry.shape[dim])
    return part.view(dtype).as_strided(entry.shape, stride)


def _others(
    entries: Sequence[Entry], made: Mapping[str, torch.Tensor], parts: Sequence[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Tensors under the names that are not canonical."""
    found: dict[str, torch.Tensor] = {}
    for entry, part in zip(entries, parts, strict=True):
        found.update(dict.fromkeys(entry.aliases, made[entry.name]))
        for view in entry.views:
            dtype: torch.dtype = getattr(torch, view.dtype)
            shown = part[view.offset :]
            found[view.name] = (
                shown[: shown.numel() // dtype.itemsize * dtype.itemsize]
                .view(dtype)
                .as_strided(view.shape, view.stride)
            )
    return found
