"""What differs between two documents, field by field. Pure."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from weightwire.cli.documents import Document
from weightwire.manifest.records import Entry, Layout, Manifest

FIELDS = ("dtype", "shape", "order", "kind", "nbytes", "aliases", "views")


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One thing that is not the same.

    Attributes:
        part: ``identity``, ``tensor``, ``state``, ``absent``, ``bytes`` or ``about``.
        name: the field, tensor or module.
        field: which of its properties; may be empty.
        left: value in the first document, as text; ``-`` where it is missing.
        right: value in the second.
        matters: whether shards that differ so cannot stand in for each other.
    """

    part: str
    name: str
    field: str
    left: str
    right: str
    matters: bool = True


def differences(left: Document, right: Document) -> list[Difference]:
    """Everything that differs, identities first, then what they describe, then the bytes."""
    found: list[Difference] = []
    if left.identity is not None and right.identity is not None:
        found += [
            Difference(
                part="identity", name=each.field, field="", left=each.ours, right=each.theirs, matters=each.hashed
            )
            for each in left.identity.explain(right.identity)
        ]
    if left.manifest is not None and right.manifest is not None:
        found += _manifests(left.manifest, right.manifest)
    return found


def comparable(left: Document, right: Document) -> list[str]:
    """Which parts both documents have: ``identity``, ``manifest``."""
    return [part for part in ("identity", "manifest") if getattr(left, part) and getattr(right, part)]


def _manifests(left: Manifest, right: Manifest) -> Iterator[Difference]:
    yield from _entries(left.layout, right.layout)
    yield from _mappings("state", dict(left.layout.state), dict(right.layout.state))
    for name in sorted(set(left.layout.absent) ^ set(right.layout.absent)):
        here = name in left.layout.absent
        yield Difference(
            part="absent", name=name, field="", left="None" if here else "-", right="-" if here else "None"
        )
    if left.layout.entries == right.layout.entries:
        yield from _bytes(left, right)


def _entries(left: Layout, right: Layout) -> Iterator[Difference]:
    ours, theirs = ({entry.name: entry for entry in layout.entries} for layout in (left, right))
    for name in dict.fromkeys([*ours, *theirs]):
        if name not in ours or name not in theirs:
            sides = [_summary(side.get(name)) for side in (ours, theirs)]
            yield Difference(part="tensor", name=name, field="", left=sides[0], right=sides[1])
            continue
        for field in FIELDS:
            values = getattr(ours[name], field), getattr(theirs[name], field)
            if values[0] != values[1]:
                yield Difference(part="tensor", name=name, field=field, left=_text(values[0]), right=_text(values[1]))


def _summary(entry: Entry | None) -> str:
    return "-" if entry is None else f"{entry.dtype} {_text(entry.shape)}"


def _mappings(part: str, left: dict[str, Any], right: dict[str, Any]) -> Iterator[Difference]:
    for name in dict.fromkeys([*left, *right]):
        if left.get(name) != right.get(name):
            yield Difference(part=part, name=name, field="", left=_text(left.get(name)), right=_text(right.get(name)))


def _bytes(left: Manifest, right: Manifest) -> Iterator[Difference]:
    """Tensors in whose leaves the bytes differ. A leaf may hold several small tensors: each of them is named."""
    different = [n for n in range(len(left.layout.leaves)) if left.digest(n) != right.digest(n)]
    spans = [left.layout.leaves[n].span for n in different]
    at = offset = 0
    for entry in left.layout.entries:
        begin, offset = offset, offset + entry.nbytes
        while at < len(spans) and spans[at].end <= begin:
            at += 1
        reached = itertools.takewhile(lambda n: spans[n].offset < offset, range(at, len(spans)))  # noqa: B023  (used at once)
        touched = [different[n] for n in reached]
        if touched and entry.nbytes:
            digests = [manifest.digest(touched[0]).hex()[:12] + "…" for manifest in (left, right)]
            yield Difference(part="bytes", name=entry.name, field=_leaves(touched), left=digests[0], right=digests[1])


def _leaves(numbers: list[int]) -> str:
    return f"leaf {numbers[0]}" if len(numbers) == 1 else f"{len(numbers)} leaves from {numbers[0]}"


def _text(value: Any) -> str:
    if value is None or value in ((), ""):
        return "-"
    if isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
        return f"{len(value)}: {', '.join(str(each.name) for each in value)}"
    return str(value)
