"""A reading side for the nixl hazards: a source of known bytes in another process, empty memory here."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from transport import nixl_backends
from transport.peers import LEASE, MIB, Bytes, SourceProcess, joined, soon, space

from weightwire.errors import PeerStalled
from weightwire.transport.nixl.connection import CopyingRead, NixlConnection, NixlRead
from weightwire.types import Span

NBYTES = 48 * MIB
"""Far more than sockets and pipes hold."""


class Reader:
    """This process, with empty memory, connected to a source of ``NBYTES`` in another."""

    def __init__(self, source: SourceProcess) -> None:
        self.source = source
        self.transport = nixl_backends.nixl(None)
        memory, self.parts = space(np.zeros(NBYTES, dtype=np.uint8), 5)
        self.into = self.transport.register(memory)
        self.connection = self.connect()

    def connect(self) -> NixlConnection:
        return self.transport.connect(self.source.endpoint, LEASE, soon())

    def start(self) -> NixlRead | CopyingRead:
        """A read of everything that has really begun and is not done; on a busy machine it may take some tries."""
        until = time.monotonic() + 30
        while time.monotonic() < until:
            self.refill(0)
            read = self.connection.read(Span(0, NBYTES), self.into)
            if self._caught(read, until):
                return read
        raise AssertionError("every read was over before it could be caught at it")

    def _caught(self, read: NixlRead | CopyingRead, until: float) -> bool:
        while time.monotonic() < until:
            with contextlib.suppress(PeerStalled):
                read.wait(soon(0.002))
            if read.finished:
                return False
            if any(part[:MIB].any() or part[-MIB:].any() for part in self.parts):
                return True
        return False

    def landed(self) -> Bytes:
        return joined(self.parts)

    def refill(self, value: int) -> None:
        for part in self.parts:
            part[:] = value


def new_source() -> SourceProcess:
    return SourceProcess("transport.nixl_backends:nixl", NBYTES, 4)


@contextmanager
def reading(source: SourceProcess) -> Iterator[Reader]:
    """A fresh reader of ``source``, ended afterwards."""
    reader = Reader(source)
    try:
        yield reader
    finally:
        reader.transport.close()
