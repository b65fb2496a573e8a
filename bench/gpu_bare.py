"""What the same bytes cost without the library: copies, bare NIXL READs, and the pieces that a load is made of."""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from weightwire.auth import Secret
from weightwire.manifest.address import AddressSpace, Region
from weightwire.manifest.catalogue import catalogue
from weightwire.transport.base import Read, Registration
from weightwire.types import Span

MIB = 1 << 20
SECRET = Secret(b"bench only, one host only")
LEASE = bytes(16)
Marks = list[tuple[float, float]]


class Gate:
    def admit(self, lease: bytes, span: Span) -> Registration:
        raise NotImplementedError


def wait_until(at: float) -> None:
    """Of the monotonic clock, which all processes of a host share: so that several begin together."""
    time.sleep(max(0.0, at - time.monotonic()))


def timed(action: Callable[[], object], runs: int, devices: Sequence[str]) -> Marks:
    """When each run began, and when everything that it queued on ``devices`` was done."""
    marks = []
    for _ in range(runs):
        settle(devices)
        began = time.monotonic()
        action()
        settle(devices)
        marks.append((began, time.monotonic()))
    return marks


def settle(devices: Sequence[str]) -> None:
    for device in devices:
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)


def seconds(marks: Marks) -> list[float]:
    return [end - begin for begin, end in marks]


# ---- copies


def shared(parameters: Sequence[torch.Tensor]) -> list[list[Any]]:
    """CUDA IPC handles of every parameter, as torch makes them."""
    handles = [parameter.untyped_storage()._share_cuda_() for parameter in parameters]
    return [[part.hex() if isinstance(part, bytes) else part for part in handle] for handle in handles]


def copy_shared(parameters: Sequence[torch.Tensor], handles: list[list[Any]], at: float, runs: int) -> dict[str, Any]:
    """Copy another process's parameters into ``parameters`` with ``copy_``, through CUDA IPC (peer access)."""
    began = time.perf_counter()
    opening = torch.UntypedStorage._new_shared_cuda  # noqa: SLF001  (as torch.multiprocessing does)
    theirs = [opening(*_handle(row)) for row in handles]
    opened = time.perf_counter() - began
    pairs = [(_flat(to.untyped_storage()), _flat(of)) for to, of in zip(parameters, theirs, strict=True)]
    devices = sorted({str(part.device) for pair in pairs for part in pair})
    nbytes = sum(to.nbytes for to, _ in pairs)
    wait_until(at)
    marks = timed(lambda: [to.copy_(of) for to, of in pairs], runs, devices)
    pairs.clear()
    del theirs
    torch.cuda.ipc_collect()
    found = {"devices": devices, "open_s": opened, "nbytes": nbytes, "marks": marks[1:]}
    return found | {"first_gbps": nbytes / seconds(marks)[0] / 1e9, "gbps": nbytes / min(seconds(marks)[1:]) / 1e9}


def peer_copy(source: str, target: str, sizes_mib: Sequence[int]) -> dict[str, Any]:
    """``copy_`` between two devices in one process, both ways; and whether they reach each other's memory."""
    access = [torch.cuda.can_device_access_peer(*pair) for pair in ((source, target), (target, source))]
    found: dict[str, Any] = {"peer_access": access}
    for mib in sizes_mib:
        one = torch.randint(0, 256, (mib * MIB,), dtype=torch.uint8, device=source)
        other = torch.empty(mib * MIB, dtype=torch.uint8, device=target)
        there = min(seconds(timed(lambda to=other, of=one: to.copy_(of), 8, (source, target)))[2:])
        equal = bool(torch.equal(one.cpu(), other.cpu())) if mib <= 1024 else None
        back = min(seconds(timed(lambda to=one, of=other: to.copy_(of), 8, (source, target)))[2:])
        found[f"{mib} MiB"] = {"gbps": one.nbytes / there / 1e9, "back_gbps": one.nbytes / back / 1e9, "equal": equal}
    return found


def device_copy(device: str, mib: int) -> dict[str, Any]:
    """A copy on one device; bytes read plus bytes written."""
    one = torch.randint(0, 256, (mib * MIB,), dtype=torch.uint8, device=device)
    other = torch.empty_like(one)
    best = min(seconds(timed(lambda: other.copy_(one), 12, (device,)))[2:])
    return {"copy_gbps": one.nbytes / best / 1e9, "memory_gbps": 2 * one.nbytes / best / 1e9}


def host_copy(device: str, mib: int) -> dict[str, Any]:
    """Copies between the device and pinned host memory: what staging over tcp cannot exceed."""
    here = torch.empty(mib * MIB, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(here, device=device)
    to_host = min(seconds(timed(lambda: here.copy_(there, non_blocking=True), 4, (device,)))[1:])
    to_device = min(seconds(timed(lambda: there.copy_(here, non_blocking=True), 4, (device,)))[1:])
    return {"to_host_gbps": here.nbytes / to_host / 1e9, "to_device_gbps": here.nbytes / to_device / 1e9}


# ---- NIXL


def served(memory: AddressSpace) -> tuple[Any, dict[str, Any]]:
    """Serve memory over a transport of its own, without leases or digests; keep the first part alive."""
    from weightwire.transport.nixl import NixlTransport

    began = time.perf_counter()
    transport = NixlTransport(SECRET, Gate())
    registration = transport.register(memory)
    endpoint = transport.describe(registration, LEASE)
    return (transport, registration), {"endpoint": endpoint.hex(), "register_s": time.perf_counter() - began}


def _handle(row: list[Any]) -> list[Any]:
    return [bytes.fromhex(part) if isinstance(part, str) else part for part in row]


def _flat(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def registration(device: str, tensors: int, mib: float) -> dict[str, Any]:
    """Register ``tensors`` tensors of ``mib`` MiB with NIXL: whole allocations; and each tensor."""
    torch.cuda.empty_cache()
    began = time.perf_counter()
    held = [torch.empty(int(mib * MIB), dtype=torch.uint8, device=device) for _ in range(tensors)]
    found: dict[str, Any] = {"tensors": tensors, "allocate_s": time.perf_counter() - began}
    module = nn.Module()
    for at, tensor in enumerate(held):
        module.register_buffer(f"t{at}", tensor)
    memory = catalogue(module).memory
    each = [Region(tensor.data_ptr(), tensor.nbytes, device) for tensor in held]
    return found | _registered(memory, each)


def _registered(memory: AddressSpace, tensors: list[Region]) -> dict[str, Any]:
    from weightwire.transport.nixl.agent import Agent
    from weightwire.transport.nixl.registration import registrable

    marks = [time.perf_counter()]
    agent = Agent(f"bench-{time.monotonic_ns()}", serves=True)
    marks.append(time.perf_counter())
    regions = registrable(memory)
    marks.append(time.perf_counter())
    agent.register(regions)
    marks.append(time.perf_counter())
    nbytes = len(agent.metadata())
    marks.append(time.perf_counter())
    agent.destroy()
    names = ("agent_s", "find_allocations_s", "register_s", "metadata_s")
    found: dict[str, Any] = {name: marks[at + 1] - marks[at] for at, name in enumerate(names)}
    agent = Agent(f"bench-{time.monotonic_ns()}", serves=True)
    began = time.perf_counter()
    agent.register(tensors)
    found["per_tensor_s"] = time.perf_counter() - began
    agent.destroy()
    return found | {"allocations": len(regions), "metadata_bytes": nbytes}


def one_read(memory: AddressSpace, endpoint: bytes, until: contextlib.ExitStack, start: float) -> dict[str, Any]:
    """One bare NIXL READ of everything, five times."""
    from weightwire.transport.nixl.agent import Agent
    from weightwire.transport.nixl.endpoint import Endpoint
    from weightwire.transport.nixl.pieces import Piece, Run
    from weightwire.transport.nixl.registration import registrable

    peer = Endpoint.decode(endpoint, SECRET, LEASE)
    marks = [time.perf_counter()]
    agent = Agent(f"bare-{os.getpid()}-{time.monotonic_ns() % 10**9}", serves=False)
    until.callback(agent.destroy)
    marks.append(time.perf_counter())
    agent.register(registrable(memory))
    marks.append(time.perf_counter())
    agent.add_peer(peer.metadata, peer.agent)
    marks.append(time.perf_counter())
    pairs = list(zip(memory.segments, peer.memory.segments, strict=True))
    runs = [Run(ours.address, theirs.address, ours.nbytes) for ours, theirs in pairs]
    piece = Piece.of(pairs[0][0].device, pairs[0][1].device, runs)
    wait_until(start)
    took: Marks = []
    for _ in range(5):
        began = time.monotonic()
        handle = agent.post(piece, peer.agent)
        while not agent.done(handle):
            pass
        took.append((began, time.monotonic()))
        agent.release(handle)
    ways = {"<".join(way): "+".join(used) for way, used in agent.transports().items()}
    names = ("agent_s", "register_s", "add_peer_s")
    return {
        "ways": ways,
        "marks": took[1:],
        "bare_first_gbps": memory.span.nbytes / seconds(took)[0] / 1e9,
        "bare_gbps": memory.span.nbytes / min(seconds(took)[1:]) / 1e9,
        **{name: marks[at + 1] - marks[at] for at, name in enumerate(names)},
    }


def our_reads(memory: AddressSpace, endpoint: bytes, sizes_mib: list[int]) -> dict[str, Any]:
    """Our connection, by size of one read; no digests."""
    from weightwire.transport.nixl import NixlTransport

    transport = NixlTransport(SECRET)
    deadline = time.monotonic() + 120
    connection = transport.connect(endpoint, LEASE, deadline)
    registration = transport.register(memory)
    connection.read(Span(0, 1), registration).wait(deadline)
    found: dict[str, Any] = {}
    for mib in sizes_mib:
        took = []
        for _ in range(3):
            under_way: deque[Read] = deque()
            began = time.perf_counter()
            for offset in range(0, memory.span.nbytes, mib * MIB):
                nbytes = min(mib * MIB, memory.span.nbytes - offset)
                under_way.append(connection.read(Span(offset, nbytes), registration))
                if len(under_way) >= connection.depth:
                    under_way.popleft().wait(deadline)
            for read in under_way:
                read.wait(deadline)
            took.append(time.perf_counter() - began)
        found[f"{mib} MiB"] = round(memory.span.nbytes / min(took) / 1e9, 2)
    found["path"] = connection.path
    connection.fence(time.monotonic() + 10)
    transport.close()
    return found
