"""The one digest of the protocol: XXH3-128 over the XXH64 values of a leaf's 64 KiB blocks.

    leaf digest = XXH3-128( le64(XXH64(block 0, seed 0)) ‖ le64(XXH64(block 1, seed 0)) ‖ … )

over the leaf's *logical* bytes, so it does not depend on where they lie, on segments, chunks, gaps or devices. Host
memory is hashed here; memory of a device by ``device_digest``, which gives equal values. It finds accidents, not lies.
"""

from __future__ import annotations

import ctypes
import importlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import xxhash

from weightwire.manifest import device_digest
from weightwire.manifest.address import AddressSpace, Segment
from weightwire.manifest.device_blocks import BLOCK_BYTES
from weightwire.manifest.device_digest import SpanDigests
from weightwire.manifest.device_memory import tensor_at
from weightwire.manifest.memory import view
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
    segments = memory.slices(span)
    devices = {segment.device for segment in segments}
    if devices <= {_HOST}:
        return _host(segments)
    if len(devices) == 1:
        return device_digest.digest_spans(memory, [span])
    return digest_bytes(b"".join(_fetched(segment) for segment in segments))


def digest_bytes(data: bytes | bytearray | memoryview) -> bytes:
    """Digest of a leaf whose bytes were gathered elsewhere, such as in a bounce buffer; one contiguous buffer."""
    flat = memoryview(data).cast("B")
    hashes = (xxhash.xxh64_intdigest(flat[at : at + BLOCK_BYTES]) for at in range(0, len(flat), BLOCK_BYTES))
    return _combine(hashes)


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
        return b"".join(_reported(map(_group_digests, groups), groups, progress))
    with ThreadPoolExecutor(threads, thread_name_prefix="digest") as pool:
        return b"".join(_reported(pool.map(_group_digests, groups), groups, progress))


class LeafDigests:
    """Digests of runs of neighbouring leaves, asked for again and again. Safe to use from several threads.

    Args:
        memory: where the bytes are; kept alive by the caller.
        leaves: of the whole shard.

    Raises:
        IndexError: a leaf is not inside ``memory``.
    """

    def __init__(self, memory: AddressSpace, leaves: Sequence[Leaf]) -> None:
        self._memory = memory
        self._leaves = leaves
        home = _device(memory, leaves)
        one_device = home not in {_HOST, _MIXED}
        self._tables = SpanDigests(memory, [leaf.span for leaf in leaves]) if one_device else None

    def of(self, leaves: range) -> bytes:
        """Digests of the leaves numbered ``leaves`` (step 1), one after the other."""
        if self._tables is not None:
            return self._tables.of(leaves.start, leaves.stop)
        return digest_leaves(self._memory, self._leaves[leaves.start : leaves.stop])


_HOST_GROUP = 8
"""Leaves a thread takes at a time: enough that handing them out costs nothing."""

_HOST = "cpu"
_MIXED = "several devices"
_Group = tuple[AddressSpace, Sequence[Leaf], str]


def _groups(memory: AddressSpace, leaves: Sequence[Leaf]) -> Iterator[_Group]:
    """Leaves that are digested in one go, and where they lie: few on the host, many on a device."""
    home = _device(memory, leaves)
    if home != _MIXED:
        yield from _batches(memory, leaves, home)
        return
    for device, run in itertools.groupby(leaves, lambda leaf: _device(memory, [leaf])):
        yield from _batches(memory, list(run), device)


def _batches(memory: AddressSpace, leaves: Sequence[Leaf], device: str) -> Iterator[_Group]:
    step = _HOST_GROUP if device in {_HOST, _MIXED} else device_digest.batch_leaves(device)
    return ((memory, leaves[at : at + step], device) for at in range(0, len(leaves), step))


def _device(memory: AddressSpace, leaves: Sequence[Leaf]) -> str:
    """Where all memory from the first to the last byte of ``leaves`` lies."""
    if not leaves:
        return _HOST
    begin, end = min(leaf.span.offset for leaf in leaves), max(leaf.span.end for leaf in leaves)
    devices = {segment.device for segment in memory.slices(Span(begin, end - begin))}
    return _MIXED if len(devices) > 1 else next(iter(devices), _HOST)


def _group_digests(group: _Group) -> bytes:
    memory, leaves, device = group
    if device in {_HOST, _MIXED}:
        return b"".join(digest_span(memory, leaf.span) for leaf in leaves)
    return device_digest.digest_spans(memory, [leaf.span for leaf in leaves])


def _reported(results: Iterator[bytes], groups: Sequence[_Group], progress: Progress | None) -> Iterator[bytes]:
    for result, (_, leaves, _) in zip(results, groups, strict=True):
        if progress is not None:
            progress(sum(leaf.span.nbytes for leaf in leaves))
        yield result


def _host(segments: Sequence[Segment]) -> bytes:
    if len(segments) == 1:
        return _combine(_block_hashes(segments[0].address, segments[0].nbytes))
    return _combine(_streamed(segments))


def _block_hashes(address: int, nbytes: int) -> Iterator[int]:
    for at in range(0, nbytes, BLOCK_BYTES):
        yield _xxh64(address + at, min(BLOCK_BYTES, nbytes - at))


def _streamed(segments: Sequence[Segment]) -> Iterator[int]:
    """Hashes of blocks that may span several segments: streaming where they do, in one call where they do not."""
    hasher, filled = xxhash.xxh64(), 0
    for segment in segments:
        at = 0
        while at < segment.nbytes:
            step = min(BLOCK_BYTES - filled, segment.nbytes - at)
            if step == BLOCK_BYTES:
                yield _xxh64(segment.address + at, step)
            else:
                hasher.update(view(segment.address + at, step))
                filled += step
                if filled == BLOCK_BYTES:
                    yield hasher.intdigest()
                    hasher, filled = xxhash.xxh64(), 0
            at += step
    if filled:
        yield hasher.intdigest()


def _combine(hashes: Iterator[int]) -> bytes:
    return xxhash.xxh3_128_digest(b"".join(value.to_bytes(8, "little") for value in hashes))


def _fetched(segment: Segment) -> bytes:
    return bytes(tensor_at(segment.address, segment.nbytes, segment.device).cpu().numpy())


def _slow_xxh64(address: int, nbytes: int) -> int:
    return xxhash.xxh64_intdigest(view(address, nbytes))


def _native_xxh64() -> Callable[[int, int], int]:
    """The C function behind ``xxhash``, because the module keeps the interpreter locked for blocks of 64 KiB.

    Where a build does not export it, or it does not give the known value, the module's own function is used.
    """
    try:
        function = ctypes.CDLL(importlib.import_module("xxhash._xxhash").__file__).XXH64
    except (ImportError, OSError, AttributeError):
        return _slow_xxh64
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint64)
    function.restype = ctypes.c_uint64
    probe = ctypes.create_string_buffer(bytes(range(256)))
    if function(ctypes.addressof(probe), 256, 0) != xxhash.xxh64_intdigest(bytes(range(256))):
        return _slow_xxh64
    return lambda address, nbytes: int(function(address, nbytes, 0))


_xxh64 = _native_xxh64()
