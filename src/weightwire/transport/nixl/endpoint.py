"""What a source tells a reader: its agent's metadata and where each logical byte lies. A pure codec.

Layout, little endian: the header ``_HEADER``, the agent's name, its metadata, one ``_SEGMENT`` for each segment in
logical order, and 32 bytes of proof over everything before them and the lease. The proof needs the shared secret, so
nothing that a stranger made ever reaches NIXL's own parser.
"""

from __future__ import annotations

import hashlib
import re
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

from weightwire.auth import NONCE_BYTES, PROOF_BYTES, Secret, equal
from weightwire.errors import AuthError, ProtocolError
from weightwire.manifest.address import AddressSpace, Columns
from weightwire.transport.base import MAX_ENDPOINT_BYTES

MAX_METADATA_BYTES = 32 * 1024 * 1024
MAX_SEGMENTS = 2_000_000
MAX_SEGMENT_BYTES = 1 << 40
MAX_OFFSET = 1 << 60
MAX_ADDRESS = 1 << 63
MAX_DEVICES = 1024

_MAGIC = b"wwnixl\x00\x01"
_HEADER = struct.Struct("<8sBQII")
_SEGMENT = np.dtype([("address", "<u8"), ("nbytes", "<u8"), ("device", "<i4")])
_AGENT = re.compile(rb"[0-9a-f]{16}/s[0-9]{1,9}")
_CUDA = "cuda:"
_NO_NONCE = bytes(NONCE_BYTES)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One side's view of a served registration.

    Attributes:
        agent: name of the serving agent, never used twice.
        metadata: NIXL's own description of it (addresses and keys).
        memory: where the logical bytes lie in the source's process; addresses of theirs, never to be touched here.
    """

    agent: str
    metadata: bytes
    memory: AddressSpace

    def encode(self, secret: Secret, lease: bytes) -> bytes:
        """Bytes for a reader that holds ``lease``.

        Raises:
            ValueError: it is larger than the protocol allows.
        """
        columns = self.memory.all
        segments = np.zeros(len(columns.offsets), dtype=_SEGMENT)
        segments["address"], segments["nbytes"] = columns.addresses, columns.sizes
        segments["device"] = np.array([*map(device_number, columns.devices)], dtype=np.int64)[columns.homes]
        name = self.agent.encode()
        header = _HEADER.pack(_MAGIC, len(name), self.memory.span.offset, len(self.metadata), len(segments))
        body = header + name + self.metadata + segments.tobytes()
        if len(body) + PROOF_BYTES > MAX_ENDPOINT_BYTES:
            raise ValueError(f"{len(segments)} segments and {len(self.metadata)} bytes of metadata are too many")
        return body + _proof(secret, body, lease)

    @classmethod
    def decode(cls, data: bytes, secret: Secret, lease: bytes) -> Endpoint:
        """Check and take apart what ``encode`` made.

        Raises:
            ProtocolError: malformed, or a number out of its bounds.
            AuthError: made with another secret, or for another lease.
        """
        if not _HEADER.size + PROOF_BYTES < len(data) <= MAX_ENDPOINT_BYTES:
            raise _malformed(f"it has {len(data)} bytes")
        magic, name_bytes, start, metadata_bytes, count = _HEADER.unpack_from(data)
        table_bytes = count * _SEGMENT.itemsize
        if magic != _MAGIC:
            raise _malformed("it is not of this protocol")
        if metadata_bytes > MAX_METADATA_BYTES or count > MAX_SEGMENTS or start > MAX_OFFSET:
            raise _malformed("a count is out of bounds")
        if len(data) != _HEADER.size + name_bytes + metadata_bytes + table_bytes + PROOF_BYTES:
            raise _malformed("its parts do not add up")
        body, proof = data[:-PROOF_BYTES], data[-PROOF_BYTES:]
        if not equal(_proof(secret, body, lease), proof):
            raise AuthError("a nixl endpoint was made with another secret or for another lease", "use one secret")
        name = body[_HEADER.size : _HEADER.size + name_bytes]
        if _AGENT.fullmatch(name) is None:
            raise _malformed("its agent has an illegal name")
        metadata = body[_HEADER.size + name_bytes : len(body) - table_bytes]
        table = np.frombuffer(body, dtype=_SEGMENT, count=count, offset=len(body) - table_bytes)
        return cls(name.decode(), metadata, _memory(start, table))


def _memory(start: int, table: np.ndarray[Any, np.dtype[Any]]) -> AddressSpace:
    """The source's address space, all numbers checked before any is used."""
    sizes, addresses, devices = table["nbytes"], table["address"], table["device"]
    if len(table) and not (
        sizes.min() > 0
        and sizes.max() <= MAX_SEGMENT_BYTES
        and addresses.min() > 0
        and addresses.max() < MAX_ADDRESS
        and devices.min() >= -1
        and devices.max() < MAX_DEVICES
    ):
        raise _malformed("a segment is out of bounds")
    offsets = np.cumsum(sizes, dtype=np.uint64) - sizes + np.uint64(start)  # below 2**61 + 2**60
    numbers, homes = np.unique(devices, return_inverse=True)
    names = tuple("cpu" if number < 0 else f"{_CUDA}{number}" for number in numbers.tolist())
    columns = Columns(
        offsets.astype(np.int64), addresses.astype(np.int64), sizes.astype(np.int64), homes.astype(np.int64), names
    )
    return AddressSpace(columns, (), None)


def device_number(device: str) -> int:
    """-1 for ``cpu``, N for ``cuda:N``.

    Raises:
        ValueError: anything else.
    """
    if device == "cpu":
        return -1
    if not device.startswith(_CUDA) or not device[len(_CUDA) :].isdecimal():
        raise ValueError(f"no such device: {device}")
    return int(device[len(_CUDA) :])


def _proof(secret: Secret, body: bytes, lease: bytes) -> bytes:
    hasher = hashlib.sha256(len(lease).to_bytes(4, "big") + lease)
    hasher.update(body)  # megabytes, not to be copied for this
    return secret.prove("server", "nixl-endpoint", hasher.digest(), _NO_NONCE, _NO_NONCE)


def _malformed(reason: str) -> ProtocolError:
    return ProtocolError(f"a nixl endpoint is malformed: {reason}", "do not use this peer")
