"""Process memory as buffers: zero-copy views of host segments, and staged copies of device segments.

An address is trusted here, as it comes from our own :class:`~weightwire.manifest.address.AddressSpace` and never from a
peer. Whoever holds a view keeps the registration alive that the address came from.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Iterator, Sequence

from weightwire.manifest.address import Segment

HOST = "cpu"
"""``Segment.device`` of memory that the CPU can address."""

STAGE_BYTES = 4 * 1024 * 1024
"""Most device bytes that a stream handles at a time; it has two pinned buffers of this size, whatever the model's."""

_WRITABLE = 0x200  # PyBUF_WRITE
_from_memory = ctypes.pythonapi.PyMemoryView_FromMemory
_from_memory.restype = ctypes.py_object
_from_memory.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)


def view(address: int, nbytes: int) -> memoryview:
    """Host memory ``[address, address + nbytes)`` as writable bytes, not copied and not kept alive.

    Raises:
        ValueError: a null address with bytes, or a negative size.
    """
    if nbytes < 0 or (nbytes and not address):
        raise ValueError(f"no memory of {nbytes} bytes at address {address:#x}")
    if nbytes == 0:
        return memoryview(bytearray())
    seen: memoryview = _from_memory(address, nbytes, _WRITABLE)
    return seen


def on_host(segments: Sequence[Segment]) -> bool:
    """Whether the CPU can address all of ``segments``."""
    return all(segment.device == HOST for segment in segments)


def views(segments: Sequence[Segment]) -> deque[memoryview]:
    """One view for each of ``segments``, which all lie on the host."""
    return deque(view(segment.address, segment.nbytes) for segment in segments)


def consume(buffers: deque[memoryview], nbytes: int) -> None:
    """Drop the first ``nbytes`` of ``buffers``, and empty ones: what a partial send or receive has done with."""
    while buffers and (nbytes or not buffers[0].nbytes):
        first = buffers[0]
        if first.nbytes > nbytes:
            buffers[0] = first[nbytes:]
            return
        nbytes -= first.nbytes
        buffers.popleft()


def take(buffers: deque[memoryview], nbytes: int) -> deque[memoryview]:
    """The first ``nbytes`` of ``buffers``, or all where they are fewer; they leave ``buffers``."""
    taken: deque[memoryview] = deque()
    while buffers and nbytes:
        first = buffers[0]
        if first.nbytes > nbytes:
            taken.append(first[:nbytes])
            buffers[0] = first[nbytes:]
            break
        nbytes -= first.nbytes
        taken.append(buffers.popleft())
    return taken


def runs(segments: Sequence[Segment], stage_bytes: int = STAGE_BYTES) -> Iterator[list[Segment]]:
    """Cut ``segments`` into runs that are handled alike, in order.

    A run lies on the host (and is of any length), or on one device (and is at most ``stage_bytes`` long).
    """
    if on_host(segments):  # nearly always, and worth it where segments are many
        if segments:
            yield list(segments)
        return
    run: list[Segment] = []
    room = 0
    for segment in segments:
        for piece in _pieces(segment, stage_bytes):
            same = run and piece.device == run[0].device
            if not same or (piece.device != HOST and piece.nbytes > room):
                if run:
                    yield run
                run, room = [], stage_bytes
            run.append(piece)
            room -= piece.nbytes
    if run:
        yield run


def _pieces(segment: Segment, stage_bytes: int) -> Iterator[Segment]:
    step = segment.nbytes if segment.device == HOST else stage_bytes
    for at in range(0, segment.nbytes, max(step, 1)):
        nbytes = min(step, segment.nbytes - at)
        yield Segment(segment.offset + at, segment.address + at, nbytes, segment.device)


def load(segments: Sequence[Segment], out: memoryview) -> None:
    """Copy the bytes of ``segments``, on whatever device, into ``out`` (host memory of exactly their size)."""
    if on_host(segments):
        _spread(views(segments), out, to_segments=False)
        return
    from weightwire.transport import device  # noqa: PLC0415  # torch is imported only where memory is on a device

    at = 0
    for run in runs(segments):
        nbytes = sum(segment.nbytes for segment in run)
        part = out[at : at + nbytes]
        if on_host(run):
            _spread(views(run), part, to_segments=False)
        else:
            device.copy_to_host(run, part)
        at += nbytes


def store(data: memoryview, segments: Sequence[Segment]) -> None:
    """Copy ``data`` (host bytes of exactly their size) into ``segments``, on whatever device; done when it returns."""
    if on_host(segments):
        _spread(views(segments), data, to_segments=True)
        return
    from weightwire.transport import device  # noqa: PLC0415  # see load

    at = 0
    for run in runs(segments):
        nbytes = sum(segment.nbytes for segment in run)
        part = data[at : at + nbytes]
        if on_host(run):
            _spread(views(run), part, to_segments=True)
        else:
            device.copy_from_host(part, run)
        at += nbytes


def _spread(segments: deque[memoryview], flat: memoryview, *, to_segments: bool) -> None:
    at = 0
    for segment in segments:
        part = flat[at : at + segment.nbytes]
        if to_segments:
            segment[:] = part
        else:
            part[:] = segment
        at += segment.nbytes
