"""Transports as the tests make them, here and in source processes."""

from __future__ import annotations

from transport.peers import OTHER_SECRET, SECRET

from weightwire.transport.base import ReadGate
from weightwire.transport.inproc import InprocTransport
from weightwire.transport.tcp import TcpTransport


def inproc(gate: ReadGate | None) -> InprocTransport:
    return InprocTransport(gate)


def tcp(gate: ReadGate | None) -> TcpTransport:
    return TcpTransport(SECRET, gate)


def tcp_stranger() -> TcpTransport:
    return TcpTransport(OTHER_SECRET)
