"""Opening the transports that the settings ask for, and saying by name which of them cannot be had here."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from weightwire.auth import Secret
from weightwire.config import Settings
from weightwire.errors import ConfigError, TransferError, WeightwireError
from weightwire.transport.base import ReadGate, Transport
from weightwire.transport.inproc import InprocTransport
from weightwire.transport.pacing import Pacer
from weightwire.transport.tcp.settings import READ_BYTES, STREAMS, TcpSettings
from weightwire.transport.tcp.transport import TcpTransport

log = logging.getLogger(__name__)

Gates = Callable[[str], ReadGate]
"""Name of a transport -> the gate that it asks."""


@dataclass(kw_only=True)
class Opened:
    """What came of it.

    Attributes:
        transports: by name, preferred first; at least one.
        unavailable: name -> why not, for logs and reports.
    """

    transports: dict[str, Transport] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)


def open_transports(
    settings: Settings, secret: Secret, gates: Gates | None, bind: str, advertise: str, pacer: Pacer | None = None
) -> Opened:
    """Open every transport of ``settings``, in their order.

    Args:
        settings: which, and whether anything but RDMA is refused.
        secret: the shared secret.
        gates: for a process that serves; ``None`` for one that only reads.
        bind: address to serve on.
        advertise: address or name under which other hosts reach it.
        pacer: keeps what is served to a rate, on transports that can do so.

    Raises:
        ConfigError: none of them works here; names each with its reason.
    """
    opened = Opened(unavailable=dict(settings.refused))
    for name in settings.offered:
        if settings.require_rdma and name != "nixl":
            opened.unavailable[name] = "require_rdma is set"
            continue
        try:
            opened.transports[name] = _open(name, settings, secret, gates, (bind, advertise), pacer)
        except (ConfigError, TransferError) as error:
            opened.unavailable[name] = error.problem
            log.warning("transport %s is not available: %s", name, error)
    if not opened.transports:
        reasons = "; ".join(f"{name}: {why}" for name, why in opened.unavailable.items())
        raise ConfigError(f"no transport works here ({reasons})", "see: weightwire doctor")
    return opened


def close_transports(opened: Opened) -> None:
    """Close all; what does not end in time is logged."""
    for name, transport in opened.transports.items():
        try:
            transport.close()
        except WeightwireError as error:
            log.warning("closing %s: %s", name, error)


def _open(
    name: str, settings: Settings, secret: Secret, gates: Gates | None, where: tuple[str, str], pacer: Pacer | None
) -> Transport:
    gate = gates(name) if gates else None
    if name == "tcp":
        return TcpTransport(
            secret,
            gate,
            host=where[0],
            advertise=[where[1]],
            pacer=pacer,
            settings=TcpSettings(
                streams=settings.tcp_streams or STREAMS, read_bytes=settings.tcp_read_bytes or READ_BYTES
            ),
        )
    if name == "inproc":
        return InprocTransport(gate)
    from weightwire.transport.nixl import NixlTransport  # noqa: PLC0415  (an optional, heavy package)

    return NixlTransport(secret, gate, require_rdma=settings.require_rdma, untrusted_readers=settings.untrusted_readers)
