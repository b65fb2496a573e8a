"""Hashes of a leaf's blocks by the ``xxhash`` package, block by block: where there is no compiled library."""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import xxhash

from weightwire.manifest.address import Segment
from weightwire.manifest.memory import view
from weightwire.manifest.records import BLOCK_BYTES


def block_hashes(segments: Sequence[Segment]) -> list[int]:
    """XXH64 of each block of the leaf that ``segments`` of host memory make up, in logical order."""
    if len(segments) == 1:
        return _of_one(segments[0].address, segments[0].nbytes)
    return list(_streamed(segments))


def _of_one(address: int, nbytes: int) -> list[int]:
    """Of one run of memory. A plain list: for blocks that are hot in a cache, the interpreter is a good part of it."""
    hashed, whole = _xxh64, nbytes - nbytes % BLOCK_BYTES
    hashes = [hashed(at, BLOCK_BYTES, 0) for at in range(address, address + whole, BLOCK_BYTES)]
    if whole < nbytes:
        hashes.append(hashed(address + whole, nbytes - whole, 0))
    return hashes


def _streamed(segments: Sequence[Segment]) -> Iterator[int]:
    """Hashes of blocks that may span several segments: streaming where they do, in one call where they do not."""
    hasher, filled = _streaming(), 0
    for segment in segments:
        at = 0
        while at < segment.nbytes:
            step = min(BLOCK_BYTES - filled, segment.nbytes - at)
            if step == BLOCK_BYTES:
                yield _xxh64(segment.address + at, step, 0)
            else:
                hasher.update(segment.address + at, step)
                filled += step
                if filled == BLOCK_BYTES:
                    yield hasher.take()
                    filled = 0
            at += step
    if filled:
        yield hasher.take()


def _slow_xxh64(address: int, nbytes: int, seed: int) -> int:
    return xxhash.xxh64_intdigest(view(address, nbytes), seed)


class _SlowHasher:
    """XXH64 of bytes that come in parts."""

    def __init__(self) -> None:
        self._state = xxhash.xxh64()

    def update(self, address: int, nbytes: int) -> None:
        self._state.update(view(address, nbytes))

    def take(self) -> int:
        """The hash of what came since the last one."""
        value = self._state.intdigest()
        self._state.reset()
        return value


class _NativeHasher:
    """The same by the C functions, which leave the interpreter to other threads."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._state = ctypes.create_string_buffer(_STATE_BYTES)
        self._at = ctypes.addressof(self._state)
        self._update = _typed(library.XXH64_update, ctypes.c_int, (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t))
        self._reset = _typed(library.XXH64_reset, ctypes.c_int, (ctypes.c_void_p, ctypes.c_uint64))
        self._digest = _typed(library.XXH64_digest, ctypes.c_uint64, (ctypes.c_void_p,))
        self._reset(self._at, 0)

    def update(self, address: int, nbytes: int) -> None:
        self._update(self._at, address, nbytes)

    def take(self) -> int:
        value = int(self._digest(self._at))
        self._reset(self._at, 0)
        return value


_STATE_BYTES = 256
"""More than an ``XXH64_state_t`` has (88), which is part of xxHash's stable interface."""


def _typed(function: Any, result: Any, arguments: tuple[Any, ...]) -> Callable[..., int]:
    function.restype, function.argtypes = result, arguments
    typed: Callable[..., int] = function
    return typed


def _functions() -> tuple[Callable[[int, int, int], int], Callable[[], _SlowHasher | _NativeHasher]]:
    """The C functions behind ``xxhash``, because the module keeps the interpreter locked for blocks of 64 KiB.

    Where a build does not export them, or they do not give the known value, the module's own are used.
    """
    probe = ctypes.create_string_buffer(bytes(range(256)))
    known, where = xxhash.xxh64_intdigest(bytes(range(256))), ctypes.addressof(probe)
    try:
        library = ctypes.CDLL(importlib.import_module("xxhash._xxhash").__file__)
        arguments = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint64)
        whole = _typed(library.XXH64, ctypes.c_uint64, arguments)
        hasher = _NativeHasher(library)
    except (ImportError, OSError, AttributeError):
        return _slow_xxh64, _SlowHasher
    hasher.update(where, 100)
    hasher.update(where + 100, 156)
    if whole(where, 256, 0) != known or hasher.take() != known:
        return _slow_xxh64, _SlowHasher
    return whole, lambda: _NativeHasher(library)


_xxh64, _streaming = _functions()
