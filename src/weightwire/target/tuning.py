"""How many streams and how large reads ``tcp`` should use on a link: measured, by verified pulls like any other.

A process of the command line's: ``python -m weightwire.target.tuning serve HOST MIB`` or ``… measure ENDPOINT MIB
SECONDS``. Both print one JSON object a line. What is measured is what a load does: whole pulls, digests included.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from weightwire.auth import Secret, load_secret
from weightwire.config import MAX_STREAMS, Settings
from weightwire.errors import TransferError, WeightwireError
from weightwire.manifest.address import AddressSpace, Region, Segment
from weightwire.manifest.digest import digest_bytes
from weightwire.manifest.leaves import LEAF_BYTES
from weightwire.manifest.records import Entry, Layout, Manifest
from weightwire.target.peers import Bounds
from weightwire.target.pull import Pull
from weightwire.target.schedule import Schedule
from weightwire.target.shares import EVERYTHING
from weightwire.transport.base import Connection, Registration
from weightwire.transport.tcp import TcpSettings, TcpTransport
from weightwire.types import Span, TensorClass

STREAMS = (1, 2, 4, 8)
READ_MIB = (2, 8, 16, 32)
LEASE = b"weightwire tune\0"
ROUNDS = 5
CLOSE = 0.03
"""Settings whose median is so near to the best one's are as good: of these, the fewest streams and smallest reads."""

MIB = 1 << 20


@dataclass(frozen=True, slots=True, order=True)
class Setting:
    """What is tried."""

    streams: int
    read_bytes: int


def settings_to_try(cores: int) -> list[Setting]:
    """More streams than twice the cores of this end are never worth a thread each."""
    streams = [count for count in STREAMS if count <= min(max(2, 2 * cores), MAX_STREAMS)]
    return [Setting(count, mib * MIB) for count in streams for mib in READ_MIB]


def choose(speeds: dict[Setting, list[float]]) -> Setting:
    """Of settings and what they reached, any unit. Pure."""
    medians = {setting: statistics.median(found) for setting, found in speeds.items()}
    best = max(medians.values())
    return min(setting for setting, median in medians.items() if median >= (1 - CLOSE) * best)


def content(nbytes: int) -> npt.NDArray[np.uint8]:
    """Both ends know it: one leaf of noise, again and again."""
    leaf = np.random.default_rng(20261126).integers(0, 256, LEAF_BYTES, dtype=np.uint8)
    return np.resize(leaf, nbytes)


class _Gate:
    registration: Registration

    def admit(self, lease: bytes, span: Span) -> Registration:
        del span  # the whole memory may be read
        if lease != LEASE:
            raise TransferError("not a lease of a measurement", "see: weightwire bench tune")
        return self.registration


def _space(memory: npt.NDArray[np.uint8]) -> AddressSpace:
    where = memory.ctypes.data
    return AddressSpace([Segment(0, where, memory.nbytes, "cpu")], [Region(where, memory.nbytes, "cpu")], memory)


def serve(secret: Secret, host: str, nbytes: int) -> TcpTransport:
    """Offer ``nbytes`` to whoever holds the secret, until closed; says where.

    Raises:
        ConfigError: no such address here.
    """
    gate = _Gate()
    transport = TcpTransport(secret, gate, host=host)
    gate.registration = transport.register(_space(content(nbytes)))
    _say(event="ready", endpoint=transport.describe(gate.registration, LEASE).hex())
    return transport


class _Peer:
    """The session of ``target.pull``: one peer that only this measurement knows, and that has all leaves."""

    label, transport, rate = "the other end", "tcp", 0.0
    relaying = growing = False

    def __init__(self, transport: TcpTransport, endpoint: bytes, lanes: int, leaves: int) -> None:
        self.lanes, self.share, self.limit = lanes, EVERYTHING, (1 << leaves) - 1
        self._transport, self._endpoint = transport, endpoint

    def connect(self, deadline: float) -> Connection:
        return self._transport.connect(self._endpoint, LEASE, deadline)

    def watch(self, failed: Callable[[TransferError], None], offers: Callable[[int], None]) -> None:
        """Nobody tells us anything."""

    def close(self) -> None:
        """Its connections are the pull's."""


class Measurement:
    """Pulls from ``endpoint`` under one setting after another.

    Args:
        secret: the other end holds it, too.
        endpoint: of ``serve``.
        nbytes: that it offers.
    """

    def __init__(self, secret: Secret, endpoint: bytes, nbytes: int) -> None:
        self._secret, self._endpoint = secret, endpoint
        self._memory = np.ones(nbytes, dtype=np.uint8)
        leaf = digest_bytes(content(LEAF_BYTES).data)
        entry = Entry(name="w", dtype="uint8", shape=(nbytes,), order=(0,), kind=TensorClass.WEIGHT, nbytes=nbytes)
        layout = Layout(entries=(entry,))
        self._manifest = Manifest(layout=layout, digests=leaf * len(layout.leaves))

    def pull(self, setting: Setting, nbytes: int, until: float) -> float:
        """Bytes a second of one verified pull of the first ``nbytes`` (whole leaves).

        Raises:
            TransferError: the other end is gone, or sent wrong bytes.
        """
        transport = TcpTransport(self._secret, settings=TcpSettings(read_bytes=setting.read_bytes))
        try:
            into = transport.register(_space(self._memory))
            leaves = self._manifest.layout.leaves
            schedule = Schedule(leaves, range(nbytes // LEAF_BYTES), LEAF_BYTES)
            bounds = Bounds(deadline=until, lanes=MAX_STREAMS)
            pull = Pull(self._manifest, {"tcp": into}, schedule, bounds)
            peer = _Peer(transport, self._endpoint, setting.streams, len(leaves))
            seconds = pull.run(iter([peer])).seconds
        finally:
            transport.close()
        return nbytes / seconds


def measure(
    pull: Callable[[Setting, int, float], float], tried: Sequence[Setting], nbytes: int, seconds: float
) -> Iterator[tuple[Setting, float]]:
    """Speeds of ``tried`` in turn, up to ``ROUNDS`` times, for about ``seconds``; each at least once.

    The first pull, which warms both ends up, is not told; where the link is slow all others are shorter for it.
    """
    began = time.monotonic()
    until = began + 4 * seconds
    first = min(nbytes, 32 * MIB)
    speed = pull(tried[-1], first, until)
    affordable = int(speed * seconds / len(tried) / 2) // LEAF_BYTES * LEAF_BYTES
    size = max(min(nbytes, affordable), min(nbytes, 8 * LEAF_BYTES))
    for lap in range(ROUNDS):
        for setting in tried:
            if lap and time.monotonic() - began > seconds:
                return
            yield setting, pull(setting, size, until)


def main() -> None:
    """See the module."""
    how, where, mib, *rest = sys.argv[1:]
    logging.getLogger().addHandler(logging.NullHandler())  # what goes wrong is told as an event, once
    try:
        secret = load_secret(Settings.from_env().secret_file)
        if how == "serve":
            transport = serve(secret, where, int(mib) * MIB)
            sys.stdin.read()
            transport.close()
        else:
            _measure(secret, bytes.fromhex(where), int(mib) * MIB, float(rest[0]))
    except WeightwireError as error:
        _say(event="failed", kind=type(error).__name__, problem=error.problem, remedy=error.remedy)


def _measure(secret: Secret, endpoint: bytes, nbytes: int, seconds: float) -> None:
    tried = settings_to_try(len(os.sched_getaffinity(0)))
    speeds: dict[Setting, list[float]] = {}
    for setting, speed in measure(Measurement(secret, endpoint, nbytes).pull, tried, nbytes, seconds):
        speeds.setdefault(setting, []).append(speed)
        _say(event="progress", streams=setting.streams, read_bytes=setting.read_bytes, speed=speed)
    best = choose(speeds)
    rows = [
        {"streams": each.streams, "read_bytes": each.read_bytes, "speed": statistics.median(found), "runs": len(found)}
        for each, found in speeds.items()
    ]
    _say(event="measured", rows=rows, streams=best.streams, read_bytes=best.read_bytes)


def _say(**event: object) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
