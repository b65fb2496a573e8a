"""Where the bytes of one read land: host memory directly, device memory through a bounded stage."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence

from weightwire.manifest.address import Segment
from weightwire.transport import memory


class Stage:
    """Host memory for device bytes, made on first use and kept: ``memory.STAGE_BYTES`` a stream."""

    def __init__(self) -> None:
        self._buffer: memoryview | None = None

    def take(self, nbytes: int) -> memoryview:
        """The first ``nbytes`` (at most ``memory.STAGE_BYTES``) of the stage; whoever took it before is done."""
        if self._buffer is None:
            self._buffer = memoryview(bytearray(memory.STAGE_BYTES))
        return self._buffer[:nbytes]


class Landing:
    """Fills ``segments`` in order, however the bytes come in. Its buffers hold those bytes and no others.

    Args:
        segments: memory of one read, kept alive by the caller.
        stage: used while this landing is open, by nothing else.
    """

    def __init__(self, segments: Sequence[Segment], stage: Stage) -> None:
        self._stage = stage
        self._buffers: deque[memoryview] = deque()
        self._staged: list[Segment] = []
        self._runs = memory.runs(segments)
        self._open_next()

    def buffers(self, most: int) -> list[memoryview]:
        """Where the next bytes go, at most ``most`` buffers; empty when all are in place."""
        return list(itertools.islice(self._buffers, most))

    def advance(self, nbytes: int) -> None:
        """The first ``nbytes`` of the buffers were filled."""
        memory.consume(self._buffers, nbytes)
        if not self._buffers:
            self._finish_run()
            self._open_next()

    def _open_next(self) -> None:
        run = next(self._runs, None)
        if run is None:
            return
        if memory.on_host(run):
            self._buffers = memory.views(run)
        else:
            self._staged = run
            self._buffers = deque([self._stage.take(_size(run))])

    def _finish_run(self) -> None:
        if self._staged:
            memory.store(self._stage.take(_size(self._staged)), self._staged)
            self._staged = []


def _size(run: Sequence[Segment]) -> int:
    return sum(segment.nbytes for segment in run)
