"""What a source that is still filling lets readers see: which bytes are there already, and what has come since."""

from __future__ import annotations

import bisect
import math
import threading
import time
from collections.abc import Iterator

from weightwire.manifest.availability import Availability
from weightwire.manifest.leafset import runs
from weightwire.manifest.records import Layout
from weightwire.types import Span
from weightwire.wire.messages import LeafRange, ProgressUpdate

BEAT_S = 0.5
"""Between two signs of life on a progress stream; well below any reader's stall bound. Each also says its rate anew."""
UPDATE_S = 0.04
"""Between two updates that bring news: what came meanwhile travels together. The first news after a pause go at once,
for each replica of a chain waits for those of the one before."""
MAX_RANGES = 4096
MAX_LEAVES = 32_768
"""Of one update, since each may come with its digest; what is left comes with the next one."""


class Readable:
    """Whether a span of a shard is there already; asked at every read.

    Args:
        layout: of the shard.
        available: its leaves that are there.
    """

    def __init__(self, layout: Layout, available: Availability) -> None:
        self._starts = [leaf.span.offset for leaf in layout.leaves]
        self._available = available

    def __call__(self, span: Span) -> bool:
        """Legal for a span inside the shard."""
        if self._available.complete or span.nbytes == 0:
            return True
        first = bisect.bisect_right(self._starts, span.offset) - 1
        last = bisect.bisect_left(self._starts, span.end) - 1
        return self._available.covers(first, last - first + 1)


class News:
    """One reader's view of what a source has: each leaf is told once.

    Args:
        available: what there is.
        since: version that the reader has seen; if it is not the present one, everything is told again.
    """

    def __init__(self, available: Availability, since: int) -> None:
        self._available = available
        have = available.have
        self._told = have if since and since == have.bit_count() else 0
        self._sent_at = -math.inf

    def next(self, generation: int) -> ProgressUpdate:
        """What is new, at most ``MAX_RANGES`` runs of it, of ``MAX_LEAVES`` leaves."""
        have = self._available.have
        ranges, told = list[LeafRange](), 0
        for run in _first(runs(have & ~self._told)):
            ranges.append(LeafRange(run.start, len(run)))
            told |= ((1 << len(run)) - 1) << run.start
        self._told |= told
        self._sent_at = time.monotonic() if ranges else self._sent_at
        return ProgressUpdate(
            version=self._told.bit_count(),
            generation=generation,
            ranges=tuple(ranges),
            complete=self._told.bit_count() == self._available.leaves,
        )

    def wait(self, over: threading.Event) -> bool:
        """Wait for more news, or until it is time for a sign of life; true if ``over`` was set meanwhile."""
        self._available.wait(self._told.bit_count(), BEAT_S)
        return over.wait(max(0.0, self._sent_at + UPDATE_S - time.monotonic()))


def _first(found: Iterator[range]) -> Iterator[range]:
    left = MAX_LEAVES
    for _, run in zip(range(MAX_RANGES), found, strict=False):
        if not left:
            return
        yield run[:left]
        left -= min(len(run), left)
