"""Whether what a source advertises can be reached by others, found out before it is published (hazard H44)."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import struct
import sys

from weightwire.errors import ConfigError, PublishError

_SIOCGIFADDR = 0x8915

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def split(endpoint: str) -> tuple[str, int]:
    """Host and port of ``host:port`` (an IPv6 host in brackets).

    Raises:
        ConfigError: it is not that.
    """
    host, _, port = endpoint.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise ConfigError(f"{endpoint!r} is not host:port", "give for instance 10.0.0.7:8471")
    return host, int(port)


def local_address(server: str) -> str:
    """The address of this machine that packets to ``server`` (``host:port``) leave from; what a source advertises.

    Raises:
        ConfigError: ``server`` cannot be resolved or routed to.
    """
    host, port = split(server)
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)  # sends nothing; asks the routing table
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ConfigError(f"cannot find a way to {server}: {error}", "check the metadata server's address") from error


def check_endpoint(endpoint: str, server: str, *, timeout: float = 3.0) -> None:
    """Refuse to advertise what others cannot reach.

    A loopback address is refused where the metadata server is on another machine, an unspecified one everywhere; then
    a connection is made to the advertised address, which must be listening already.

    Args:
        endpoint: ``host:port`` that would be advertised.
        server: ``host:port`` of the metadata server.
        timeout: seconds for the connection.

    Raises:
        PublishError: it cannot be reached; names the address and the interface that should have been used.
    """
    host, port = split(endpoint)
    address = _resolve(host, endpoint)
    way = local_address(server)
    if address.is_unspecified:
        raise PublishError(f"the endpoint {endpoint} is no address that can be reached", _advice(way))
    if address.is_loopback and not ipaddress.ip_address(way).is_loopback:
        raise PublishError(
            f"the endpoint {endpoint} is a loopback address, but the metadata server {server} is on another machine",
            _advice(way),
        )
    try:
        socket.create_connection((str(address), port), timeout).close()
    except OSError as error:
        raise PublishError(
            f"the endpoint {endpoint} ({address}) cannot be reached from its own machine: {error}", _advice(way)
        ) from error


def interface_of(address: str) -> str:
    """The name of the interface that has this IPv4 address; "" where that cannot be found out."""
    if not sys.platform.startswith("linux"):
        return ""
    import fcntl  # noqa: PLC0415  (Linux only)

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an address
                packed = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(packed[20:24]) == address:
                    return name
    return ""


def _resolve(host: str, endpoint: str) -> Address:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        pass
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise PublishError(
            f"the host of the endpoint {endpoint} cannot be resolved: {error}", "advertise an address"
        ) from error
    best = min(found, key=lambda item: item[0] != socket.AF_INET)
    return ipaddress.ip_address(str(best[4][0]).partition("%")[0])


def _advice(way: str) -> str:
    interface = interface_of(way)
    return f"advertise {way}" + (f" of interface {interface}" if interface else "")
