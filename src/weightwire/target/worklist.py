"""Which leaves are missing, who is fetching them, and which are verified: a pure core, no I/O, no clock.

A leaf's memory has at most one outstanding writer: a chunk is claimed by one lane, and goes back to the list only after
that lane's connection is finished with it or fenced.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from weightwire.manifest.records import Leaf
from weightwire.types import Span


@dataclass(frozen=True, slots=True)
class Chunk:
    """A run of neighbouring leaves that one read fetches.

    Attributes:
        first: index of its first leaf in the layout.
        count: how many leaves.
        span: their bytes.
    """

    first: int
    count: int
    span: Span

    @property
    def leaves(self) -> range:
        """Indices of its leaves."""
        return range(self.first, self.first + self.count)


def chunked(leaves: Sequence[Leaf], missing: Iterable[int], chunk_bytes: int) -> list[Chunk]:
    """Cut the missing leaves into chunks of neighbours, none above ``chunk_bytes`` unless it is a single leaf."""
    chunks: list[Chunk] = []
    run: list[int] = []
    for index in sorted(missing):
        if run and (index != run[-1] + 1 or leaves[index].span.end - leaves[run[0]].span.offset > chunk_bytes):
            chunks.append(_chunk(leaves, run))
            run = []
        run.append(index)
    if run:
        chunks.append(_chunk(leaves, run))
    return chunks


def _chunk(leaves: Sequence[Leaf], run: Sequence[int]) -> Chunk:
    begin = leaves[run[0]].span.offset
    return Chunk(run[0], len(run), Span(begin, leaves[run[-1]].span.end - begin))


class WorkList:
    """The chunks of one load, shared by all lanes. Thread-safe; waits are bounded by the caller.

    Args:
        chunks: what is to be fetched, in the order in which it should be.
    """

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        self._todo = deque(chunks)
        self._claimed: set[Chunk] = set()
        self._changed = threading.Condition()
        self._verified: set[int] = set()
        self.retries = 0

    @property
    def extent(self) -> range:
        """From the first leaf that is to be fetched to the last one."""
        with self._changed:
            chunks = [*self._todo, *self._claimed]
        first = min((chunk.first for chunk in chunks), default=0)
        return range(first, max((chunk.first + chunk.count for chunk in chunks), default=0))

    def __len__(self) -> int:
        """Chunks that nobody has claimed."""
        with self._changed:
            return len(self._todo)

    def claim(self, most: int = 0) -> Chunk | None:
        """Take the next chunk, and those that follow it, in one; ``None`` if nothing is left to take.

        Others may still give theirs back.

        Args:
            most: bytes to take together; one chunk is taken whatever its size.
        """
        with self._changed:
            if not self._todo:
                return None
            chunk = self._todo.popleft()
            while self._todo and _fits(chunk, self._todo[0], most):
                chunk = _joined(chunk, self._todo.popleft())
            self._claimed.add(chunk)
            return chunk

    def verified(self, chunk: Chunk) -> None:
        """Every leaf of a claimed chunk has arrived and has its digest."""
        with self._changed:
            self._claimed.remove(chunk)
            self._verified.update(chunk.leaves)
            if self._finished:
                self._changed.notify_all()

    def give_back(self, chunk: Chunk) -> None:
        """A claimed chunk did not arrive, and whoever was writing it cannot write any more."""
        with self._changed:
            self._claimed.remove(chunk)
            self._todo.appendleft(chunk)
            self.retries += 1
            self._changed.notify_all()

    def wait(self, timeout: float) -> bool:
        """Wait until everything is verified or a chunk came back; true if everything is verified."""
        with self._changed:
            if not self._finished and not self._todo:
                self._changed.wait(timeout)
            return self._finished

    @property
    def finished(self) -> bool:
        """Whether every chunk is verified."""
        with self._changed:
            return self._finished

    @property
    def verified_leaves(self) -> frozenset[int]:
        """Indices of the leaves that may be counted, or offered to others."""
        with self._changed:
            return frozenset(self._verified)

    @property
    def _finished(self) -> bool:
        return not self._todo and not self._claimed


def _fits(chunk: Chunk, following: Chunk, most: int) -> bool:
    return following.first == chunk.first + chunk.count and chunk.span.nbytes + following.span.nbytes <= most


def _joined(chunk: Chunk, following: Chunk) -> Chunk:
    nbytes = chunk.span.nbytes + following.span.nbytes
    return Chunk(chunk.first, chunk.count + following.count, Span(chunk.span.offset, nbytes))
