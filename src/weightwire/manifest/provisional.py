"""The manifest of a shard that is still being read from a disk: the layout first, the digests leaf by leaf.

Both ends hold one: a source tells the digest of each leaf that is *final* (``manifest.finality``), a follower checks
what it reads against what it was told. Once every digest is known it gives an ordinary manifest, whose ids are
compared with those that the source publishes in the end; before that, nothing that was read counts as verified.
"""

from __future__ import annotations

import threading
from typing import Protocol

from weightwire.errors import ProtocolError
from weightwire.manifest.records import DIGEST_BYTES, Layout, Manifest

_ELSEWHERE = "another source, or the disk, is read"


class Expected(Protocol):
    """What a reader verifies against: a ``Manifest``, or a :class:`Provisional` as it grows."""

    @property
    def layout(self) -> Layout:
        """Of the shard."""
        ...

    @property
    def content_id(self) -> str:
        """Of what is read; empty while nobody knows it."""
        ...

    @property
    def digests(self) -> bytes | bytearray:
        """Leaf after leaf; those of leaves that a peer offered are known."""
        ...

    def digest(self, leaf: int) -> bytes:
        """Of one such leaf."""
        ...


class Provisional:
    """Thread-safe. A digest that is known never changes.

    Args:
        layout: of the shard; checked against our own, since its leaves are cut here.

    Attributes:
        layout: see there.
        digests: as ``Manifest.digests``; zeros where nothing is known yet. Read only what ``known`` names.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.digests = bytearray(len(layout.leaves) * DIGEST_BYTES)
        self._known = 0
        self._lock = threading.Lock()

    @property
    def content_id(self) -> str:
        """Empty: only the whole has one."""
        return ""

    @property
    def known(self) -> int:
        """The leaves whose digests are known, as bits."""
        return self._known

    @property
    def complete(self) -> bool:
        """Whether every leaf's digest is known."""
        return self._known == (1 << len(self.layout.leaves)) - 1

    def digest(self, leaf: int) -> bytes:
        """Digest of leaf number ``leaf``, which is known."""
        return bytes(self.digests[leaf * DIGEST_BYTES : (leaf + 1) * DIGEST_BYTES])

    def between(self, first: int, count: int) -> bytes:
        """Digests of ``count`` leaves from ``first`` on, all of them known."""
        return bytes(self.digests[first * DIGEST_BYTES : (first + count) * DIGEST_BYTES])

    def tell(self, first: int, digests: bytes) -> None:
        """The digests of the leaves from ``first`` on are known now; telling the same again changes nothing.

        Raises:
            ProtocolError: there are no such leaves, or one was told to have another digest: nothing was taken over.
        """
        count, odd = divmod(len(digests), DIGEST_BYTES)
        end = len(self.layout.leaves)
        if odd or not 0 <= first <= first + count <= end:
            raise ProtocolError(f"{len(digests)} digest bytes from leaf {first} on, of {end} leaves", _ELSEWHERE)
        with self._lock:
            self._refuse_others(first, count, digests)
            self.digests[first * DIGEST_BYTES : (first + count) * DIGEST_BYTES] = digests
            self._known |= ((1 << count) - 1) << first

    def manifest(self) -> Manifest:
        """The ordinary manifest.

        Raises:
            ProtocolError: a digest is missing.
        """
        if not self.complete:
            missing = len(self.layout.leaves) - self._known.bit_count()
            raise ProtocolError(f"the digests of {missing} leaves were never told", _ELSEWHERE)
        return Manifest(layout=self.layout, digests=bytes(self.digests))

    def _refuse_others(self, first: int, count: int, digests: bytes) -> None:
        told = (self._known >> first) & ((1 << count) - 1)
        if not told:
            return
        for at in range(count):
            begin = at * DIGEST_BYTES
            if told >> at & 1 and self.digest(first + at) != digests[begin : begin + DIGEST_BYTES]:
                raise ProtocolError(f"leaf {first + at} was final with another digest before", _ELSEWHERE)
