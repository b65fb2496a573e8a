"""The nixl backend as the tests make it, here and in source processes."""

from __future__ import annotations

from transport.peers import OTHER_SECRET, SECRET

from weightwire.transport.base import ReadGate
from weightwire.transport.nixl import NixlTransport


def nixl(gate: ReadGate | None) -> NixlTransport:
    return NixlTransport(SECRET, gate)


def nixl_stranger() -> NixlTransport:
    return NixlTransport(OTHER_SECRET)
