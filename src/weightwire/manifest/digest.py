"""The one digest of the protocol: XXH3-128 over the XXH64 values of a leaf's 64 KiB blocks.

    leaf digest = XXH3-128( le64(XXH64(block 0, seed 0)) ‖ le64(XXH64(block 1, seed 0)) ‖ … )

over the leaf's *logical* bytes, so it does not depend on where they lie, on segments, chunks, gaps or devices. Host
memory is hashed by ``host_digest``; memory of a device by ``device_digest``, which gives equal values. It finds
accidents, not lies.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from weightwire.manifest import device_digest
from weightwire.manifest.address import AddressSpace, Segment, Spans
from weightwire.manifest.device_digest import SpanDigests
from weightwire.manifest.device_memory import tensor_at
from weightwire.manifest.host_digest import ArrivingDigests, HostDigests
from weightwire.manifest.records import Leaf
from weightwire.types import Span

Progress = Callable[[int], None]
"""Called in the caller's thread with the number of bytes that were digested since the last call."""


def digest_span(memory: AddressSpace, span: Span) -> bytes:
    """Digest of the bytes of one leaf; ``DIGEST_BYTES`` bytes.

    Device memory is read on the device's current stream; whoever writes it on another stream synchronises first.

    Raises:
        IndexError: ``span`` is not inside ``memory``.
    """
    devices = memory.devices(span)
    if devices <= {_HOST}:
        return HostDigests(memory, [span]).of(0, 1)
    if len(devices) == 1:
        return device_digest.digest_spans(memory, [span])
    return digest_bytes(b"".join(_fetched(segment) for segment in memory.slices(span)))


def digest_bytes(data: bytes | bytearray | memoryview) -> bytes:
    """Digest of a leaf whose bytes were gathered elsewhere, such as in a bounce buffer; one contiguous buffer."""
    flat = np.frombuffer(data, dtype=np.uint8)
    segments = [Segment(0, flat.ctypes.data, flat.nbytes, _HOST)] if flat.nbytes else []
    return HostDigests(AddressSpace(segments, (), flat), [Span(0, flat.nbytes)]).of(0, 1)


def digest_leaves(
    memory: AddressSpace, leaves: Sequence[Leaf], *, threads: int = 1, progress: Progress | None = None
) -> bytes:
    """Digests of ``leaves``, one after the other, as a ``Manifest`` holds them.

    Args:
        memory: where the bytes are.
        leaves: any leaves of the shard, in the order wanted.
        threads: how many cores to use for host memory (the interpreter is free for others meanwhile).
        progress: see :data:`Progress`.

    Raises:
        IndexError: a leaf is not inside ``memory``.
    """
    groups = list(_groups(memory, leaves))
    if threads <= 1 or len(groups) <= 1:
        return b"".join(_reported((group.digests() for group in groups), groups, progress))
    with ThreadPoolExecutor(threads, thread_name_prefix="digest") as pool:
        return b"".join(_reported(pool.map(lambda group: group.digests(), groups), groups, progress))


class LeafDigests:
    """Digests of runs of neighbouring leaves that have just arrived. Safe to use from several threads.

    Args:
        memory: where the bytes are; kept alive by the caller.
        leaves: of the whole shard.

    Raises:
        IndexError: a leaf is not inside ``memory``.
    """

    def __init__(self, memory: AddressSpace, leaves: Sequence[Leaf]) -> None:
        self._memory = memory
        self._leaves = leaves
        spans = _spans(leaves)
        home = _device(memory, spans)
        self._tables = None if home == _MIXED else _tables(memory, spans, home, hot=True)

    def of(self, leaves: range) -> bytes:
        """Digests of the leaves numbered ``leaves`` (step 1), one after the other."""
        if self._tables is not None:
            return self._tables.of(leaves.start, leaves.stop)
        return digest_leaves(self._memory, self._leaves[leaves.start : leaves.stop])

    def arriving(self, leaves: range) -> ArrivingDigests | None:
        """The same for bytes that a socket is about to bring; None where they cannot be hashed on their way."""
        if isinstance(self._tables, HostDigests):
            return self._tables.arriving(leaves.start, leaves.stop)
        return None


_HOST_GROUP = 8
"""Leaves a thread takes at a time: enough that handing them out costs nothing."""

_HOST = "cpu"
_MIXED = "several devices"


@dataclass(frozen=True, slots=True)
class _Group:
    """Leaves that are digested in one go: few on the host, many on a device."""

    digests: Callable[[], bytes]
    nbytes: int


def _groups(memory: AddressSpace, leaves: Sequence[Leaf]) -> Iterator[_Group]:
    home = _device(memory, _spans(leaves))
    if home != _MIXED:
        yield from _batches(memory, leaves, home)
        return
    for device, run in itertools.groupby(leaves, lambda leaf: _device(memory, _spans([leaf]))):
        if device != _MIXED:
            yield from _batches(memory, list(run), device)
            continue
        for leaf in run:
            yield _Group(functools.partial(digest_span, memory, leaf.span), leaf.span.nbytes)


def _batches(memory: AddressSpace, leaves: Sequence[Leaf], device: str) -> Iterator[_Group]:
    if device == _HOST:
        tables = _tables(memory, _spans(leaves), device)
        for at in range(0, len(leaves), _HOST_GROUP):
            end = min(at + _HOST_GROUP, len(leaves))
            yield _Group(functools.partial(tables.of, at, end), _nbytes(leaves[at:end]))
        return
    step = device_digest.batch_leaves(device)
    for at in range(0, len(leaves), step):
        spans = _spans(leaves[at : at + step])
        yield _Group(functools.partial(device_digest.digest_spans, memory, spans), _nbytes(leaves[at : at + step]))


def _tables(memory: AddressSpace, spans: Spans, device: str, *, hot: bool = False) -> HostDigests | SpanDigests:
    return HostDigests(memory, spans, hot=hot) if device == _HOST else SpanDigests(memory, spans)


def _spans(leaves: Sequence[Leaf]) -> Spans:
    return Spans.of([leaf.span for leaf in leaves])


def _device(memory: AddressSpace, spans: Spans) -> str:
    """Where all memory from the first to the last byte of ``spans`` lies."""
    devices = memory.devices(spans.hull)
    return _MIXED if len(devices) > 1 else next(iter(devices), _HOST)


def _reported(results: Iterator[bytes], groups: Sequence[_Group], progress: Progress | None) -> Iterator[bytes]:
    for result, group in zip(results, groups, strict=True):
        if progress is not None:
            progress(group.nbytes)
        yield result


def _nbytes(leaves: Sequence[Leaf]) -> int:
    return sum(leaf.span.nbytes for leaf in leaves)


def _fetched(segment: Segment) -> bytes:
    return bytes(tensor_at(segment.address, segment.nbytes, segment.device).cpu().numpy())
