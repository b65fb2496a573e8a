"""What a bandwidth cap does: one source over tcp, capped at a part of its own rate, and several readers at once.

    python bench/cap.py --mib 256 --readers 1 4 8 --part 0.25 --repeat 3 --json

The source and each reader are processes. First all readers take everything without a cap; the median is the uncapped
rate. Then the same again with a cap of ``--part`` of it. Reported: what the source really sent a second against the cap
(from the first reader's start to the last one's end), the time against bytes / cap, and how far the readers' own times
are apart. No digest is computed: this is the wire alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from weightwire.auth import Secret
from weightwire.manifest.address import AddressSpace, Region, Segment
from weightwire.transport.base import Read, Registration
from weightwire.transport.pacing import Pacer
from weightwire.transport.tcp import TcpTransport
from weightwire.types import Span

SECRET = Secret(b"bench only, loopback only")
LEASE = bytes(16)
MIB = 1 << 20
CHUNK = 8 * MIB
STREAMS = 2
DEPTH = 2


class Gate:
    registration: Registration

    def admit(self, lease: bytes, span: Span) -> Registration:
        del lease, span
        return self.registration


def space(nbytes: int, fill: int) -> AddressSpace:
    memory = np.full(nbytes, fill, dtype=np.uint8)
    where = memory.ctypes.data
    return AddressSpace([Segment(0, where, nbytes, "cpu")], [Region(where, nbytes, "cpu")], memory)


def serve(nbytes: int) -> None:
    """The source: each line on standard input is the cap from now on."""
    pacer, gate = Pacer(), Gate()
    transport = TcpTransport(SECRET, gate, pacer=pacer)
    gate.registration = transport.register(space(nbytes, 7))
    print(transport.describe(gate.registration, LEASE).hex(), flush=True)
    for line in sys.stdin:
        pacer.rate = float(line)
        print("ok", flush=True)
    os._exit(0)


def read(nbytes: int, endpoint: bytes) -> None:
    """A reader: for each line on standard input takes everything once; answers when it began and ended."""
    transport = TcpTransport(SECRET)
    memory = space(nbytes, 0)
    into = transport.register(memory)
    print("ready", flush=True)
    for _ in sys.stdin:
        connections = [transport.connect(endpoint, LEASE, time.monotonic() + 10) for _ in range(STREAMS)]
        began, deadline = time.monotonic(), time.monotonic() + 600
        under_way: deque[Read] = deque()
        for at, offset in enumerate(range(0, nbytes, CHUNK)):
            span = Span(offset, min(CHUNK, nbytes - offset))
            under_way.append(connections[at % STREAMS].read(span, into))
            if len(under_way) >= STREAMS * DEPTH:
                under_way.popleft().wait(deadline)
        for each in under_way:
            each.wait(deadline)
        print(json.dumps([began, time.monotonic()]), flush=True)
        for connection in connections:
            connection.fence(time.monotonic() + 5)
    os._exit(0)


class Child:
    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        )
        self.first = self.line()

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def tell(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def together(readers: Sequence[Child]) -> tuple[float, list[float]]:
    """Seconds from the first reader's beginning to the last one's end, and each one's own."""
    for reader in readers:
        reader.tell("go")
    times: list[tuple[float, float]] = [tuple(json.loads(reader.line())) for reader in readers]
    return max(end for _, end in times) - min(begin for begin, _ in times), [end - begin for begin, end in times]


def capped(source: Child, readers: Sequence[Child], cap: float) -> tuple[float, list[float]]:
    source.tell(str(cap))
    source.line()
    return together(readers)


def measure(nbytes: int, count: int, part: float, repeat: int) -> dict[str, float]:
    source = Child("--serve", str(nbytes))
    readers = [Child("--read", str(nbytes), source.first) for _ in range(count)]
    try:
        together(readers)  # pages touched, sockets warm
        uncapped = statistics.median(count * nbytes / together(readers)[0] for _ in range(repeat))
        cap = part * uncapped
        runs = [capped(source, readers, cap) for _ in range(repeat)]
    finally:
        for child in (source, *readers):
            child.end()
    elapsed = statistics.median(total for total, _ in runs)
    return {
        "readers": count,
        "uncapped_mb_s": round(uncapped / 1e6, 1),
        "cap_mb_s": round(cap / 1e6, 1),
        "egress_mb_s": round(count * nbytes / elapsed / 1e6, 1),
        "egress_of_cap": round(count * nbytes / elapsed / cap, 4),
        "seconds": round(elapsed, 3),
        "time_of_bound": round(elapsed / (count * nbytes / cap), 4),
        "first_of_last": round(statistics.median(min(each) / max(each) for _, each in runs), 3),
    }


def machine() -> dict[str, object]:
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), ":")
    facts = {"cores": len(os.sched_getaffinity(0)), "cpu": cpu.partition(":")[2].strip()}
    return facts | {"python": platform.python_version(), "kernel": platform.release(), "load": os.getloadavg()[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=256, help="of each reader")
    parser.add_argument("--readers", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--part", type=float, default=0.25, help="the cap, of the uncapped rate")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    facts = machine()
    rows = [measure(options.mib * MIB, count, options.part, options.repeat) for count in options.readers]
    if options.json:
        print(json.dumps({"machine": facts, "part": options.part, "mib": options.mib, "rows": rows}))
        return
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print("readers  uncapped MB/s  cap MB/s  egress MB/s  egress/cap  time/(bytes/cap)  fastest/slowest reader")
    shape = "{readers:7} {uncapped_mb_s:14} {cap_mb_s:9} {egress_mb_s:12} {egress_of_cap:11} {time_of_bound:17} "
    for row in rows:
        print((shape + "{first_of_last:23}").format(**row))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(int(sys.argv[2]))
    elif sys.argv[1:2] == ["--read"]:
        read(int(sys.argv[2]), bytes.fromhex(sys.argv[3]))
    else:
        main()
