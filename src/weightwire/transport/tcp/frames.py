"""Every byte of the tcp protocol that is not a weight: pure encoding and strict, bounded decoding.

One connection, one lease. Integers are big-endian.

    client -> server  hello      magic 8, version u16, reserved u16, lease 16, client nonce 32
    server -> client  challenge  server nonce 32, server proof 32
    client -> server  proof      32
    server -> client  verdict    u32: 0 welcome, 1 refused
    then, pipelined:
    client -> server  request    op u32, sequence u32, offset u64, nbytes u32
    server -> client  answer     status u32, sequence u32, nbytes u32, then that many bytes
"""

from __future__ import annotations

import enum
import ipaddress
import json
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from weightwire.auth import NONCE_BYTES, PROOF_BYTES
from weightwire.errors import ProtocolError
from weightwire.types import Span

MAGIC = b"wwirebyt"
VERSION = 1
LEASE_BYTES = 16
INCARNATION_BYTES = 16
MAX_READ_BYTES = 64 * 1024 * 1024
"""Most bytes of one request; a longer read is sent as several."""
MAX_HOSTS = 8
MAX_ENDPOINT_BYTES = 4096
"""Most bytes of an encoded tcp endpoint (the seam's own bound is far larger, for other backends)."""
SEQUENCES = 1 << 32
"""Sequence numbers wrap here."""

_HELLO = struct.Struct(f">8sHH{LEASE_BYTES}s{NONCE_BYTES}s")
_CHALLENGE = struct.Struct(f">{NONCE_BYTES}s{PROOF_BYTES}s")
_VERDICT = struct.Struct(">I")
_REQUEST = struct.Struct(">IIQI")
_ANSWER = struct.Struct(">III")

HELLO_BYTES = _HELLO.size
CHALLENGE_BYTES = _CHALLENGE.size
VERDICT_BYTES = _VERDICT.size
REQUEST_BYTES = _REQUEST.size
ANSWER_BYTES = _ANSWER.size

_READ = 1
_INCARNATION = re.compile(r"[0-9a-f]{32}")


class Status(enum.IntEnum):
    """What an answer says of its request; anything but ``OK`` is followed by no bytes."""

    OK = 0
    MOVED = 1
    """The lease is over: the source withdrew or changed what it had published."""
    REFUSED = 2
    """The lease is unknown, or the span is outside what may be read under it."""
    GONE = 3
    """The source cannot serve: it is closing, or failed inside."""
    NOT_YET = 4
    """A relay that does not have these bytes yet: they may be asked for again later, on the same connection."""


class Hello(NamedTuple):
    """First words of a client."""

    lease: bytes
    nonce: bytes


class Request(NamedTuple):
    """One read."""

    sequence: int
    span: Span


def encode_hello(hello: Hello) -> bytes:
    """``HELLO_BYTES`` bytes."""
    return _HELLO.pack(MAGIC, VERSION, 0, hello.lease, hello.nonce)


def decode_hello(data: bytes | bytearray) -> Hello:
    """The hello in ``HELLO_BYTES`` bytes.

    Raises:
        ProtocolError: another protocol or another version.
    """
    magic, version, reserved, lease, nonce = _HELLO.unpack(data)
    if magic != MAGIC or version != VERSION or reserved:
        raise ProtocolError("a client speaks another protocol or version")
    return Hello(lease, nonce)


def encode_challenge(nonce: bytes, proof: bytes) -> bytes:
    """``CHALLENGE_BYTES`` bytes."""
    return _CHALLENGE.pack(nonce, proof)


def decode_challenge(data: bytes | bytearray) -> tuple[bytes, bytes]:
    """Server nonce and server proof from ``CHALLENGE_BYTES`` bytes."""
    nonce, proof = _CHALLENGE.unpack(data)
    return nonce, proof


def encode_verdict(*, welcome: bool) -> bytes:
    """``VERDICT_BYTES`` bytes; a refusal says nothing of its reason."""
    return _VERDICT.pack(0 if welcome else 1)


def decode_verdict(data: bytes | bytearray) -> bool:
    """Whether the server lets the client in."""
    return bool(_VERDICT.unpack(data)[0] == 0)


def encode_request(request: Request) -> bytes:
    """``REQUEST_BYTES`` bytes."""
    return _REQUEST.pack(_READ, request.sequence, request.span.offset, request.span.nbytes)


def decode_request(data: bytes | bytearray) -> Request:
    """The request in ``REQUEST_BYTES`` bytes.

    Raises:
        ProtocolError: not a read, or longer than ``MAX_READ_BYTES``.
    """
    op, sequence, offset, nbytes = _REQUEST.unpack(data)
    if op != _READ:
        raise ProtocolError(f"a client asked for operation {op}")
    if nbytes > MAX_READ_BYTES:
        raise ProtocolError(f"a client asked for {nbytes} bytes at once")
    return Request(sequence, Span(offset, nbytes))


def encode_answer(status: Status, request: Request) -> bytes:
    """``ANSWER_BYTES`` bytes that head the answer to ``request``."""
    return _ANSWER.pack(status, request.sequence, request.span.nbytes if status is Status.OK else 0)


def decode_answer(data: bytes | bytearray, request: Request) -> Status:
    """The status in ``ANSWER_BYTES`` bytes, which must answer exactly ``request``.

    Raises:
        ProtocolError: an unknown status, another sequence number, or another length than what was asked for.
    """
    number, sequence, nbytes = _ANSWER.unpack(data)
    try:
        status = Status(number)
    except ValueError:
        raise ProtocolError(f"a peer answered with status {number}", "do not use this peer") from None
    expected = request.span.nbytes if status is Status.OK else 0
    if sequence != request.sequence or nbytes != expected:
        raise ProtocolError(
            f"a peer answered read {request.sequence} of {expected} bytes with {nbytes} bytes for read {sequence}",
            "do not use this peer",
        )
    return status


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a transport serves.

    Attributes:
        hosts: IP addresses to try in this order, 1 to ``MAX_HOSTS``; never names, whose look-up has no bound.
        port: 1 to 65535.
        incarnation: 16 bytes, fresh for every serving transport object: a restarted peer is another peer.
    """

    hosts: tuple[str, ...]
    port: int
    incarnation: bytes

    def encode(self) -> bytes:
        """Compact JSON, at most ``MAX_ENDPOINT_BYTES``."""
        fields = {"v": VERSION, "hosts": self.hosts, "port": self.port, "incarnation": self.incarnation.hex()}
        return json.dumps(fields, separators=(",", ":")).encode()

    @classmethod
    def decode(cls, data: bytes) -> Endpoint:
        """The endpoint in ``data``, which a peer sent.

        Raises:
            ProtocolError: anything but exactly the known fields with legal values.
        """
        if len(data) > MAX_ENDPOINT_BYTES:
            raise _malformed(f"it has {len(data)} bytes")
        try:
            fields = json.loads(data)
        except (ValueError, RecursionError):
            raise _malformed("it is not JSON") from None
        if not isinstance(fields, dict) or set(fields) != set(_FIELDS):
            raise _malformed("its fields are not the known ones")
        for name, legal in _FIELDS.items():
            if not legal(fields[name]):
                raise _malformed(f"{name} has no legal value")
        return cls(tuple(fields["hosts"]), fields["port"], bytes.fromhex(fields["incarnation"]))


def _malformed(reason: str) -> ProtocolError:
    return ProtocolError(f"a tcp endpoint is malformed: {reason}", "do not use this peer")


def is_address(host: object) -> bool:
    """Whether ``host`` is the text of an IPv4 or IPv6 address (without a zone)."""
    if not isinstance(host, str) or len(host) > 45 or "%" in host:
        return False
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _legal_hosts(value: object) -> bool:
    return isinstance(value, list) and 1 <= len(value) <= MAX_HOSTS and all(is_address(host) for host in value)


_FIELDS: dict[str, Callable[[object], bool]] = {
    "v": lambda value: type(value) is int and value == VERSION,
    "hosts": _legal_hosts,
    "port": lambda value: type(value) is int and 1 <= value <= 65535,
    "incarnation": lambda value: isinstance(value, str) and _INCARNATION.fullmatch(value) is not None,
}
