"""What every gRPC server of ours has in common: options, its own port, and how it says that the port is taken."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

from weightwire.errors import ConfigError
from weightwire.wire import bounds


def options(keepalive_s: float) -> tuple[tuple[str, int], ...]:
    """Server options.

    Args:
        keepalive_s: a client that answers no ping for twice this long is gone.
    """
    beat = max(100, int(keepalive_s * 1000))
    return (
        ("grpc.so_reuseport", 0),  # two processes on one port would split the calls (hazard H50)
        ("grpc.max_send_message_length", bounds.MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", bounds.MAX_MESSAGE_BYTES),
        ("grpc.max_concurrent_streams", 1024),
        ("grpc.keepalive_time_ms", beat),
        ("grpc.keepalive_timeout_ms", beat),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 500),
        ("grpc.keepalive_permit_without_calls", 1),
    )


def numeric(host: str, port: int) -> str:
    """``host:port`` with one address in digits, so that a name with several addresses is never half bound.

    Raises:
        ConfigError: the name does not resolve, or the port is not one.
    """
    if not 0 <= port <= 65535:
        raise ConfigError(f"port {port} is outside 0..65535", "give a free port, or 0 to have one chosen")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"cannot resolve the address {host!r} to listen on: {error}", "give an IP address") from error
    best = min(found, key=lambda item: item[0] != socket.AF_INET)
    return join(str(best[4][0]), port)


def join(host: str, port: int) -> str:
    """``host:port``, with brackets where the host is an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def bind(add_insecure_port: Callable[[str], Any], host: str, port: int) -> int:
    """Bind a server that has not started; the port that it got.

    Raises:
        ConfigError: the port is taken, or the address is not one of this machine.
    """
    address = numeric(host, port)
    try:
        bound = int(add_insecure_port(address))
    except (RuntimeError, ValueError) as error:
        raise ConfigError(_taken(address), "choose a free port, or 0 to have one chosen") from error
    if bound == 0:
        raise ConfigError(_taken(address), "choose a free port, or 0 to have one chosen")
    return bound


def _taken(address: str) -> str:
    return f"cannot listen on {address}: the port is taken, or the address is not this machine's"
