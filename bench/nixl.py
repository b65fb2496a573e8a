"""GB/s of the nixl transport between two processes of one host, against one bare NIXL READ in the same run.

    python bench/nixl.py --mib 1024 --tensors 8 2000 20000 --repeat 5 --json

Ways, interleaved, medians compared, because absolute figures of a shared machine mean little:

* ``ours``: our connection, in chunks of ``--chunk-mib``, as many under way as it asks for;
* ``bare default``: one READ of everything by agents as NIXL makes them (progress threads on both sides);
* ``bare ours``: one READ of everything by agents with our settings.

Every tensor is an allocation of its own, the worst case for registration. A source that is not in turn is stopped, as
NIXL's default progress thread takes a core whatever it does. No digest is computed: this is the wire alone.
Which UCX transport it is comes first; set UCX_TLS to choose.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from weightwire.auth import Secret
from weightwire.manifest.address import AddressSpace, Region, Segment
from weightwire.transport.base import Read, Registration
from weightwire.transport.nixl import NixlTransport
from weightwire.transport.nixl.agent import bindings
from weightwire.transport.nixl.endpoint import Endpoint
from weightwire.transport.nixl.exit import leave
from weightwire.types import Span

HERE = Path(__file__).resolve()
sys.path[:] = [path for path in sys.path if Path(path).resolve() != HERE.parent]  # or this file would be package nixl
os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")

SECRET = Secret(b"bench only, one host only")
LEASE = bytes(16)
MIB = 1 << 20


def tensors(nbytes: int, count: int, fill: int) -> AddressSpace:
    """``count`` allocations of equal size, every page touched."""
    size = nbytes // count
    parts: list[npt.NDArray[np.uint8]] = [np.full(size, fill, dtype=np.uint8) for _ in range(count)]
    segments = [Segment(at * size, part.ctypes.data, size, "cpu") for at, part in enumerate(parts)]
    return AddressSpace(segments, [Region(s.address, s.nbytes, "cpu") for s in segments], parts)


class Gate:
    def admit(self, lease: bytes, span: Span) -> Registration:
        raise NotImplementedError


def rows(memory: AddressSpace) -> npt.NDArray[np.uint64]:
    return np.array([(s.address, s.nbytes, 0) for s in memory.segments], dtype=np.uint64)


def default_agent(name: str, *, ours: bool) -> Any:
    from nixl._api import nixl_agent, nixl_agent_config

    return nixl_agent(name, nixl_agent_config(enable_prog_thread=not ours, backends=["UCX"]))


def serve(way: str, nbytes: int, count: int) -> None:
    memory = tensors(nbytes, count, 7)
    bindings()  # importing is not registering
    began = time.perf_counter()
    kept: Any
    if way == "ours":
        kept = NixlTransport(SECRET, Gate())
        endpoint = kept.describe(kept.register(memory), LEASE)
    else:
        kept = default_agent("bench-source", ours=False)
        kept.register_memory(rows(memory), "DRAM")
        endpoint = Endpoint("0" * 16 + "/s1", kept.get_agent_metadata(), memory).encode(SECRET, LEASE)
    print(json.dumps({"endpoint": endpoint.hex(), "register_s": time.perf_counter() - began}), flush=True)
    sys.stdin.read()
    os._exit(0)


class Source:
    def __init__(self, way: str, nbytes: int, count: int) -> None:
        command = [sys.executable, __file__, "--serve", way, "--mib", str(nbytes // MIB), "--tensors", str(count)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        said = json.loads(self.process.stdout.readline())
        self.endpoint, self.register_s = bytes.fromhex(said["endpoint"]), float(said["register_s"])
        self.turn(on=False)

    def turn(self, *, on: bool) -> None:
        self.process.send_signal(signal.SIGCONT if on else signal.SIGSTOP)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def read_ours(source: Source, into: AddressSpace, chunk: int, seen: dict[str, object]) -> tuple[float, float]:
    transport = NixlTransport(SECRET)
    began = time.perf_counter()
    connection = transport.connect(source.endpoint, LEASE, time.monotonic() + 30)
    registration = transport.register(into)
    connection.read(Span(0, 1), registration).wait(time.monotonic() + 30)
    prepared = time.perf_counter()
    under_way: deque[Read] = deque()
    deadline = time.monotonic() + 300
    for offset in range(0, into.span.nbytes, chunk):
        under_way.append(connection.read(Span(offset, min(chunk, into.span.nbytes - offset)), registration))
        if len(under_way) >= connection.depth:
            under_way.popleft().wait(deadline)
    while under_way:
        under_way.popleft().wait(deadline)
    ended = time.perf_counter()
    seen["path"] = connection.path
    connection.fence(time.monotonic() + 10)
    return prepared - began, ended - prepared


def read_bare(source: Source, into: AddressSpace, *, ours: bool) -> tuple[float, float]:
    remote = Endpoint.decode(source.endpoint, SECRET, LEASE)
    began = time.perf_counter()
    agent = default_agent(f"bench-{time.time_ns()}", ours=ours)
    agent.register_memory(rows(into), "DRAM")
    peer = agent.add_remote_agent(remote.metadata)
    local = agent.get_xfer_descs(rows(into), "DRAM")
    theirs = agent.get_xfer_descs(rows(remote.memory), "DRAM")
    warm = agent.initialize_xfer(
        "READ",
        agent.get_xfer_descs(rows(into)[:1], "DRAM"),
        agent.get_xfer_descs(rows(remote.memory)[:1], "DRAM"),
        peer,
    )
    finish(agent, warm)
    prepared = time.perf_counter()
    handle = agent.initialize_xfer("READ", local, theirs, peer)
    finish(agent, handle)
    return prepared - began, time.perf_counter() - prepared


def finish(agent: Any, handle: Any) -> None:
    state = agent.transfer(handle)
    while state == "PROC":
        state = agent.check_xfer_state(handle)
    assert state == "DONE", state
    agent.release_xfer_handle(handle)


def measure(nbytes: int, count: int, repeat: int, chunk: int) -> dict[str, object]:
    sources = {"ours": Source("ours", nbytes, count), "default": Source("default", nbytes, count)}
    into = tensors(nbytes, count, 1)
    seen: dict[str, object] = {}
    ways: dict[str, tuple[str, Callable[[Source], tuple[float, float]]]] = {
        "ours": ("ours", lambda source: read_ours(source, into, chunk, seen)),
        "bare default": ("default", lambda source: read_bare(source, into, ours=False)),
        "bare ours": ("ours", lambda source: read_bare(source, into, ours=True)),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for lap in range(repeat + 1):  # the first one warms up
        for name, (which, read) in ways.items():
            sources[which].turn(on=True)
            found = read(sources[which])
            sources[which].turn(on=False)
            if lap:
                times[name].append(found)
    for source in sources.values():
        source.end()
    total = nbytes // count * count
    gbps = {name: total / statistics.median(each[1] for each in found) / 1e9 for name, found in times.items()}
    prepare = {name: statistics.median(each[0] for each in found) for name, found in times.items()}
    return {
        "tensors": count,
        "path": seen["path"],
        "gbps": {name: round(value, 2) for name, value in gbps.items()},
        "ours_of_bare_default": round(gbps["ours"] / gbps["bare default"], 2),
        "ours_of_bare_ours": round(gbps["ours"] / gbps["bare ours"], 2),
        "connect_and_register_s": {name: round(value, 3) for name, value in prepare.items()},
        "source_register_s": {name: round(source.register_s, 3) for name, source in sources.items()},
        "endpoint_bytes": len(sources["ours"].endpoint),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--tensors", type=int, nargs="+", default=[8, 2000, 20000])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--chunk-mib", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", choices=["ours", "default"], help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.serve:
        serve(chosen.serve, chosen.mib * MIB, chosen.tensors[0])
    results = [measure(chosen.mib * MIB, count, chosen.repeat, chosen.chunk_mib * MIB) for count in chosen.tensors]
    if chosen.json:
        print(json.dumps(results, indent=2))
    else:
        for result in results:
            print(", ".join(f"{name} {value}" for name, value in result.items()))
    leave(0)


if __name__ == "__main__":
    main()
