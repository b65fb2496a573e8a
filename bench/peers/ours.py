"""weightwire's side of the comparison: ``publish`` and ``receive`` as any user calls them, timed from outside.

python bench/peers/ours.py source TRANSPORTS NBYTES COUNT [HOST]
python bench/peers/ours.py target TRANSPORT NBYTES COUNT URL

The bare wires that ours is held against run here, too, between the same memory of the same two processes: on a virtual
machine the same READ was half as fast again between two processes whose pages lay elsewhere.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

began_importing = time.time()

import torch  # noqa: E402  (what importing takes is one of the rows)
from process import Array, check, dirty, obey, tell, value_of  # noqa: E402
from torch import nn  # noqa: E402
from wires import SOURCES, TARGETS  # noqa: E402

import weightwire  # noqa: E402
from weightwire.auth import load_secret  # noqa: E402
from weightwire.config import Settings  # noqa: E402
from weightwire.loaders import module as _loaders  # noqa: E402, F401
from weightwire.metadata.registry import Times  # noqa: E402
from weightwire.metadata.server.app import EmbeddedServer, ServerSettings  # noqa: E402
from weightwire.target.pull import _Lane  # noqa: E402
from weightwire.target.schedule import Flight  # noqa: E402
from weightwire.target.session import PeerSession  # noqa: E402
from weightwire.target.verification import Verification  # noqa: E402
from weightwire.transport.base import Read  # noqa: E402

imported = time.time()
WARM_S = 2.0
IDENTITY = weightwire.module_identity("bench/weights", "ParameterList", "uint8", {}, revision="1")


def model(nbytes: int, count: int) -> nn.ParameterList:
    """Of ``count`` allocations, not touched."""
    size = nbytes // count
    return nn.ParameterList(
        nn.Parameter(torch.empty(size, dtype=torch.uint8), requires_grad=False) for _ in range(count)
    )


def arrays(weights: nn.ParameterList) -> list[Array]:
    return [parameter.data.numpy() for parameter in weights]


def memory_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise LookupError(field)


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


class Clock:
    """When what happened in one load, by wrapping what a load calls. Seconds of ``time.time``."""

    def __init__(self) -> None:
        self.marks: dict[str, float] = {}
        self.leased_s = 0.0
        self._wrap(PeerSession, "__init__", self._lease)
        self._wrap(PeerSession, "connect", self._connect)
        self.verify, self.check = Verification.check, _Lane.check_as_it_comes

    def _wrap(self, home: type, name: str, around: Callable[..., Any]) -> None:
        inner = getattr(home, name)
        setattr(home, name, lambda *given, **named: around(inner, *given, **named))

    def _lease(self, inner: Callable[..., None], *given: Any) -> None:
        began = time.time()
        inner(*given)
        self.leased_s += time.time() - began

    def _connect(self, inner: Callable[..., Any], *given: Any) -> Any:
        connection = inner(*given)
        self.marks.setdefault("connected", time.time())
        return connection

    def progress(self, phase: str, done: int, total: int, unit: str) -> None:
        del unit
        if phase == "transfer":
            self.marks.setdefault("first", time.time())
            if done == total:
                self.marks["last"] = time.time()


def _take(lane: _Lane, flight: Flight, read: Read, deadline: float) -> None:
    """What arrived counts as it is."""
    read.wait(deadline)
    lane.settle(flight, None, 0.0, 0.0)


def source(transports: str, nbytes: int, count: int, host: str = "127.0.0.1") -> None:
    weights = model(nbytes, count)
    for at, part in enumerate(arrays(weights)):
        part[:] = value_of(at)
    forget_peak()
    base = memory_kib("VmRSS")
    settings = Settings.from_env(transports=transports, bind=host)
    times = Times(ttl_s=WARM_S)  # a server that has just started waits as long before it answers
    server = EmbeddedServer(ServerSettings(secret=load_secret(settings.secret_file), host=host, times=times))
    began = time.monotonic()
    published = weightwire.publish(weights, IDENTITY, settings=Settings.from_env(url=server.url, transports=transports))
    took = time.monotonic() - began
    time.sleep(2 * WARM_S)
    tell(url=server.url, publish_s=took)
    above, bare = 0, list[object]()

    def act(command: Mapping[str, Any]) -> Mapping[str, object]:
        """Open or close a bare wire, whose memory is not ours; or tell of ours."""
        nonlocal above, base
        if not bare:
            above = max(above, memory_kib("VmHWM") - base)
        if way := command.get("bare"):
            base -= memory_kib("VmRSS")
            address, serving = SOURCES[way](arrays(weights))
            bare.append(serving)
            return {"address": address}
        if bare:
            bare.clear()
            gc.collect()
            base += memory_kib("VmRSS")
            forget_peak()
        return {"above_mib": round(above / 1024, 1), "readers": published.readers}

    obey(act)


def target(transport: str, nbytes: int, count: int, url: str) -> None:
    born = float(os.environ["BENCH_STARTED"])
    weights, clock = model(nbytes, count), Clock()
    settings = Settings.from_env(url=url, transports=transport)
    started = {"process": began_importing - born, "imports": imported - began_importing}
    tell(ready=True)

    def act(command: Mapping[str, Any]) -> Mapping[str, object]:
        nonlocal weights
        gc.collect()  # an eighth of a second beside torch: whose garbage falls into whose lap would be luck
        if way := command.get("bare"):
            return TARGETS[way](arrays(weights), command["address"])(command)
        if command.get("fresh"):  # memory that was never touched
            weights = model(nbytes, count)
        else:
            dirty(arrays(weights))
        verify = command.get("verify", True)
        _Lane.check_as_it_comes = clock.check if verify else _take  # type: ignore[method-assign]
        Verification.check = clock.verify if verify else lambda *_: None  # type: ignore[method-assign]
        forget_peak()
        base = memory_kib("VmRSS")
        clock.marks, clock.leased_s, began = {}, 0.0, time.time()
        report = weightwire.receive(weights, IDENTITY, settings=settings, progress=clock.progress)
        ended, marks = time.time(), clock.marks
        above = memory_kib("VmHWM") - base - (nbytes // 1024 if command.get("fresh") else 0)
        check(arrays(weights))
        return {
            "seconds": marks["last"] - marks["connected"],
            "transfer_s": report.seconds["transfer"],
            "whole_s": ended - began,
            "first_s": marks["first"] - began,
            "connect_s": marks["connected"] - began,
            "lease_s": clock.leased_s,
            "phases": report.seconds,
            "path": ",".join(report.paths),
            "above_mib": round(above / 1024, 1),
            "start": started,
        }

    obey(act)


if __name__ == "__main__":
    role, how, *rest = sys.argv[1:]
    if role == "source":
        source(how, int(rest[0]), int(rest[1]), *rest[2:])
    else:
        target(how, int(rest[0]), int(rest[1]), rest[2])
