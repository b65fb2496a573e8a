from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transport.peers import LEASE, OTHER_SECRET, SECRET

from weightwire.errors import AuthError, ProtocolError
from weightwire.manifest.address import AddressSpace, Segment
from weightwire.transport.nixl import endpoint as codec
from weightwire.transport.nixl.endpoint import Endpoint

SIZES = st.lists(
    st.tuples(st.integers(1, 1 << 40), st.integers(1, (1 << 63) - 1), st.integers(-1, 1023)), min_size=0, max_size=20
)
GOOD = Endpoint(
    "0123456789abcdef/s1",
    b"\x00metadata\xff",
    AddressSpace([Segment(10, 4096, 5, "cpu"), Segment(15, 9000, 7, "cuda:3")], (), None),
)


def signed(body: bytes) -> bytes:
    """What a peer that holds the secret, and is broken or hostile, could send."""
    return body + codec._proof(SECRET, body, LEASE)


def body_of(found: Endpoint) -> bytearray:
    return bytearray(found.encode(SECRET, LEASE)[:-32])


@settings(deadline=None)
@given(start=st.integers(0, 1 << 60), rows=SIZES, metadata=st.binary(max_size=200))
def test_what_was_encoded_is_decoded(start: int, rows: list[tuple[int, int, int]], metadata: bytes) -> None:
    segments, at = [], start
    for nbytes, address, device in rows:
        segments.append(Segment(at, address, nbytes, "cpu" if device < 0 else f"cuda:{device}"))
        at += nbytes
    sent = Endpoint("0123456789abcdef/s12", metadata, AddressSpace(segments, (), None))
    found = Endpoint.decode(sent.encode(SECRET, LEASE), SECRET, LEASE)
    assert (found.agent, found.metadata, found.memory.segments) == (sent.agent, metadata, tuple(segments))


@settings(deadline=None)
@given(data=st.binary(max_size=400))
def test_h49_garbage_is_refused(data: bytes) -> None:
    with pytest.raises((ProtocolError, AuthError)):
        Endpoint.decode(data, SECRET, LEASE)


@settings(deadline=None)
@given(at=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_h49_one_flipped_bit_never_reaches_nixl(at: int, bit: int) -> None:
    data = bytearray(GOOD.encode(SECRET, LEASE))
    data[at % len(data)] ^= 1 << bit
    with pytest.raises((ProtocolError, AuthError)):
        Endpoint.decode(bytes(data), SECRET, LEASE)


def test_h49_another_secret_or_another_lease_is_refused() -> None:
    data = GOOD.encode(SECRET, LEASE)
    for secret, lease in ((OTHER_SECRET, LEASE), (SECRET, bytes(16)), (SECRET, b"")):
        with pytest.raises(AuthError):
            Endpoint.decode(data, secret, lease)


@pytest.mark.parametrize(("offset", "layout", "value"), [(9, "<Q", 1 << 61), (17, "<I", 1 << 31), (21, "<I", 1 << 31)])
def test_h39_counts_out_of_bounds_are_refused_before_anything_is_allocated(
    offset: int, layout: str, value: int
) -> None:
    body = body_of(GOOD)
    struct.pack_into(layout, body, offset, value)
    with pytest.raises(ProtocolError, match="a count is out of bounds"):
        Endpoint.decode(signed(bytes(body)), SECRET, LEASE)


@pytest.mark.parametrize(
    ("field", "layout", "value"),
    [(0, "<Q", 0), (0, "<Q", 1 << 63), (8, "<Q", 0), (8, "<Q", (1 << 40) + 1), (16, "<i", -2), (16, "<i", 1024)],
)
def test_h39_segments_out_of_bounds_are_refused(field: int, layout: str, value: int) -> None:
    body = body_of(GOOD)
    struct.pack_into(layout, body, len(body) - 40 + field, value)
    with pytest.raises(ProtocolError, match="a segment is out of bounds"):
        Endpoint.decode(signed(bytes(body)), SECRET, LEASE)


@pytest.mark.parametrize("name", ["x", "0123456789abcdef/1", "0123456789ABCDEF/s1", "0123456789abcdef/s1\n", "../s1"])
def test_h39_odd_agent_names_are_refused(name: str) -> None:
    body = bytes(body_of(Endpoint(name, GOOD.metadata, GOOD.memory)))
    with pytest.raises(ProtocolError, match="illegal name"):
        Endpoint.decode(signed(body), SECRET, LEASE)
