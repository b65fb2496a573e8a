"""Bounce buffers: where a chunk that was asked for twice lands the second time, until its place is free of writers."""

from __future__ import annotations

import numpy as np

from weightwire.manifest.address import AddressSpace, Region, Segment
from weightwire.transport import memory
from weightwire.types import Span


class Bounce:
    """Host memory for the logical bytes ``span``: a registration that only reads into it, and only once.

    No transport was told of it: a connection registers what it reads into where its backend needs that.
    """

    def __init__(self, span: Span) -> None:
        self.span = span
        self._buffer = np.empty(span.nbytes, dtype=np.uint8)
        address = self._buffer.ctypes.data
        region = Region(address, span.nbytes, memory.HOST)
        self.memory = AddressSpace([Segment(span.offset, address, span.nbytes, memory.HOST)], [region], self._buffer)

    def copy_to(self, place: AddressSpace) -> None:
        """Put the bytes into ``place``. Legal once nobody else writes there."""
        memory.store(self._buffer.data, place.slices(self.span))
