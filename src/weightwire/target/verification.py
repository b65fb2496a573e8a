"""What arrived, against what the manifest says of it."""

from __future__ import annotations

import threading

from weightwire.errors import DigestMismatch
from weightwire.manifest.address import AddressSpace
from weightwire.manifest.digest import LeafDigests, digest_leaves
from weightwire.manifest.host_digest import ArrivingDigests
from weightwire.manifest.provisional import Expected
from weightwire.manifest.records import DIGEST_BYTES
from weightwire.target.bounce import Bounce


class BadLeaf(DigestMismatch):
    """A leaf arrived with a wrong digest; ``leaf`` is its index in the layout."""

    def __init__(self, peer: str, leaf: int) -> None:
        self.leaf = leaf
        super().__init__(f"leaf {leaf} from {peer} does not have its digest", "it is fetched elsewhere")


class Verification:
    """The leaves of one pull. Safe to use from several threads.

    Args:
        manifest: what the bytes must be.
        extent: the leaves that may be asked about.
    """

    def __init__(self, manifest: Expected, extent: range) -> None:
        self._manifest, self._extent = manifest, extent
        self._making = threading.Lock()
        self._digests: LeafDigests | None = None

    def prepare(self, memory: AddressSpace) -> LeafDigests:
        """What digests the leaves in ``memory``, made once: where lanes connect meanwhile it costs them nothing."""
        with self._making:
            if self._digests is None:
                leaves = self._manifest.layout.leaves[self._extent.start : self._extent.stop]
                self._digests = LeafDigests(memory, leaves)
            return self._digests

    def arriving(self, memory: AddressSpace, leaves: range) -> ArrivingDigests | None:
        """What digests neighbouring leaves while they come, if anything can; for ``compare``."""
        return self.prepare(memory).arriving(self._within(leaves))

    def check(self, memory: AddressSpace, leaves: range, peer: str) -> None:
        """Digest ``leaves`` of ``memory`` and ``compare``."""
        self.compare(self.prepare(memory).of(self._within(leaves)), leaves, peer)

    def check_bounce(self, bounce: Bounce, leaves: range, peer: str) -> None:
        """The same for what arrived in a bounce buffer."""
        expected = self._manifest.layout.leaves[leaves.start : leaves.stop]
        self.compare(digest_leaves(bounce.memory, expected), leaves, peer)

    def compare(self, found: bytes, leaves: range, peer: str) -> None:
        """``found``, their digests one after the other, against the manifest.

        Raises:
            BadLeaf: the first leaf that differs; ``peer`` sent it.
        """
        if found != self._manifest.digests[leaves.start * DIGEST_BYTES : leaves.stop * DIGEST_BYTES]:
            for at, index in enumerate(leaves):
                if found[at * DIGEST_BYTES :][:DIGEST_BYTES] != self._manifest.digest(index):
                    raise BadLeaf(peer, index)

    def _within(self, leaves: range) -> range:
        return range(leaves.start - self._extent.start, leaves.stop - self._extent.start)
