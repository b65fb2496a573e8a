"""A reading side for the nixl hazards: a source of known bytes in another process, empty memory here."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from transport import nixl_backends
from transport.peers import LEASE, MIB, Bytes, SourceProcess, joined, soon, space

from weightwire.errors import PeerStalled
from weightwire.transport.nixl.connection import NixlConnection, NixlRead
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

    def start(self) -> NixlRead:
        """A read of everything that has really begun and is not done."""
        read = self.connection.read(Span(0, NBYTES), self.into)
        until = time.monotonic() + 20
        while not any(part[:MIB].any() or part[-MIB:].any() for part in self.parts):
            assert time.monotonic() < until
            with pytest.raises(PeerStalled):
                read.wait(soon(0.002))
        assert not read.finished
        return read

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
