"""A manifest as it came from a peer: checked against the ids that it was published under, not yet taken apart.

In most loads both ends describe the same tensors in the same words (``manifest.text``). That is seen by comparing two
texts, and is the strictest check that there is; anything else is taken apart, checked and compared name by name.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from weightwire.errors import ProtocolError
from weightwire.manifest.collection import no_collection
from weightwire.manifest.plan import TransferPlan, check_digests, plan, validate_manifest
from weightwire.manifest.records import DIGEST_BYTES, Layout, Manifest
from weightwire.manifest.text import Text, read
from weightwire.types import State


@dataclass(frozen=True, kw_only=True)
class Offered:
    """What a stranger says of its shard.

    Attributes:
        text: of its layout; not looked at.
        state: declared state; checked.
        absent: names that are ``None`` there.
        weight_leaves: how many leaves are said to be of class weight.
        digests: as ``Manifest.digests``.
    """

    text: Text
    state: State
    absent: tuple[str, ...]
    weight_leaves: int
    digests: bytes

    @classmethod
    def of(cls, manifest: Manifest) -> Offered:
        """What is said of a manifest of ours."""
        layout = manifest.layout
        return cls(
            text=layout.text,
            state=layout.state,
            absent=layout.absent,
            weight_leaves=layout.weight_leaves,
            digests=manifest.digests,
        )

    @functools.cached_property
    def ids(self) -> tuple[str, str]:
        """Content and derived id."""
        end = self.weight_leaves * DIGEST_BYTES
        return self.text.content_id(self.digests[:end]), self.text.derived_id(self.digests[end:])

    @functools.cached_property
    def manifest(self) -> Manifest:
        """Taken apart and checked.

        Raises:
            ProtocolError: it is out of bounds or contradicts itself.
        """
        found = self.apart()
        self._check_classes(found)
        return found

    def apart(self, *, provisional: bool = False) -> Manifest:
        """Taken apart and checked, for a target that has no layout of its own; ``plan`` it before anything is read.

        Args:
            provisional: digests may be missing; then its leaves may be cut once its size was found to be right.

        Raises:
            ProtocolError: it is out of bounds or contradicts itself.
        """
        found = self._read()
        validate_manifest(found, provisional=provisional)
        return found

    def under(self, layout: Layout, *, provisional: bool = False) -> Manifest | None:
        """The manifest, where it says of everything what ``layout``, one of ours, says; else ``None``.

        Args:
            layout: in bounds; the manifest will hold this very object.
            provisional: digests may be missing.

        Raises:
            ProtocolError: it has not one digest for each leaf.
        """
        if self.text != layout.text:
            return None
        found = Manifest(layout=layout, digests=self.digests)
        check_digests(found, len(layout.leaves), provisional=provisional)
        self._check_classes(found)
        return found

    @no_collection()
    def plan(self, expected: Layout, *, provisional: bool = False) -> TransferPlan:
        """As ``plan.plan``, which see: how a target of layout ``expected`` is filled from this."""
        same = self.under(expected, provisional=provisional)
        if same is None:
            found = plan(expected, self._read(), provisional=provisional)
            self._check_classes(found.manifest)
            return found
        return TransferPlan(layout=expected, manifest=same, leaves=range(len(expected.leaves)), copies=())

    def _read(self) -> Manifest:
        return Manifest(
            layout=Layout(entries=read(self.text), state=self.state, absent=self.absent), digests=self.digests
        )

    def _check_classes(self, found: Manifest) -> None:
        """The ids were made with the digests split where the peer said."""
        if found.layout.weight_leaves != self.weight_leaves:
            raise ProtocolError(
                f"offered manifest has {self.weight_leaves} leaves of weights, which is not what its tensors give",
                "the peer is broken or of another version; use another source",
            )
