"""GB/s of the tcp transport over loopback, two processes, against bare sockets in the same run.

    python bench/tcp.py --mib 1024 --tensors 8 2000 --streams 1 2 4 --repeat 5 --json

Both sides move the same memory with the same number of streams; runs are interleaved and medians compared, because
absolute figures of a shared machine mean little. No digest is computed: this is the wire alone. ``--chunk-mib``,
``--depth``: what one read asks for, and how many are under way.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from weightwire.auth import Secret
from weightwire.manifest.address import AddressSpace, Region, Segment
from weightwire.transport import memory
from weightwire.transport.base import Connection, Read, Registration
from weightwire.transport.tcp import TcpTransport
from weightwire.types import Span

SECRET = Secret(b"bench only, loopback only")
LEASE = bytes(16)
MIB = 1 << 20
BARE_BUFFERS = 64


def tensors(nbytes: int, count: int, fill: int) -> tuple[AddressSpace, list[npt.NDArray[np.uint8]]]:
    """``count`` allocations of equal size, every page touched."""
    size = nbytes // count
    parts = [np.full(size, fill, dtype=np.uint8) for _ in range(count)]
    segments = [Segment(at * size, part.ctypes.data, size, "cpu") for at, part in enumerate(parts)]
    return AddressSpace(segments, [Region(s.address, s.nbytes, "cpu") for s in segments], parts), parts


class Gate:
    registration: Registration

    def admit(self, lease: bytes, span: Span) -> Registration:
        del lease, span
        return self.registration


def shares(nbytes: int, streams: int) -> list[Span]:
    """What each stream moves."""
    cuts = [nbytes * at // streams for at in range(streams + 1)]
    return [Span(begin, end - begin) for begin, end in itertools.pairwise(cuts)]


# --- the source process -------------------------------------------------------------------------------------------


def serve(nbytes: int, count: int) -> None:
    space, _ = tensors(nbytes, count, 7)
    gate = Gate()
    transport = TcpTransport(SECRET, gate)
    gate.registration = transport.register(space)
    bare = socket.create_server(("127.0.0.1", 0), backlog=16)
    threading.Thread(target=serve_bare, args=(bare, space), daemon=True).start()
    endpoint = transport.describe(gate.registration, LEASE).hex()
    print(json.dumps({"endpoint": endpoint, "bare": bare.getsockname()[1]}), flush=True)
    sys.stdin.read()
    os._exit(0)


def serve_bare(listening: socket.socket, space: AddressSpace) -> None:
    while True:
        accepted, _ = listening.accept()
        threading.Thread(target=send_bare, args=(accepted, space), daemon=True).start()


def send_bare(accepted: socket.socket, space: AddressSpace) -> None:
    accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    offset, nbytes = (int(word) for word in accepted.recv(64).split())
    buffers = memory.views(space.slices(Span(offset, nbytes)))
    while buffers:
        memory.consume(buffers, accepted.sendmsg([buffers[at] for at in range(min(BARE_BUFFERS, len(buffers)))]))
    accepted.close()


# --- the target ---------------------------------------------------------------------------------------------------


def receive_bare(port: int, space: AddressSpace, share: Span) -> None:
    connected = socket.create_connection(("127.0.0.1", port))
    connected.sendall(f"{share.offset} {share.nbytes}".encode())
    buffers = memory.views(space.slices(share))
    while buffers:
        some = [buffers[at] for at in range(min(BARE_BUFFERS, len(buffers)))]
        memory.consume(buffers, connected.recvmsg_into(some, 0, socket.MSG_WAITALL)[0])
    connected.close()


def receive_ours(connection: Connection, into: Registration, share: Span, chunk: int, depth: int) -> None:
    under_way: deque[Read] = deque()
    deadline = time.monotonic() + 120
    for offset in range(share.offset, share.end, chunk):
        under_way.append(connection.read(Span(offset, min(chunk, share.end - offset)), into))
        if len(under_way) >= depth:
            under_way.popleft().wait(deadline)
    for read in under_way:
        read.wait(deadline)


def timed(work: Sequence[Callable[[], None]], nbytes: int) -> float:
    """GB/s of all of ``work`` at once."""
    threads = [threading.Thread(target=each) for each in work]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return nbytes / (time.perf_counter() - began) / 1e9


class Target:
    def __init__(self, nbytes: int, count: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve", str(nbytes), str(count)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert self.process.stdout is not None
        where = json.loads(self.process.stdout.readline())
        self.endpoint, self.bare_port = bytes.fromhex(where["endpoint"]), int(where["bare"])
        self.nbytes = nbytes
        self.transport = TcpTransport(SECRET)
        self.space, self.parts = tensors(nbytes, count, 0)
        self.into = self.transport.register(self.space)

    def bare(self, streams: int) -> float:
        work = [
            lambda share=share: receive_bare(self.bare_port, self.space, share)
            for share in shares(self.nbytes, streams)
        ]
        return timed(work, self.nbytes)

    def ours(self, streams: int, chunk: int, depth: int) -> float:
        connections = [self.transport.connect(self.endpoint, LEASE, time.monotonic() + 10) for _ in range(streams)]
        work = [
            lambda connection=connection, share=share: receive_ours(connection, self.into, share, chunk, depth)
            for connection, share in zip(connections, shares(self.nbytes, streams), strict=True)
        ]
        speed = timed(work, self.nbytes)
        for connection in connections:
            connection.fence(time.monotonic() + 5)
        return speed

    def close(self) -> None:
        assert all(part[0] == 7 and part[-1] == 7 for part in self.parts)
        self.transport.close()
        self.process.kill()
        self.process.wait()


def measure(options: argparse.Namespace) -> list[dict[str, float]]:
    rows = []
    for count in options.tensors:
        nbytes = options.mib * MIB // count * count
        target = Target(nbytes, count)
        for streams in options.streams:
            pairs = [
                (target.bare(streams), target.ours(streams, options.chunk_mib * MIB, options.depth))
                for _ in range(options.repeat)
            ]
            rows.append(
                {
                    "tensors": count,
                    "streams": streams,
                    "bare_gb_s": round(statistics.median(bare for bare, _ in pairs), 2),
                    "ours_gb_s": round(statistics.median(ours for _, ours in pairs), 2),
                    "ratio": round(statistics.median(ours / bare for bare, ours in pairs), 3),
                }
            )
        target.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--tensors", type=int, nargs="+", default=[8, 2000])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--chunk-mib", type=int, default=8)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    rows = measure(options := parser.parse_args())
    if options.json:
        print(json.dumps(rows))
        return
    print("tensors streams  bare GB/s  ours GB/s  ratio")
    for row in rows:
        print("{tensors:7} {streams:7} {bare_gb_s:10.2f} {ours_gb_s:10.2f} {ratio:6.3f}".format(**row))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(int(sys.argv[2]), int(sys.argv[3]))
    else:
        main()
