"""The compiled digest of host memory, where it was built (``hatch_build.py``) and gives the known values.

It is a plain C library beside this file, without a Python interface: nothing is compiled here, and where it is missing
or wrong ``xxhash_blocks`` does the same, at a quarter to an eighth of the speed. ``weightwire doctor`` says which.
"""

from __future__ import annotations

import ctypes
import enum
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from weightwire.manifest.records import BLOCK_BYTES

LIBRARY = Path(__file__).with_name("libhost_digest.so")
VERSION = 2
"""Of the functions' arguments; that of the C file."""

WAYS = ("portable", "avx512")
"""By the number that the library gives them."""


class Tables(NamedTuple):
    """Addresses of arrays of ``int64``, as the C function takes them.

    Attributes:
        address, size: of memory segments.
        segments: how many.
        first: the segment that each leaf begins in.
        skip: how many bytes of that segment come before it.
        nbytes: of each leaf.
        leaves: how many.
    """

    address: int
    size: int
    segments: int
    first: int
    skip: int
    nbytes: int
    leaves: int

    def part(self, first: int, end: int) -> Tables:
        """Of the leaves numbered ``first`` to ``end``."""
        before = first * ctypes.sizeof(ctypes.c_int64)
        columns = (self.first + before, self.skip + before, self.nbytes + before)
        return Tables(self.address, self.size, self.segments, *columns, end - first)


class Came(enum.IntEnum):
    """How a call of :meth:`HostLibrary.receive` ended, besides with an ``errno``."""

    ALL = 0
    LATER = -1
    """Nothing came within the socket's own time-out, or the call's time is over."""
    ENDED = -2
    """The other side ended the connection."""
    WRONG = -3


class Arrival(ctypes.Structure):
    """How far leaves are that come through a socket; kept between calls.

    Attributes:
        received: bytes that are in place.
        hashed: of these, bytes that are hashed.
        hashing_ns: how long that took.
    """

    received: int
    hashed: int
    hashing_ns: int
    _fields_ = (("received", ctypes.c_int64), ("hashed", ctypes.c_int64), ("hashing_ns", ctypes.c_int64))


class HostLibrary:
    """A loaded library.

    Args:
        path: of the shared library.
        way: one of ``WAYS``; by default the fastest that this processor has.

    Raises:
        OSError: it cannot be loaded, is of another version, or gives wrong values.
    """

    def __init__(self, path: Path = LIBRARY, way: str | None = None) -> None:
        library = ctypes.CDLL(str(path))
        try:
            version = _typed(library.weightwire_host_digest_version, ctypes.c_int, ())()
            best = _typed(library.weightwire_host_digest_way, ctypes.c_int, ())()
            self._hashes = _typed(library.weightwire_host_digest, ctypes.c_int64, _ARGUMENTS)
            self._arrival = _typed(library.weightwire_host_arrival, ctypes.c_int, _ARRIVAL_ARGUMENTS)
            self._briefly = _typed(ctypes.PyDLL(str(path)).weightwire_host_digest, ctypes.c_int64, _ARGUMENTS)
        except AttributeError as error:
            raise OSError(f"{path.name} is not this digest: {error}") from None
        if version != VERSION:
            raise OSError(f"{path.name} is of version {version}, not {VERSION}")
        self._number = best if way is None else WAYS.index(way)
        self.way = WAYS[self._number]
        if not self._knows():
            raise OSError(f"{path.name} gives wrong values ({self.way})")

    def hashes(self, tables: Tables, blocks: int, *, brief: bool = False) -> ctypes.Array[ctypes.c_uint64]:
        """XXH64 of each block of all leaves, one after the other.

        Args:
            tables: their arrays, and the memory that they name, are kept alive by the caller.
            blocks: what ``tables`` come to.
            brief: keep the interpreter's lock, which is free for other threads otherwise: for a mebibyte that is in
                cache, giving it up and taking it back costs as much as the call.

        Raises:
            IndexError: a leaf is not inside the segments, or ``blocks`` is not their number. Nothing was read.
        """
        out = (ctypes.c_uint64 * blocks)()
        call = self._briefly if brief else self._hashes
        if call(self._number, *tables, out, blocks) != blocks:
            raise IndexError("a leaf is not inside the memory")
        return out

    def receive(
        self, socket: int, seconds: float, tables: Tables, hashes: ctypes.Array[ctypes.c_uint64], arrival: Arrival
    ) -> int:
        """Receive the bytes of all leaves, in their order, and hash each few blocks while they are in a cache.

        Args:
            socket: descriptor of a blocking stream socket that has a time-out. Nothing is asked of it where
                ``arrival`` says that all is in place.
            seconds: the call ends soon after, done or not.
            tables: as for ``hashes``; the memory is written.
            hashes: gets what ``hashes`` would return.
            arrival: of these leaves; begins with what is in place already.

        Returns:
            A :class:`Came`, or the ``errno`` of the socket.

        Raises:
            IndexError: as for ``hashes``; nothing was written.
        """
        most_ns = int(seconds * 1e9)
        came = self._arrival(socket, most_ns, self._number, *tables, hashes, len(hashes), ctypes.byref(arrival))
        if came == Came.WRONG:
            raise IndexError("a leaf is not inside the memory")
        return came

    def _knows(self) -> bool:
        """Compare with ``xxhash``: blocks that are whole, cut into pieces, and of lengths with every kind of end."""
        data = bytes(at * at % 251 for at in range(1024)) * 140
        lengths = [2 * BLOCK_BYTES, 1, 3, 4, 31, 32, 33, 63, 77, 0, 108, len(data) - 2 * BLOCK_BYTES - 352]
        buffer = ctypes.create_string_buffer(data, len(data))
        sizes = [7, 1, 32, 90000, 40]
        sizes.append(len(data) - sum(sizes))
        ends = [sum(sizes[:at]) for at in range(len(sizes))]
        begins = [sum(lengths[:at]) for at in range(len(lengths))]
        home = [max(at for at, end in enumerate(ends) if end <= begin) for begin in begins]
        skips = [begin - ends[at] for begin, at in zip(begins, home, strict=True)]
        where = ctypes.addressof(buffer)
        columns = [_column(values) for values in ([where + end for end in ends], sizes, home, skips, lengths)]
        address, size, first, skip, nbytes = (ctypes.addressof(column) for column in columns)
        expected = [
            xxhash.xxh64_intdigest(data[at : min(at + BLOCK_BYTES, begin + length)])
            for begin, length in zip(begins, lengths, strict=True)
            for at in range(begin, begin + length, BLOCK_BYTES)
        ]
        tables = Tables(address, size, len(sizes), first, skip, nbytes, len(lengths))
        try:
            return list(self.hashes(tables, len(expected))) == expected and self._arrives(tables, data, expected)
        except IndexError:
            return False

    def _arrives(self, tables: Tables, data: bytes, expected: list[int]) -> bool:
        """The same where all is in place, which goes by another way."""
        hashes = (ctypes.c_uint64 * len(expected))()
        return (
            self.receive(-1, 1.0, tables, hashes, Arrival(received=len(data))) == Came.ALL and list(hashes) == expected
        )


@functools.cache
def loaded() -> HostLibrary | str:
    """The library, or why there is none; the answer stays for the life of the process."""
    if not LIBRARY.exists():
        return "it was not compiled when weightwire was installed"
    try:
        return HostLibrary()
    except OSError as error:
        return f"it cannot be used: {error}"


def _column(values: list[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)


def _typed(function: Any, result: Any, arguments: tuple[Any, ...]) -> Callable[..., int]:
    function.restype, function.argtypes = result, arguments
    typed: Callable[..., int] = function
    return typed


_POINTER, _COUNT = ctypes.c_void_p, ctypes.c_int64
_ARGUMENTS = (ctypes.c_int, *[_POINTER] * 2, _COUNT, *[_POINTER] * 3, _COUNT, _POINTER, _COUNT)
_ARRIVAL_ARGUMENTS = (ctypes.c_int, ctypes.c_int64, *_ARGUMENTS, _POINTER)
