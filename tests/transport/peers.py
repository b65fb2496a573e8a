"""What the transport tests share: memory with known bytes, gates, and sources in processes of their own."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from weightwire.auth import Secret
from weightwire.errors import GenerationMoved, ProtocolError
from weightwire.manifest.address import AddressSpace, Region, Segment
from weightwire.transport.base import Connection, Registration
from weightwire.types import Span

Bytes = npt.NDArray[np.uint8]

SECRET = Secret(b"one secret for all transport tests")
OTHER_SECRET = Secret(b"a secret that nobody else here has")
LEASE = bytes(range(16))
MIB = 1 << 20


def soon(seconds: float = 10.0) -> float:
    """A deadline."""
    return time.monotonic() + seconds


def pattern(nbytes: int, seed: int = 1) -> Bytes:
    """Bytes that differ everywhere and are all odd: no zero, and nothing that an even sentinel could pass for."""
    words = np.arange(seed, seed + nbytes // 8 + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15 | 1)
    return words.view(np.uint8)[:nbytes] | np.uint8(1)


def space(content: Bytes, pieces: int = 1, base: int = 0, seed: int = 0) -> tuple[AddressSpace, list[Bytes]]:
    """``content`` in ``pieces`` allocations at odd places, as the logical bytes from ``base`` on."""
    cuts = sorted(random.Random(seed).sample(range(1, content.size), pieces - 1)) if pieces > 1 else []
    segments, regions, parts = [], [], []
    for begin, end in zip([0, *cuts], [*cuts, content.size], strict=True):
        allocation = np.zeros(end - begin + 3, dtype=np.uint8)
        allocation[3:] = content[begin:end]
        parts.append(allocation[3:])
        segments.append(Segment(base + begin, allocation.ctypes.data + 3, end - begin, "cpu"))
        regions.append(Region(allocation.ctypes.data, allocation.nbytes, "cpu"))
    return AddressSpace(segments, sorted(regions), parts), parts


def joined(parts: Sequence[Bytes]) -> Bytes:
    """The logical bytes of ``space``'s second result."""
    return np.concatenate(parts)


class Gate:
    """Serves one registration under ``LEASE``; notes every request; can be told to refuse."""

    def __init__(self) -> None:
        self.registration: Registration | None = None
        self.asked: list[Span] = []
        self.moved = False
        self.pause: threading.Event | None = None

    def admit(self, lease: bytes, span: Span) -> Registration:
        self.asked.append(span)
        if self.pause is not None:
            self.pause.wait(10)
        if lease != LEASE or self.registration is None:
            raise ProtocolError("no such lease")
        if self.moved:
            raise GenerationMoved("withdrawn")
        covered = self.registration.memory.span
        if span.offset < covered.offset or span.end > covered.end:
            raise ProtocolError("outside")
        return self.registration


def pull(connection: Connection, spans: Sequence[Span], into: Registration, seconds: float = 20.0) -> None:
    """Read all ``spans``, ``connection.depth`` at a time."""
    deadline = soon(seconds)
    under_way = []
    for span in spans:
        under_way.append(connection.read(span, into))
        if len(under_way) >= connection.depth:
            under_way.pop(0).wait(deadline)
    for read in under_way:
        read.wait(deadline)


class SourceProcess:
    """A source in a process of its own, with ``pattern(nbytes)`` in ``pieces`` allocations.

    Args:
        factory: ``module:function`` that makes a transport from a gate; importable with ``tests`` on the path.
    """

    def __init__(self, factory: str, nbytes: int, pieces: int = 1) -> None:
        script = Path(__file__).with_name("source_process.py")
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, str(script), factory, str(nbytes), str(pieces)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.endpoint = bytes.fromhex(str(self._answer()["endpoint"]))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.resume()
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def freeze(self) -> None:
        """SIGSTOP, and wait until it has really stopped."""
        os.kill(self._process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WNOWAIT)

    def resume(self) -> None:
        if self._process.poll() is None:
            os.kill(self._process.pid, signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL; returns once it is gone."""
        self._process.kill()
        self._process.wait(10)

    def order(self, command: str) -> None:
        """Send an order without waiting for its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()

    def answer(self) -> float:
        """How long the oldest unanswered order took, in seconds."""
        return float(self._answer()["seconds"])

    def _answer(self) -> dict[str, str]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the source process ended with {self._process.wait(10)}"
        found: dict[str, str] = json.loads(line)
        return found


@contextlib.contextmanager
def thread(target: object, *args: object) -> Iterator[threading.Thread]:
    """Run ``target`` beside the block and join it (bounded) afterwards."""
    assert callable(target)
    beside = threading.Thread(target=target, args=args)
    beside.start()
    try:
        yield beside
    finally:
        beside.join(30)
        assert not beside.is_alive()
