"""The logical description of a shard: pure data, equal for equal weights, hashed into the content id.

A :class:`Layout` says *what* a shard consists of and how its bytes are cut into leaves; it holds no bytes, no
addresses and no digests, so a target can make its own before anything arrives. A :class:`Manifest` is a layout plus
the digest of every leaf. Where the bytes lie in some process's memory is the *binding* (``manifest.address``), which is
never hashed.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from weightwire.manifest.sharding import Sharding
from weightwire.types import Json, Span, State, TensorClass

if TYPE_CHECKING:
    from weightwire.manifest.text import Text

DIGEST_BYTES = 16
"""Bytes of one leaf digest (``manifest.digest``)."""

BLOCK_BYTES = 64 * 1024
"""What a leaf's bytes are hashed by; a digest is taken over these hashes."""

FORMAT = "weightwire.manifest.v1"
"""Enters every content id: a change of leaf rule, digest or field meaning changes it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """A name that shows part of an entry's bytes: sent once, with the entry, and restored as a reference.

    Attributes:
        name: construction-time path of the view.
        dtype: torch name without the prefix, such as ``bfloat16``.
        shape: sizes of the view.
        stride: strides of the view in elements of its dtype.
        offset: bytes from the first byte of the entry to the first element of the view.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One tensor whose bytes travel.

    Attributes:
        name: canonical name, the construction-time path (before any alias wiring).
        dtype: torch name without the prefix, such as ``bfloat16``.
        shape: sizes; a zero-element shape is legal and has no bytes.
        order: dimensions from slowest to fastest varying in memory; ``(0, 1, …)`` for a contiguous tensor. The
            entry's bytes are its elements in this order, without gaps, whatever the strides are.
        kind: ``WEIGHT`` or ``DERIVED``; runtime tensors are in no layout.
        nbytes: number of elements times element size.
        aliases: further names of the same bytes (ties, alias paths), sorted.
        views: names that show a part of these bytes, sorted by name.
        sharding: which parts of the whole model's tensors it is made of, where its module declares that. In no id.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    order: tuple[int, ...]
    kind: TensorClass
    nbytes: int
    aliases: tuple[str, ...] = ()
    views: tuple[View, ...] = ()
    sharding: Sharding | None = None


@dataclass(frozen=True, slots=True)
class Leaf:
    """The unit of digest: at most 1 MiB of one large entry, or several whole small ones.

    Attributes:
        span: its bytes in the shard's logical byte string.
        kind: class of every byte in it.
    """

    span: Span
    kind: TensorClass


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What a shard consists of. Build it with ``catalogue(...)`` or from the wire, never by hand in production code.

    Attributes:
        entries: in canonical order (``manifest.leaves.canonical_order``); their bytes, concatenated in this order,
            are the shard's *logical byte string*.
        state: declared non-tensor state by module path.
        absent: names that exist as optional parameters or buffers but are ``None`` here, sorted: None-ness is state.
    """

    entries: tuple[Entry, ...]
    state: State = field(default_factory=dict)
    absent: tuple[str, ...] = ()

    @functools.cached_property
    def leaves(self) -> tuple[Leaf, ...]:
        """The leaves, in order of their offsets; a pure function of the entries."""
        from weightwire.manifest.leaves import cut  # noqa: PLC0415  (leaves needs Entry and Leaf from here)

        return cut(self.entries)

    @functools.cached_property
    def nbytes(self) -> int:
        """Length of the logical byte string."""
        return sum(entry.nbytes for entry in self.entries)

    @functools.cached_property
    def weight_leaves(self) -> int:
        """How many leaves are of class weight; they come first."""
        return sum(leaf.kind is TensorClass.WEIGHT for leaf in self.leaves)

    @functools.cached_property
    def digest(self) -> str:
        """64 hex digits over everything but the bytes: two ends of a read mean the same offsets if theirs are equal."""
        return hashlib.sha256((self.text.content_id(b"") + self.text.derived_id(b"")).encode()).hexdigest()

    @functools.cached_property
    def text(self) -> Text:
        """All of it as text: layouts with equal texts are equal."""
        from weightwire.manifest.text import write  # noqa: PLC0415  (likewise)

        return write(self)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A layout and the digest of each of its leaves.

    Attributes:
        layout: see :class:`Layout`.
        digests: ``len(layout.leaves) * DIGEST_BYTES`` bytes, leaf after leaf; none in a *provisional* manifest, of a
            shard that is still being read from a disk: it verifies nothing, and its content id is nobody's.
    """

    layout: Layout
    digests: bytes

    @property
    def provisional(self) -> bool:
        """Whether there are no digests yet (``manifest.provisional``)."""
        return not self.digests and self.layout.nbytes > 0

    def digest(self, leaf: int) -> bytes:
        """Digest of leaf number ``leaf``."""
        return self.digests[leaf * DIGEST_BYTES : (leaf + 1) * DIGEST_BYTES]

    @functools.cached_property
    def content_id(self) -> str:
        """64 hex digits: equal for equal weights of one shard, whoever serves them and however."""
        end = self.layout.weight_leaves * DIGEST_BYTES
        return self.layout.text.content_id(self.digests[:end])

    @functools.cached_property
    def derived_id(self) -> str:
        """64 hex digits over the derived part, which differs innocently between replicas."""
        start = self.layout.weight_leaves * DIGEST_BYTES
        return self.layout.text.derived_id(self.digests[start:])


def weights_id(content_ids: Mapping[str, str]) -> str:
    """Digest over the content ids of *all* ranks of a replica.

    Args:
        content_ids: rank label (``Coordinates.label()`` and role) -> content id; every rank of the replica.
    """
    return hashlib.sha256(canonical({"format": FORMAT, "ranks": dict(content_ids)})).hexdigest()


def canonical(value: Json) -> bytes:
    """The one JSON text of ``value``, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()
