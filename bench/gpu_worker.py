"""One process of ``bench/gpu.py``: obeys one JSON command a line, answers each with one line of JSON.

Run by ``bench/gpu.py``; what each command does is its method's docstring or name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import signal
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != HERE]  # nixl is not bench/nixl.py

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

sys.path.append(str(HERE))
import gpu_model  # noqa: E402
import gpu_profile  # noqa: E402

import weightwire  # noqa: E402
from weightwire.auth import Secret  # noqa: E402
from weightwire.config import Settings  # noqa: E402
from weightwire.errors import WeightwireError  # noqa: E402
from weightwire.loaders.module import Published  # noqa: E402
from weightwire.manifest import device_digest, digest  # noqa: E402
from weightwire.manifest.address import AddressSpace, Region, Segment  # noqa: E402
from weightwire.manifest.catalogue import catalogue  # noqa: E402
from weightwire.manifest.device_memory import tensor_at  # noqa: E402
from weightwire.manifest.records import Leaf  # noqa: E402
from weightwire.transport.base import Read, Registration  # noqa: E402
from weightwire.types import Span  # noqa: E402

MIB = 1 << 20
SECRET = Secret(b"bench only, one host only")
LEASE = bytes(16)


class Gate:
    def admit(self, lease: bytes, span: Span) -> Registration:
        raise NotImplementedError


def identity(model_id: str) -> weightwire.Identity:
    return weightwire.module_identity(model_id, "Llama", "bfloat16", {}, revision="1")


class Worker:
    def __init__(self, device: str) -> None:
        self.device = device
        self.published: dict[str, Published] = {}
        self.kept: list[Any] = []

    # ---- the model

    def build(self, shape: str, seed: int | None) -> dict[str, Any]:
        """Construct; fill with random weights, or leave what construction leaves."""
        began = time.perf_counter()
        self.model = gpu_model.build(shape, self.device)
        if seed is not None:
            gpu_model.fill(self.model, seed)
        self._settle()
        held = [*self.model.parameters(), *self.model.buffers()]
        return {
            "seconds": time.perf_counter() - began,
            "nbytes": sum(tensor.nbytes for tensor in held),
            "tensors": len(held),
            "allocations": len(torch.cuda.memory_snapshot()) if self._cuda else 0,
            "expandable": any(s.get("is_expandable") for s in torch.cuda.memory_snapshot()) if self._cuda else False,
        }

    def tokens(self) -> dict[str, Any]:
        began = time.perf_counter()
        found = gpu_model.tokens(self.model)
        return found | {"seconds": time.perf_counter() - began, "at": time.monotonic()}

    def poison(self) -> dict[str, Any]:
        gpu_model.poison(self.model)
        self._settle()
        return {}

    # ---- our library

    def publish(self, url: str, transports: list[str], model_id: str) -> dict[str, Any]:
        settings = Settings.from_env({}, url=url, transports=tuple(transports))
        with self._memory() as used, gpu_profile.watched() as profile:
            began = time.monotonic()
            published = weightwire.publish(self.model, identity(model_id), settings=settings)
            ended = time.monotonic()
        self.published[model_id] = published
        report = dataclasses.asdict(published.report)
        return {"began": began, "ended": ended, "report": report, "memory": used, "profile": profile}

    def withdraw(self, model_id: str) -> dict[str, Any]:
        began = time.monotonic()
        self.published.pop(model_id).withdraw()
        return {"seconds": time.monotonic() - began}

    def receive(
        self,
        url: str,
        transports: list[str],
        model_id: str,
        kill: int = 0,
        kill_at: float = 0.0,
        profile: bool = False,
    ) -> dict[str, Any]:
        """Fill the model from a peer; on the way, once ``kill_at`` of the bytes are verified, kill process ``kill``."""
        settings = Settings.from_env({}, url=url, transports=tuple(transports))
        seen: dict[str, float] = {}

        def progress(phase: str, done: int, total: int, unit: str) -> None:
            if phase == "transfer" and unit == "bytes" and done:
                seen.setdefault("first", time.monotonic())
                if kill and "killed" not in seen and done >= kill_at * total:
                    os.kill(kill, signal.SIGKILL)
                    seen["killed"], seen["done"] = time.monotonic(), done / total

        found: dict[str, Any] = {"seen": seen}
        watched = gpu_profile.watched() if profile else contextlib.nullcontext({})
        with self._memory() as used, watched as found["profile"]:
            began = time.monotonic()
            try:
                report = weightwire.receive(self.model, identity(model_id), settings=settings, progress=progress)
                found["report"] = report.to_json()
            except WeightwireError as error:
                found["raised"] = f"{type(error).__name__}: {error}"
            ended = time.monotonic()
        return found | {"began": began, "ended": ended, "memory": used}

    # ---- copy-on-transform

    def transform(self, model_id: str, every: int) -> dict[str, Any]:
        """Change one matrix in every ``every``-th layer in place under the guard, as an engine does after loading."""
        snapshot = self.published[model_id].transforms()
        layers = list(self.model.layers)[::every]
        before = torch.cuda.memory_allocated() if self._cuda else 0
        began = time.perf_counter()
        for layer in layers:
            layer.q_proj.transform_effect = lambda: {"weight": "in_place"}
            with snapshot.guard(layer.q_proj), torch.no_grad():
                layer.q_proj.weight.mul_(-1)
        self._settle()
        return {
            "seconds": time.perf_counter() - began,
            "matrices": len(layers),
            "changed_bytes": sum(layer.q_proj.weight.nbytes for layer in layers),
            "held_bytes": snapshot.held.nbytes,
            "allocated_bytes": (torch.cuda.memory_allocated() if self._cuda else 0) - before,
        }

    # ---- what the same bytes cost without us

    def share(self) -> dict[str, Any]:
        """CUDA IPC handles of every parameter, as torch makes them."""
        rows = []
        for parameter in self.model.parameters():
            handle = parameter.untyped_storage()._share_cuda_()
            rows.append([part.hex() if isinstance(part, bytes) else part for part in handle])
        return {"handles": rows}

    def copy_shared(self, handles: list[list[Any]]) -> dict[str, Any]:
        """Copy the other process's parameters into ours through CUDA IPC."""
        began = time.perf_counter()
        opening = torch.UntypedStorage._new_shared_cuda  # noqa: SLF001  (as torch.multiprocessing does)
        theirs = [opening(*_handle(row)) for row in handles]
        opened = time.perf_counter() - began
        ours = [parameter.untyped_storage() for parameter in self.model.parameters()]
        pairs = [(_flat(one), _flat(other)) for one, other in zip(ours, theirs, strict=True)]
        seconds = self._timed(lambda: [to.copy_(source) for to, source in pairs], 5)
        pairs.clear()
        del theirs
        torch.cuda.ipc_collect()
        nbytes = sum(storage.nbytes() for storage in ours)
        return {"open_s": opened, "first_gbps": nbytes / seconds[0] / 1e9, "gbps": nbytes / min(seconds[1:]) / 1e9}

    def bare_source(self) -> dict[str, Any]:
        """Serve the model's memory over a transport of its own, without leases or digests."""
        from weightwire.transport.nixl import NixlTransport

        memory = catalogue(self.model).memory
        began = time.perf_counter()
        transport = NixlTransport(SECRET, Gate())
        registration = transport.register(memory)
        endpoint = transport.describe(registration, LEASE)
        self.kept.append((transport, registration))
        return {"endpoint": endpoint.hex(), "register_s": time.perf_counter() - began}

    def bare_read(self, endpoint: str, sizes_mib: list[int]) -> dict[str, Any]:
        """One bare NIXL READ of everything; then our connection by size of one read. No digest in either."""
        memory = catalogue(self.model).memory
        found: dict[str, Any] = {"nbytes": memory.span.nbytes}
        with contextlib.ExitStack() as until:
            found |= _one_read(memory, bytes.fromhex(endpoint), until)
        found["ours_gbps"] = _our_reads(memory, bytes.fromhex(endpoint), sizes_mib)
        return found

    def device_copy(self, mib: int) -> dict[str, Any]:
        """A device-to-device copy in this process; bytes read plus bytes written."""
        one = torch.randint(0, 256, (mib * MIB,), dtype=torch.uint8, device=self.device)
        other = torch.empty_like(one)
        seconds = min(self._timed(lambda: other.copy_(one), 12)[2:])
        return {"copy_gbps": one.nbytes / seconds / 1e9, "memory_gbps": 2 * one.nbytes / seconds / 1e9}

    def host_copy(self, mib: int) -> dict[str, Any]:
        """Copies between the device and pinned host memory: what staging over tcp cannot exceed."""
        here = torch.empty(mib * MIB, dtype=torch.uint8, pin_memory=True)
        there = torch.empty_like(here, device=self.device)
        to_host = min(self._timed(lambda: here.copy_(there, non_blocking=True), 4)[1:])
        to_device = min(self._timed(lambda: there.copy_(here, non_blocking=True), 4)[1:])
        return {"to_host_gbps": here.nbytes / to_host / 1e9, "to_device_gbps": here.nbytes / to_device / 1e9}

    # ---- digests

    def digests(self, host_mib: int) -> dict[str, Any]:
        """The whole path over the model, the kernel alone, and equality with the host and with tensor operations."""
        found = catalogue(self.model)
        leaves = found.layout.leaves
        path = self._timed(lambda: digest.digest_leaves(found.memory, leaves), 4)
        some = leaves[:host_mib]
        here = _on_host(found.memory, some)
        began = time.perf_counter()
        expected = digest.digest_leaves(here, some, threads=4)
        host_s = time.perf_counter() - began
        few, nbytes = [leaf.span for leaf in some[:64]], sum(leaf.span.nbytes for leaf in some)
        result = {
            "nbytes": found.layout.nbytes,
            "leaves": len(leaves),
            "path_first_s": path[0],
            "path_s": min(path[1:]),
            "path_gbps": found.layout.nbytes / min(path[1:]) / 1e9,
            "equals_host": digest.digest_leaves(found.memory, some) == expected,
            "host_4_threads_gbps": nbytes / host_s / 1e9,
        }
        return result | self._kernels(found.memory, leaves, few) if self._cuda else result

    def _kernels(self, memory: AddressSpace, leaves: tuple[Leaf, ...], few: list[Span]) -> dict[str, Any]:
        from weightwire.manifest import device_kernel
        from weightwire.manifest.device_blocks import Blocks

        blocks = Blocks(memory.segments, [leaf.span for leaf in leaves])
        address, nbytes = blocks.address[blocks.whole], blocks.nbytes[blocks.whole]
        out = torch.empty(len(address), dtype=torch.int64, device=self.device)
        speeds, values = {}, set()
        for row, stages in ((1024, 3), (512, 3), (1024, 2), (2048, 2)):
            kernel = device_kernel.Kernel(torch.cuda.current_device(), row, stages)
            seconds = _kernel_seconds(kernel, address, nbytes, out)
            speeds[f"{row}x{stages}"] = round(float(nbytes.sum()) / seconds / 1e9, 1)
            values.add(hash(out.cpu().numpy().tobytes()))
        twin_s = min(self._timed(lambda: self._twin(memory, few), 3))
        return {
            "kernel_gbps": speeds,
            "variants_agree": len(values) == 1,
            "in_place_blocks": int(blocks.whole.sum()),
            "gathered_blocks": int((~blocks.whole).sum()),
            "equals_twin": self._twin(memory, few) == device_digest.digest_spans(memory, few),
            "twin_gbps": sum(span.nbytes for span in few) / twin_s / 1e9,
            "by_run_gbps": {
                f"{mib} MiB": round(self._run(memory, leaves, mib), 1) for mib in (1, 8, 64, 256, 1024, 4096)
            },
        }

    def _run(self, memory: AddressSpace, leaves: tuple[Leaf, ...], count: int) -> float:
        """Of digests of runs of leaves as they are verified: the tables are there."""
        tables = digest.LeafDigests(memory, leaves)
        count = min(count, len(leaves))
        seconds = min(self._timed(lambda: tables.of(range(count)), 8))
        return sum(leaf.span.nbytes for leaf in leaves[:count]) / seconds / 1e9

    def _twin(self, memory: AddressSpace, spans: list[Span]) -> bytes:
        from weightwire.manifest.device_blocks import Blocks

        first = memory.slices(Span(spans[0].offset, spans[-1].end - spans[0].offset))
        blocks = Blocks(first, spans)
        rows = np.arange(len(blocks))
        values = device_digest._by_tensor_operations(blocks, rows, self.device)  # noqa: SLF001
        return device_digest._combined(values, blocks.counts)  # noqa: SLF001

    # ---- registration

    def registration(self, tensors: int, mib: float) -> dict[str, Any]:
        """Register ``tensors`` tensors of ``mib`` MiB with NIXL: whole allocations; and each tensor."""
        torch.cuda.empty_cache()
        began = time.perf_counter()
        held = [torch.empty(int(mib * MIB), dtype=torch.uint8, device=self.device) for _ in range(tensors)]
        found: dict[str, Any] = {"tensors": tensors, "allocate_s": time.perf_counter() - began}
        module = nn.Module()
        for at, tensor in enumerate(held):
            module.register_buffer(f"t{at}", tensor)
        memory = catalogue(module).memory
        each = [Region(tensor.data_ptr(), tensor.nbytes, self.device) for tensor in held]
        with _noted(found, "error"):
            found |= _registered(memory, each)
        return found

    # ---- inside

    @property
    def _cuda(self) -> bool:
        return self.device.startswith("cuda")

    def _settle(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()

    def _timed(self, action: Callable[[], object], runs: int) -> list[float]:
        found = []
        for _ in range(runs):
            self._settle()
            began = time.perf_counter()
            action()
            self._settle()
            found.append(time.perf_counter() - began)
        return found

    @contextlib.contextmanager
    def _memory(self) -> Iterator[dict[str, float]]:
        """MiB that were taken beyond what was there: by torch at most, and of the device when done."""
        used: dict[str, float] = {}
        if not self._cuda:
            yield used
            return
        torch.cuda.reset_peak_memory_stats()
        before, free = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]
        yield used
        used["torch_peak_mib"] = (torch.cuda.max_memory_allocated() - before) / MIB
        used["device_mib"] = (free - torch.cuda.mem_get_info()[0]) / MIB


@contextlib.contextmanager
def _noted(found: dict[str, Any], key: str) -> Iterator[None]:
    try:
        yield
    except WeightwireError as error:
        found[key] = f"{type(error).__name__}: {error}"


def _handle(row: list[Any]) -> list[Any]:
    return [bytes.fromhex(part) if isinstance(part, str) else part for part in row]


def _flat(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _kernel_seconds(kernel: Any, address: Any, nbytes: Any, out: torch.Tensor) -> float:
    """Of the kernel alone: its tables are on the device before."""
    table = kernel.table(np.stack((address, nbytes)))
    found = []
    for _ in range(8):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        kernel.hash(table, out)
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / 1000)
    return statistics.median(found)


def _on_host(memory: AddressSpace, leaves: tuple[Leaf, ...]) -> AddressSpace:
    span = Span(leaves[0].span.offset, leaves[-1].span.end - leaves[0].span.offset)
    parts, segments = [], []
    for segment in memory.slices(span):
        part = tensor_at(segment.address, segment.nbytes, segment.device).cpu()
        parts.append(part)
        segments.append(Segment(segment.offset, part.data_ptr(), part.nbytes, "cpu"))
    return AddressSpace(segments, [], parts)


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


def _one_read(memory: AddressSpace, endpoint: bytes, until: contextlib.ExitStack) -> dict[str, Any]:
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
    piece = Piece(pairs[0][0].device, pairs[0][1].device, runs, memory.span.nbytes)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        handle = agent.post(piece, peer.agent)
        while not agent.done(handle):
            pass
        seconds.append(time.perf_counter() - began)
        agent.release(handle)
    ways = {"<".join(way): "+".join(used) for way, used in agent.transports().items()}
    names = ("agent_s", "register_s", "add_peer_s")
    return {
        "ways": ways,
        "bare_first_gbps": memory.span.nbytes / seconds[0] / 1e9,
        "bare_gbps": memory.span.nbytes / min(seconds[1:]) / 1e9,
        **{name: marks[at + 1] - marks[at] for at, name in enumerate(names)},
    }


def _our_reads(memory: AddressSpace, endpoint: bytes, sizes_mib: list[int]) -> dict[str, float]:
    from weightwire.transport.nixl import NixlTransport

    transport = NixlTransport(SECRET)
    deadline = time.monotonic() + 120
    connection = transport.connect(endpoint, LEASE, deadline)
    registration = transport.register(memory)
    connection.read(Span(0, 1), registration).wait(deadline)
    found = {}
    for mib in sizes_mib:
        seconds = []
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
            seconds.append(time.perf_counter() - began)
        found[f"{mib} MiB"] = round(memory.span.nbytes / min(seconds) / 1e9, 2)
    found["path"] = connection.path
    connection.fence(time.monotonic() + 10)
    transport.close()
    return found


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed belongs to the log
    worker = Worker(sys.argv[1])
    if "BENCH_NO_GC" in os.environ:  # to see what collections cost a load
        gc.disable()
    if worker.device.startswith("cuda"):
        torch.cuda.init()
        torch.zeros(1, device=worker.device)
    print(json.dumps({"pid": os.getpid()}), file=answers, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = getattr(worker, command.pop("do"))(**command)
        except Exception as error:  # noqa: BLE001  (a step that fails must not end the others)
            import traceback

            traceback.print_exc()
            answer = {"failed": f"{type(error).__name__}: {error}"[:600]}
        print(json.dumps(answer), file=answers, flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
