"""Who and where this machine is, as far as peers are told."""

from __future__ import annotations

import hashlib
import socket
from pathlib import Path

from weightwire.errors import ConfigError

_IDS = (Path("/etc/machine-id"), Path("/proc/sys/kernel/random/boot_id"))


def host_id() -> str:
    """A stable id of this machine in this boot, which names nothing: 16 hex digits."""
    parts = [socket.gethostname()]
    for path in _IDS:
        try:
            parts.append(path.read_text())
        except OSError:
            continue
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def facing(target: str) -> str:
    """The local address from which ``target`` (``host:port``) is reached; nothing is sent.

    Raises:
        ConfigError: the name does not resolve, or there is no route.
    """
    host, _, port = target.rpartition(":")
    try:
        family, _, _, _, where = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(where)
            return str(probe.getsockname()[0])
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cannot tell which address faces {target}: {error}", "set WEIGHTWIRE_BIND to an address of this host"
        ) from error
