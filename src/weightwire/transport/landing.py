"""Where the bytes of one read land, and where those of one answer come from.

Host memory is used directly; device memory through two pinned buffers in turn: while one is copied to or from the
device, the socket fills or empties the other.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from weightwire.manifest.address import Segment
from weightwire.transport import memory

if TYPE_CHECKING:
    from weightwire.transport.device import Stage, Stages


class Staging:
    """This thread's pinned buffers, in turn. Made on first use and kept: two a thread and device.

    Args:
        stages: where they come from; ``device.pinned_stages`` if left out.
        nbytes: of each that are used at a time.
    """

    def __init__(self, stages: Stages | None = None, nbytes: int = memory.STAGE_BYTES) -> None:
        self.nbytes = nbytes
        self._stages = stages
        self._turn = 0

    def take(self, run: Sequence[Segment]) -> tuple[Stage, memoryview]:
        """The next buffer for ``run``, which lies on one device, with nothing under way; and its part to be used.

        Raises:
            TransferError: the device does not work.
        """
        if self._stages is None:
            from weightwire.transport.device import pinned_stages  # noqa: PLC0415  # torch only where it is needed

            self._stages = pinned_stages
        ready = self._stages(run[0].device)
        self._turn += 1
        stage = ready[self._turn % len(ready)]
        stage.settle()
        return stage, stage.host[: _size(run)]


class Landing:
    """Fills ``segments`` in order, however the bytes come in. Its buffers hold those bytes and no others.

    Args:
        segments: memory of one read, kept alive by the caller.
        staging: used while this landing is open, by nothing else, and by one thread.

    Attributes:
        direct: bytes are in place as soon as ``advance`` is told of them; elsewhere only once all are.
    """

    def __init__(self, segments: Sequence[Segment], staging: Staging) -> None:
        self._staging = staging
        self._buffers: deque[memoryview] = deque()
        self._staged: tuple[Stage, list[Segment]] | None = None
        self._copying: set[Stage] = set()
        self.direct = memory.on_host(segments)
        self._runs = memory.runs(segments, staging.nbytes)
        self._open_next()

    @property
    def complete(self) -> bool:
        """Whether all bytes are in place."""
        return not self._buffers

    def buffers(self, most: int, nbytes: int = 1 << 62) -> list[memoryview]:
        """Where the next bytes go: at most ``most`` buffers, of ``nbytes`` at most; none when all are in place."""
        found = []
        for buffer in itertools.islice(self._buffers, most):
            found.append(buffer if buffer.nbytes <= nbytes else buffer[:nbytes])
            nbytes -= found[-1].nbytes
            if not nbytes:
                break
        return found

    def advance(self, nbytes: int) -> None:
        """The first ``nbytes`` of the buffers were filled.

        Raises:
            TransferError: the device does not work.
        """
        memory.consume(self._buffers, nbytes)
        if not self._buffers:
            self._finish_run()
            self._open_next()
            if not self._buffers:
                self.settle()

    def settle(self) -> None:
        """Return once no copy into the memory is under way; whoever breaks off calls it, too."""
        while self._copying:
            self._copying.pop().settle()

    def _open_next(self) -> None:
        run = next(self._runs, None)
        if run is None:
            return
        if memory.on_host(run):
            self._buffers = memory.views(run)
        else:
            stage, part = self._staging.take(run)
            self._staged = stage, run
            self._buffers = deque([part])

    def _finish_run(self) -> None:
        if self._staged is None:
            return
        (stage, run), self._staged = self._staged, None
        self._copying.add(stage)
        _each(run, stage.put)


def leaving(segments: Sequence[Segment], staging: Staging) -> Iterator[deque[memoryview]]:
    """The bytes of ``segments`` on the host, run by run; each is valid until the next one is asked for.

    Args:
        segments: in order; their bytes are final.
        staging: used until the end, by nothing else, and by one thread.

    Raises:
        TransferError: the device does not work.
    """
    coming: deque[Callable[[], deque[memoryview]]] = deque()
    for run in memory.runs(segments, staging.nbytes):
        coming.append(_begun(run, staging))
        if len(coming) > 1:
            yield coming.popleft()()
    while coming:
        yield coming.popleft()()


def _begun(run: list[Segment], staging: Staging) -> Callable[[], deque[memoryview]]:
    if memory.on_host(run):
        return lambda: memory.views(run)
    stage, part = staging.take(run)
    _each(run, stage.fetch)

    def settled() -> deque[memoryview]:
        stage.settle()
        return deque([part])

    return settled


def _each(run: Sequence[Segment], copy: Callable[[Segment, int], None]) -> None:
    at = 0
    for piece in run:
        copy(piece, at)
        at += piece.nbytes


def _size(run: Sequence[Segment]) -> int:
    return sum(segment.nbytes for segment in run)
