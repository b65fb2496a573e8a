"""Planning a transfer: what a target expects against what a source offers. Pure: no I/O, no torch.

Every difference is found before the first byte moves. What comes from a peer is checked against bounds first
(:func:`validate`), then against our own layout, name by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from weightwire.errors import ManifestMismatch, ProtocolError
from weightwire.manifest import state as declared
from weightwire.manifest.collection import no_collection
from weightwire.manifest.dtypes import ITEM_BYTES
from weightwire.manifest.leaves import canonical_order, count_leaves
from weightwire.manifest.orders import canonical_dims
from weightwire.manifest.records import DIGEST_BYTES, Entry, Layout, Manifest, View
from weightwire.manifest.sharding import fault
from weightwire.types import TensorClass

MAX_NAMES = 1 << 20
"""Names in one layout: entries, aliases, views and absent ones together."""
MAX_NAME_CHARS = 1024
MAX_DIMS = 64
MAX_SHARD_BYTES = 1 << 44
SHOWN = 3
"""How many of several differences a message spells out."""


@dataclass(frozen=True, kw_only=True)
class TransferPlan:
    """What to fetch and what to do with it.

    Attributes:
        layout: the *offered* layout: the leaves are the source's, and the target maps them to its own tensors.
        manifest: the offered manifest.
        leaves: indices of the leaves to fetch, in order: weight first, then derived.
        copies: (from entry, to entry) to carry out once everything is verified: what the source has tied and the
            target holds separately.
    """

    layout: Layout
    manifest: Manifest
    leaves: range
    copies: tuple[tuple[str, str], ...]


@no_collection()
def plan(expected: Layout, offered: Manifest, *, provisional: bool = False) -> TransferPlan:
    """Plan how a target of layout ``expected`` is filled from ``offered``, which may come from a stranger.

    ``provisional``: it may be a manifest that has no digests yet.

    Raises:
        ProtocolError: ``offered`` is out of bounds or contradicts itself.
        ManifestMismatch: names, dtypes, shapes, order, class, ties, views, ``None``-ness or declared state differ;
            names the first few.
    """
    validate_manifest(offered, provisional=provisional)
    layout = offered.layout
    compare_names(expected, layout)
    theirs = {name: entry for entry in layout.entries for name in (entry.name, *entry.aliases)}
    problems = [line for entry in expected.entries for line in _entry_problems(entry, theirs)]
    problems += _view_problems(expected, layout) + declared.differences(expected.state, layout.state)
    _refuse(problems)
    return TransferPlan(
        layout=layout, manifest=offered, leaves=range(len(layout.leaves)), copies=_copies(expected, theirs)
    )


def validate(layout: Layout) -> None:
    """Check that ``layout`` is within bounds and says one thing only.

    Raises:
        ProtocolError: it is not; nothing of a size that it claims was allocated.
    """
    names = sum(1 + len(entry.aliases) + len(entry.views) for entry in layout.entries) + len(layout.absent)
    _demand(names <= MAX_NAMES, f"has {names} names")
    for entry in layout.entries:
        _validate_entry(entry)
    _demand(sum(entry.nbytes for entry in layout.entries) <= MAX_SHARD_BYTES, "is larger than any shard")
    _demand(canonical_order(layout.entries) == tuple(layout.entries), "is not in canonical order")
    every = [*_all_names(layout), *layout.absent]
    for name in layout.absent:
        _validate_name(name)
    _demand(len(every) == len(set(every)), "has a name twice")
    _demand(tuple(sorted(layout.absent)) == tuple(layout.absent), "has unsorted absent names")
    declared.check(layout.state)


@no_collection()
def validate_manifest(manifest: Manifest, *, provisional: bool = False) -> None:
    """Check ``manifest`` and its layout; afterwards the leaves of one with digests may be cut.

    Args:
        manifest: from a stranger.
        provisional: it may be one. That has no digests that bound the number of its leaves: they may be cut once its
            layout was compared with our own.

    Raises:
        ProtocolError: it is out of bounds, or has not one digest for each leaf.
    """
    validate(manifest.layout)
    check_digests(manifest, count_leaves(manifest.layout.entries), provisional=provisional)


def check_digests(manifest: Manifest, leaves: int, *, provisional: bool = False) -> None:
    """The part of ``validate_manifest`` that is left for a layout in bounds, of ``leaves`` leaves."""
    have = len(manifest.digests)
    if not (provisional and manifest.provisional):
        _demand(have == leaves * DIGEST_BYTES, f"has {have} digest bytes, {leaves} leaves")


def compare_names(expected: Layout, offered: Layout) -> None:
    """Check that both sides have the same names, and the same ones without a tensor.

    Raises:
        ManifestMismatch: they have not; names the first few.
    """
    ours, theirs = set(_all_names(expected)), set(_all_names(offered))
    _refuse_none(set(expected.absent) & theirs, "is None here but a tensor at the source")
    _refuse_none(ours & set(offered.absent), "is None at the source but a tensor here")
    problems = []
    if ours - theirs:
        problems.append(f"only here: {_some(ours - theirs)}")
    if theirs - ours:
        problems.append(f"only at the source: {_some(theirs - ours)}")
    if problems:
        raise ManifestMismatch(
            f"tensor names differ, {'; '.join(problems)}", "build both sides from the same code, config and build facts"
        )
    one_sided = set(expected.absent) ^ set(offered.absent)
    _refuse_none(one_sided, "is an optional tensor (None) on one side and unknown on the other")


def _refuse_none(names: set[str], problem: str) -> None:
    if names:
        raise ManifestMismatch(
            f"{_some(names)} {problem}", "apply the source's declared state (import_state) or build both sides alike"
        )


def _entry_problems(entry: Entry, theirs: Mapping[str, Entry]) -> list[str]:
    group = (entry.name, *entry.aliases)
    homes = {theirs[name].name if name in theirs else "" for name in group}
    if "" in homes:
        view = next(name for name in group if name not in theirs)
        return [f"{view} is a tensor of its own here but a view at the source"]
    if len(homes) > 1:
        return [f"{' and '.join(group[:2])} are tied here, separate there: apply the source's build facts (untie)"]
    other = theirs[entry.name]
    if _described(entry) == _described(other):
        return []
    pairs = {
        "dtype": (entry.dtype, other.dtype),
        "shape": (list(entry.shape), list(other.shape)),
        "element order": (list(entry.order), list(other.order)),
        "class": (entry.kind.value, other.kind.value),
    }
    problems = [f"{entry.name} has {what} {a} here and {b} at the source" for what, (a, b) in pairs.items() if a != b]
    if entry.sharding != other.sharding and None not in (entry.sharding, other.sharding):
        problems.append(f"{entry.name} is another part of the whole tensor here than at the source")
    return problems


def _described(entry: Entry) -> tuple[object, ...]:
    return entry.dtype, entry.shape, entry.order, entry.kind, entry.sharding


def _view_problems(expected: Layout, offered: Layout) -> list[str]:
    theirs = {view.name: (entry, view) for entry in offered.entries for view in entry.views}
    problems = []
    for entry in expected.entries:
        for view in entry.views:
            other = theirs.get(view.name)
            if other is None:
                problems.append(f"{view.name} is a view here but a tensor of its own at the source")
            elif other[1] != view or entry.name not in (other[0].name, *other[0].aliases):
                problems.append(f"{view.name} shows other bytes of {entry.name} here than at the source")
    return problems


def _copies(expected: Layout, theirs: Mapping[str, Entry]) -> tuple[tuple[str, str], ...]:
    """Entries here whose bytes arrive under another entry, because the source has the two tied."""
    homes = {name: entry.name for entry in expected.entries for name in (entry.name, *entry.aliases)}
    pairs = ((homes[theirs[entry.name].name], entry.name) for entry in expected.entries)
    return tuple(sorted(pair for pair in pairs if pair[0] != pair[1]))


def _refuse(problems: list[str]) -> None:
    if problems:
        more = f" (and {len(problems) - SHOWN} more)" if len(problems) > SHOWN else ""
        raise ManifestMismatch(
            "; ".join(problems[:SHOWN]) + more, "give both sides the same model, dtype, parallel layout and build facts"
        )


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - SHOWN} more" if len(ordered) > SHOWN else ""
    return ", ".join(ordered[:SHOWN]) + more


def _all_names(layout: Layout) -> list[str]:
    return [name for e in layout.entries for name in (e.name, *e.aliases, *(view.name for view in e.views))]


def _validate_entry(entry: Entry) -> None:
    """Nothing is put into words for an entry that is right: there may be many thousand."""
    name = entry.name
    _validate_name(name)
    for other in (*entry.aliases, *(view.name for view in entry.views)):
        _validate_name(other)
    if not isinstance(entry.kind, TensorClass) or entry.kind is TensorClass.RUNTIME:
        raise _wrong(f"{name!r} has no class")
    count = _validate_shape(name, entry.dtype, entry.shape)
    if not _natural(entry.nbytes) or entry.nbytes != count * ITEM_BYTES[entry.dtype]:
        raise _wrong(f"{name!r} has the wrong size")
    _validate_order(entry)
    if sorted(entry.aliases) != list(entry.aliases):
        raise _wrong(f"{name!r} has unsorted aliases")
    if entry.sharding and (why := fault(entry.sharding, entry.shape)):
        raise _wrong(f"{name!r} has a sharding that {why}")
    if entry.views:
        names = [view.name for view in entry.views]
        if names != sorted(names):
            raise _wrong(f"{name!r} has unsorted views")
        for view in entry.views:
            _validate_view(entry, view)


def _validate_order(entry: Entry) -> None:
    shape, order = entry.shape, entry.order
    if len(order) != len(shape) or not all(map(_natural, order)) or sorted(order) != list(range(len(shape))):
        raise _wrong(f"{entry.name!r} has a bad order")
    if canonical_dims(shape, order) != tuple(order):
        raise _wrong(f"{entry.name!r} has no canonical order")


def _validate_view(entry: Entry, view: View) -> None:
    count = _validate_shape(view.name, view.dtype, view.shape)
    if len(view.stride) != len(view.shape) or not all(map(_natural, view.stride)):
        raise _wrong(f"{view.name!r} has bad strides")
    reach = 1 + sum((n - 1) * s for n, s in zip(view.shape, view.stride, strict=True)) if count else 0
    if not _natural(view.offset):
        raise _wrong(f"{view.name!r} has a bad offset")
    if view.offset + reach * ITEM_BYTES[view.dtype] > entry.nbytes:
        raise _wrong(f"{view.name!r} lies outside {entry.name!r}")


def _validate_shape(name: str, dtype: Any, shape: tuple[int, ...]) -> int:
    """Number of elements."""
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise _wrong(f"{name!r} has an unknown dtype")
    if len(shape) > MAX_DIMS or not all(map(_natural, shape)):
        raise _wrong(f"{name!r} has a bad shape")
    count = math.prod(shape)
    if count > MAX_SHARD_BYTES:
        raise _wrong(f"{name!r} is larger than any shard")
    return count


def _validate_name(name: Any) -> None:
    if not (isinstance(name, str) and 0 < len(name) <= MAX_NAME_CHARS and name.isprintable()):
        raise _wrong("has a name that is empty, too long or not plain text")


def _natural(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_SHARD_BYTES


def _demand(condition: bool, problem: str) -> None:
    if not condition:
        raise _wrong(problem)


def _wrong(problem: str) -> ProtocolError:
    return ProtocolError(f"offered manifest {problem}", "the peer is broken or of another version; use another source")
