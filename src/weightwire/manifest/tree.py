"""Every tensor that a module tree holds, by name. Reads; changes nothing; looks at no bytes.

A module object has *one* canonical path: the construction-time one where it is known, else the path with the fewest
components (the first in traversal order among equals). Its other paths, which alias wiring makes, are no names.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from weightwire.errors import CatalogueError

MAX_CONTAINER_DEPTH = 32
_OWN_ATTRIBUTES = frozenset(nn.Module().__dict__)
_PLAIN = (str, bytes, int, float, complex, type(None))


class Origin(enum.IntEnum):
    """How a module holds a tensor, in the order in which a name is preferred."""

    PARAMETER = 0
    BUFFER = 1
    TRANSIENT = 2
    """A buffer with ``persistent=False``."""
    ATTRIBUTE = 3
    """A plain attribute, or inside a container that is one."""


@dataclass(frozen=True, slots=True)
class Slot:
    """One place where a module holds a tensor, or ``None`` instead of a parameter or buffer.

    Attributes:
        name: canonical full name: ``path.attr``, ``path.attr[key]``.
        attribute: the full name without the part in brackets.
        local: the attribute's name on its module.
        origin: see :class:`Origin`.
        module: the holder.
        tensor: what is held.
    """

    name: str
    attribute: str
    local: str
    origin: Origin
    module: nn.Module
    tensor: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Hidden:
    """A module that is held as a plain attribute: its tensors are only seen if it is also in the tree."""

    name: str
    attribute: str
    local: str
    holder: nn.Module
    module: nn.Module


def module_paths(root: nn.Module, known: Sequence[str] = ()) -> dict[str, nn.Module]:
    """Canonical path -> module, each module object once.

    Args:
        root: has the path ``""``.
        known: canonical paths at construction; they win where they still lead to a module.
    """
    named: dict[int, str] = {}
    found: dict[str, nn.Module] = {}
    for path in known:
        module = _resolve(root, path)
        if module is not None and id(module) not in named:
            named[id(module)] = path
            found[path] = module
    shortest = _shortest(root)
    fresh = {path: module for path, module in shortest.items() if id(module) not in named and path not in found}
    return found | _in_traversal_order(fresh) if found else _in_traversal_order(shortest)


def slots(paths: Mapping[str, nn.Module]) -> Iterator[Slot | Hidden]:
    """Everything held, registered tensors of all modules first, then plain attributes; in traversal order.

    Raises:
        CatalogueError: a container is nested too deep, or holds tensors under keys that give no name.
    """
    for path, module in paths.items():
        yield from _registered(path, module)
    for path, module in paths.items():
        yield from _attributes(path, module)


def _resolve(root: nn.Module, path: str) -> nn.Module | None:
    module: nn.Module | None = root
    for part in path.split(".") if path else ():
        module = module._modules.get(part) if module is not None else None  # noqa: SLF001  (the registry itself)
    return module


def _shortest(root: nn.Module) -> dict[str, nn.Module]:
    """Breadth first: every object under its shortest path, cycles included."""
    found, seen, level = {"": root}, {id(root)}, {"": root}
    while level:
        following: dict[str, nn.Module] = {}
        for path, module in level.items():
            for name, child in module._modules.items():  # noqa: SLF001  (named_children drops duplicates and None)
                if child is not None and id(child) not in seen:
                    seen.add(id(child))
                    following[_join(path, name)] = child
        found |= following
        level = following
    return found


def _in_traversal_order(found: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Depth first, children in the order in which they were registered."""
    ordered: dict[str, nn.Module] = {}
    stack = [(path, module) for path, module in reversed(found.items())]
    while stack:
        path, module = stack.pop()
        if path in ordered:
            continue
        ordered[path] = module
        children = ((_join(path, name), child) for name, child in module._modules.items())  # noqa: SLF001
        own = [(name, child) for name, child in children if child is not None and found.get(name) is child]
        stack.extend(reversed(own))
    return ordered


def _registered(path: str, module: nn.Module) -> Iterator[Slot]:
    transient = module._non_persistent_buffers_set  # noqa: SLF001  (the only record of it)
    for local, tensor in module._parameters.items():  # noqa: SLF001  (named_parameters drops ties and None)
        name = _join(path, local)
        yield Slot(name, name, local, Origin.PARAMETER, module, tensor)
    for local, buffer in module._buffers.items():  # noqa: SLF001  (as above)
        name = _join(path, local)
        yield Slot(name, name, local, Origin.TRANSIENT if local in transient else Origin.BUFFER, module, buffer)


def _attributes(path: str, module: nn.Module) -> Iterator[Slot | Hidden]:
    for local, value in module.__dict__.items():
        if local in _OWN_ATTRIBUTES or isinstance(value, _PLAIN):
            continue
        attribute = _join(path, local)
        for name, held in _contents(value, attribute, 0, set()):
            if isinstance(held, torch.Tensor):
                yield Slot(name, attribute, local, Origin.ATTRIBUTE, module, held)
            else:
                yield Hidden(name, attribute, local, module, held)


def _contents(value: object, name: str, depth: int, seen: set[int]) -> Iterator[tuple[str, torch.Tensor | nn.Module]]:
    if isinstance(value, torch.Tensor | nn.Module):
        yield name, value
        return
    if id(value) in seen:  # a cycle, or a second way to the same container
        return
    seen.add(id(value))
    for key, item in _items(value):
        if isinstance(item, _PLAIN):
            continue
        if depth >= MAX_CONTAINER_DEPTH:
            raise CatalogueError(
                f"{name} is nested deeper than {MAX_CONTAINER_DEPTH}", "hold tensors in flatter containers"
            )
        found = list(_contents(item, f"{name}[{key}]", depth + 1, seen))
        if found and not isinstance(key, str | int):
            raise CatalogueError(
                f"{name} holds tensors under a key of type {type(key).__name__}", "use text or numbers"
            )
        yield from found


def _items(value: object) -> Iterator[tuple[Any, object]]:
    """Key and item of the containers that are walked; nothing for any other object."""
    if isinstance(value, Mapping):
        yield from value.items()
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        yield from zip(value._fields, value, strict=True)
    elif isinstance(value, list | tuple):
        yield from enumerate(value)
    elif isinstance(value, AbstractSet):
        yield from ((item, item) for item in value)  # a tensor as its own key is refused by name


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
