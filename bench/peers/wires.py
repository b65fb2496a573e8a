"""Other ways to move memory between two processes: bare sockets, NIXL itself, Mooncake's Transfer Engine, gloo.

    python bench/peers/wires.py source|target WAY NBYTES COUNT [ADDRESS]

Each target moves all tensors once for each command, and says ``seconds`` (the bytes alone) and, where it prepares
anything for them, ``prepare_s``.
"""

from __future__ import annotations

import base64
import ctypes
import itertools
import json
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from process import Array, check, dirty, obey, reason, tell, touched

BUFFERS = 1024
HOST = "127.0.0.1"
NUMBERS = itertools.count()
"""An agent's name is never used twice."""
Act = Callable[[Mapping[str, Any]], Mapping[str, object]]


def idle(_: Mapping[str, Any]) -> Mapping[str, object]:
    return {"ok": True}


# --- bare sockets ---------------------------------------------------------------------------------------------------


def sockets_source(parts: list[Array]) -> tuple[str, Act]:
    listening = socket.create_server((HOST, 0), backlog=16)

    def accept() -> None:
        while True:
            connected, _ = listening.accept()
            threading.Thread(target=send, args=(connected, parts), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return str(listening.getsockname()[1]), idle


def send(connected: socket.socket, parts: list[Array]) -> None:
    at, streams = (int(word) for word in connected.recv(64).split())
    buffers = share(parts, at, streams)
    while buffers:
        consume(buffers, connected.sendmsg(buffers[:BUFFERS]))
    connected.close()


def share(parts: list[Array], at: int, streams: int) -> list[memoryview]:
    """The ``at``-th of ``streams`` equal shares of the bytes of ``parts``."""
    nbytes = sum(part.nbytes for part in parts)
    begin, end, offset = nbytes * at // streams, nbytes * (at + 1) // streams, 0
    found = []
    for part in parts:
        low, high = max(begin - offset, 0), min(end - offset, part.nbytes)
        if low < high:
            found.append(memoryview(part)[low:high])
        offset += part.nbytes
    return found


def consume(buffers: list[memoryview], nbytes: int) -> None:
    done = 0
    while done < len(buffers) and buffers[done].nbytes <= nbytes:
        nbytes -= buffers[done].nbytes
        done += 1
    del buffers[:done]
    if nbytes:
        buffers[0] = buffers[0][nbytes:]


def sockets_target(parts: list[Array], address: str) -> Act:
    def take(at: int, streams: int, connected: socket.socket) -> None:
        connected.sendall(f"{at} {streams}".encode())
        buffers = share(parts, at, streams)
        while buffers:
            consume(buffers, connected.recvmsg_into(buffers[:BUFFERS], 0, socket.MSG_WAITALL)[0])
        connected.close()

    def act(command: Mapping[str, Any]) -> Mapping[str, object]:
        streams = command.get("streams", 2)
        dirty(parts)
        connected = [socket.create_connection((HOST, int(address))) for _ in range(streams)]
        threads = [threading.Thread(target=take, args=(at, streams, each)) for at, each in enumerate(connected)]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - began
        check(parts)
        return {"seconds": seconds}

    return act


# --- NIXL's own agent -----------------------------------------------------------------------------------------------


def agent(name: str, *, spins: bool) -> Any:
    from nixl._api import nixl_agent, nixl_agent_config

    return nixl_agent(name, nixl_agent_config(enable_prog_thread=spins, backends=["UCX"]))


def rows(parts: list[Array]) -> np.ndarray[Any, np.dtype[np.uint64]]:
    return np.array([(part.ctypes.data, part.nbytes, 0) for part in parts], dtype=np.uint64)


def nixl_source(parts: list[Array]) -> tuple[str, Act]:
    kept = agent(f"bench-source-{next(NUMBERS)}", spins=True)
    kept.register_memory(rows(parts), "DRAM")
    told = {
        "metadata": base64.b64encode(kept.get_agent_metadata()).decode(),
        "rows": rows(parts).tolist(),
    }
    address = Path(tempfile.mkdtemp(prefix="bench-nixl-")) / "endpoint.json"
    address.write_text(json.dumps(told))
    return str(address), lambda _: {"ok": bool(kept)}


def ours_source(parts: list[Array]) -> tuple[str, Act]:
    """What our transport serves with: an agent whose progress thread sleeps."""
    from weightwire.manifest.address import Region
    from weightwire.transport.nixl.agent import Agent

    kept = Agent(f"bench-ours-{next(NUMBERS)}", serves=True)
    kept.register([Region(part.ctypes.data, part.nbytes, "cpu") for part in parts])
    told = {"metadata": base64.b64encode(kept.metadata()).decode(), "rows": rows(parts).tolist()}
    address = Path(tempfile.mkdtemp(prefix="bench-nixl-")) / "endpoint.json"
    address.write_text(json.dumps(told))
    return str(address), lambda _: {"ok": bool(kept)}


def nixl_target(parts: list[Array], address: str, *, spins: bool) -> Act:
    told = json.loads(Path(address).read_text())
    metadata, remote = base64.b64decode(told["metadata"]), np.array(told["rows"], dtype=np.uint64)

    def finish(reader: Any, handle: Any) -> None:
        state = reader.transfer(handle)
        while state == "PROC":
            state = reader.check_xfer_state(handle)
        assert state == "DONE", state
        reader.release_xfer_handle(handle)

    def act(_: Mapping[str, Any]) -> Mapping[str, object]:
        dirty(parts)
        began = time.perf_counter()
        reader = agent(f"bench-{os.getpid()}-{next(NUMBERS)}", spins=spins)
        reader.register_memory(rows(parts), "DRAM")
        peer = reader.add_remote_agent(metadata)
        to, source = reader.get_xfer_descs(rows(parts), "DRAM"), reader.get_xfer_descs(remote, "DRAM")
        first = rows(parts)[:1], remote[:1]
        warm = reader.get_xfer_descs(first[0], "DRAM"), reader.get_xfer_descs(first[1], "DRAM")
        finish(reader, reader.initialize_xfer("READ", *warm, peer))
        dirty(parts)
        prepared = time.perf_counter()
        finish(reader, reader.initialize_xfer("READ", to, source, peer))
        ended = time.perf_counter()
        check(parts)
        return {"seconds": ended - prepared, "prepare_s": prepared - began}

    return act


# --- Mooncake's Transfer Engine -------------------------------------------------------------------------------------


def mooncake_engine(parts: list[Array]) -> Any:
    for name in ("libnl-3", "libnl-route-3", "libibverbs"):  # the engine is linked against it, whatever it then uses
        for folder in filter(None, os.environ.get("BENCH_LIBRARIES", "").split(":")):
            for library in sorted(Path(folder).rglob(f"{name}.so.*"))[:1]:
                ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    from mooncake.engine import TransferEngine

    engine = TransferEngine()
    if engine.initialize(f"{HOST}:{free_port()}", "P2PHANDSHAKE", "tcp", ""):
        raise RuntimeError("the engine does not start")
    if engine.batch_register_memory([part.ctypes.data for part in parts], [part.nbytes for part in parts]):
        raise RuntimeError("the engine cannot register the memory")
    return engine


def free_port() -> int:
    with socket.create_server((HOST, 0)) as probe:
        return int(probe.getsockname()[1])


def mooncake_source(parts: list[Array]) -> tuple[str, Act]:
    engine = mooncake_engine(parts)
    told = {"port": engine.get_rpc_port(), "rows": [part.ctypes.data for part in parts]}
    address = Path(tempfile.mkdtemp(prefix="bench-mooncake-")) / "endpoint.json"
    address.write_text(json.dumps(told))
    return str(address), lambda _: {"ok": bool(engine)}


def mooncake_target(parts: list[Array], address: str) -> Act:
    engine, told = mooncake_engine(parts), json.loads(Path(address).read_text())
    ours, sizes = [part.ctypes.data for part in parts], [part.nbytes for part in parts]

    def act(_: Mapping[str, Any]) -> Mapping[str, object]:
        dirty(parts)
        began = time.perf_counter()
        if engine.batch_transfer_sync_read(f"{HOST}:{told['port']}", ours, told["rows"], sizes):
            raise RuntimeError("the engine's read failed")
        seconds = time.perf_counter() - began
        check(parts)
        return {"seconds": seconds}

    return act


# --- gloo: a broadcast of torch.distributed -------------------------------------------------------------------------


def gloo_broadcast(parts: list[Array], rank: int, port: int) -> Act:
    import torch
    import torch.distributed as dist

    tensors = [torch.from_numpy(part) for part in parts]
    joined = False

    def act(_: Mapping[str, Any]) -> Mapping[str, object]:
        nonlocal joined
        if not joined:
            dist.init_process_group("gloo", init_method=f"tcp://{HOST}:{port}", rank=rank, world_size=2)
            joined = True
        if rank:
            dirty(parts)
        dist.barrier()
        began = time.perf_counter()
        for tensor in tensors:
            dist.broadcast(tensor, 0)
        seconds = time.perf_counter() - began
        if rank:
            check(parts)
        return {"seconds": seconds}

    return act


def gloo_source(parts: list[Array]) -> tuple[str, Act]:
    port = free_port()
    return str(port), gloo_broadcast(parts, 0, port)


SOURCES: dict[str, Callable[[list[Array]], tuple[str, Act]]] = {
    "sockets": sockets_source,
    "nixl": nixl_source,
    "nixl-ours": ours_source,
    "mooncake": mooncake_source,
    "gloo": gloo_source,
}
TARGETS: dict[str, Callable[[list[Array], str], Act]] = {
    "sockets": sockets_target,
    "nixl": lambda parts, address: nixl_target(parts, address, spins=True),
    "nixl-ours": lambda parts, address: nixl_target(parts, address, spins=False),
    "mooncake": mooncake_target,
    "gloo": lambda parts, address: gloo_broadcast(parts, 1, int(address)),
}


def main() -> None:
    role, way, nbytes, count, *address = sys.argv[1:]
    parts = touched(int(nbytes), int(count))
    try:
        if role == "source":
            where, act = SOURCES[way](parts)
            tell(address=where)
        else:
            act = TARGETS[way](parts, address[0])
            tell(ready=True)
    except Exception as error:  # noqa: BLE001  (a process's edge: told as the reason why this way is missing)
        tell(error=reason(error))
        os._exit(1)
    obey(act)


if __name__ == "__main__":
    main()
