"""Leaf digests of host memory: all blocks of many leaves in one call, by the compiled library where there is one."""

from __future__ import annotations

import ctypes
import itertools
import struct
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import xxhash

from weightwire.manifest import xxhash_blocks
from weightwire.manifest.address import AddressSpace, Spans
from weightwire.manifest.host_library import Arrival, HostLibrary, Tables, loaded
from weightwire.manifest.records import BLOCK_BYTES
from weightwire.types import Span

HASH_BYTES = 8

BRIEF_BLOCKS = 16
"""Blocks of one leaf: 15 to 80 µs where they are in memory, a small part of what a thread may keep the interpreter."""

Numbers = npt.NDArray[np.int64]


class HostDigests:
    """Digests of spans of host memory, asked for in runs. The tables are made once; safe to use from several threads.

    Args:
        memory: which has all bytes of ``spans`` on the host; kept alive by the caller.
        spans: each of them a leaf's, in any order.
        hot: the bytes that are asked for were just written, so that they are in memory, and most of them in a cache.
        library: what hashes, or why there is nothing but ``xxhash``; by default what is ``loaded``.

    Raises:
        IndexError: a span is not inside ``memory``.
    """

    def __init__(
        self,
        memory: AddressSpace,
        spans: Sequence[Span] | Spans,
        library: HostLibrary | str | None = None,
        *,
        hot: bool = False,
    ) -> None:
        self._spans = spans if isinstance(spans, Spans) else Spans.of(spans)
        self._count = len(self._spans.offsets)
        self._memory, self._hot = memory, hot
        found = loaded() if library is None else library
        self._library = found if isinstance(found, HostLibrary) else None
        begin, nbytes = self._spans
        columns = memory.columns(self._spans.hull)
        first = np.maximum(np.searchsorted(columns.offsets, begin, side="right") - 1, 0)
        skip = begin - columns.offsets[first] if len(columns.offsets) else begin
        self._ends = np.concatenate(([0], np.cumsum(-(-nbytes // BLOCK_BYTES))))  # in blocks
        self._columns = columns.addresses, columns.sizes, first, skip, nbytes  # the tables name their memory
        address, size, home, before, length = (column.ctypes.data for column in self._columns)
        self._tables = Tables(address, size, len(columns.offsets), home, before, length, self._count)

    def of(self, first: int, end: int) -> bytes:
        """Digests of the spans numbered ``first`` to ``end``, one after the other.

        Raises:
            IndexError: there are no such spans.
        """
        if not 0 <= first <= end <= self._count:
            raise IndexError(f"spans {first}..{end} of {self._count}")
        if self._library is None:
            return b"".join(map(self._by_xxhash, range(first, end)))
        begin, stop = int(self._ends[first]), int(self._ends[end])
        brief = self._hot and stop - begin <= BRIEF_BLOCKS
        hashes = self._library.hashes(self._tables.part(first, end), stop - begin, brief=brief)
        if end - first == 1:
            return xxhash.xxh3_128_digest(hashes)
        return b"".join(_combined(memoryview(hashes).cast("B"), self._ends[first : end + 1] - self._ends[first]))

    def arriving(self, first: int, end: int) -> ArrivingDigests | None:
        """The same for bytes that a socket is about to bring; None where no library is loaded.

        Raises:
            IndexError: there are no such spans.
        """
        if not 0 <= first <= end <= self._count:
            raise IndexError(f"spans {first}..{end} of {self._count}")
        if self._library is None:
            return None
        ends = self._ends[first : end + 1] - self._ends[first]
        nbytes = int(self._spans.sizes[first:end].sum())
        return ArrivingDigests(self._library, self._tables.part(first, end), ends, nbytes, self)

    def _by_xxhash(self, at: int) -> bytes:
        span = Span(int(self._spans.offsets[at]), int(self._spans.sizes[at]))
        hashes = xxhash_blocks.block_hashes(self._memory.slices(span))
        return xxhash.xxh3_128_digest(struct.pack(f"<{len(hashes)}Q", *hashes))


class ArrivingDigests:
    """Digests of leaves, made while a socket brings their bytes one after the other. Used by one thread, once.

    Args:
        library: what receives and hashes.
        tables: of these leaves.
        ends: where each of them begins among all blocks, and their number.
        nbytes: of all of them.
        owner: keeps the tables and their memory alive.

    Attributes:
        nbytes: as given.
    """

    def __init__(self, library: HostLibrary, tables: Tables, ends: Numbers, nbytes: int, owner: object) -> None:
        self.nbytes = nbytes
        self._library, self._tables, self._ends, self._owner = library, tables, ends, owner
        self._hashes = (ctypes.c_uint64 * int(ends[-1]))()
        self._arrival = Arrival()

    @property
    def received(self) -> int:
        """Bytes that are in place."""
        return self._arrival.received

    @property
    def hashing_s(self) -> float:
        """Seconds that hashing has taken so far."""
        return self._arrival.hashing_ns / 1e9

    def in_place(self, nbytes: int) -> None:
        """The first ``nbytes`` were put there by somebody else."""
        self._arrival.received = nbytes

    def receive(self, socket: int, seconds: float) -> int:
        """Receive and hash what is left; see :meth:`HostLibrary.receive`."""
        return self._library.receive(socket, seconds, self._tables, self._hashes, self._arrival)

    def digests(self) -> bytes:
        """One after the other.

        Raises:
            ValueError: not all bytes are there.
        """
        if self._arrival.hashed < self.nbytes:
            raise ValueError(f"{self._arrival.hashed} of {self.nbytes} bytes were hashed")
        return b"".join(_combined(memoryview(self._hashes).cast("B"), self._ends))


def _combined(hashes: memoryview, ends: Numbers) -> Iterator[bytes]:
    """Of leaves whose first block each is number ``ends`` of all."""
    places = (ends * HASH_BYTES).tolist()
    return (xxhash.xxh3_128_digest(hashes[begin:stop]) for begin, stop in itertools.pairwise(places))
