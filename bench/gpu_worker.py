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
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != HERE]  # nixl is not bench/nixl.py

import torch  # noqa: E402
from torch.distributed import PrefixStore, TCPStore  # noqa: E402

sys.path.append(str(HERE))
import gpu_bare  # noqa: E402
import gpu_digest  # noqa: E402
import gpu_model  # noqa: E402
import gpu_profile  # noqa: E402

import weightwire  # noqa: E402
from weightwire.config import Settings  # noqa: E402
from weightwire.errors import WeightwireError  # noqa: E402
from weightwire.loaders.module import Published  # noqa: E402
from weightwire.manifest.catalogue import catalogue  # noqa: E402
from weightwire.types import Stage  # noqa: E402

MIB = 1 << 20
COPIES = 6


def identity(model_id: str, tp_size: int) -> weightwire.Identity:
    return weightwire.module_identity(model_id, "Llama", "bfloat16", {}, revision="1", tp_size=tp_size)


class Worker:
    def __init__(self, device: str) -> None:
        self.device = device
        self.published: dict[str, Published] = {}
        self.kept: list[Any] = []
        self.rank, self.size = 0, 1
        self.store: Any = None

    def settle(self) -> dict[str, Any]:
        """Answered once everything is imported and the device is there."""
        self._settle()
        return {}

    def about(self) -> dict[str, Any]:
        """What runs here, and what keeps NVLink multicast off."""
        from importlib.metadata import version

        names = ("NCCL_NVLS_ENABLE", "TORCH_SYMM_MEM_DISABLE_MULTICAST", "NVSHMEM_DISABLE_NVLS")
        found: dict[str, Any] = {"python": sys.version.split()[0], "torch": torch.__version__}
        for package in ("nixl", "nixl-cu13", "grpcio", "protobuf"):
            with contextlib.suppress(ModuleNotFoundError):
                found[package] = version(package)
        return found | {name: os.environ.get(name, "unset") for name in names}

    # ---- several ranks

    def open_store(self) -> dict[str, Any]:
        """Serve the store of the ranks' decisions, as rank 0 of an engine does."""
        self.kept.append(TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
        return {"port": self.kept[-1].port}

    def join(self, port: int, rank: int, size: int) -> dict[str, Any]:
        self.store = TCPStore("127.0.0.1", port, is_master=False)
        self.rank, self.size = rank, size
        return {}

    def _together(self, use: str) -> dict[str, Any]:
        """Arguments of ``publish`` and ``receive`` for a replica of several ranks; ``use`` is new each time."""
        if self.store is None:
            return {}
        where = weightwire.Coordinates(tp_rank=self.rank, tp_size=self.size)
        store = PrefixStore(use.replace(" ", "-"), self.store)
        return {"coordinates": where, "group": weightwire.ranks(store, self.rank, self.size)}

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

    def publish(
        self, url: str, transports: list[str], model_id: str, max_rate: str | None = None, use: str = ""
    ) -> dict[str, Any]:
        settings = Settings.from_env({}, url=url, transports=tuple(transports), max_rate=max_rate)
        with self._memory() as used, gpu_profile.watched() as profile:
            began = time.monotonic()
            asked = {"settings": settings, **self._together(f"publish/{model_id}/{use}")}
            published = weightwire.publish(self.model, identity(model_id, self.size), **asked)
            ended = time.monotonic()
        self.published[model_id] = published
        report = dataclasses.asdict(published.report)
        found = {"began": began, "ended": ended, "report": report, "memory": used, "profile": profile}
        return found | {"process": published._member.incarnation[:8]}  # noqa: SLF001  (as a peer's label has it)

    def withdraw(self, model_id: str) -> dict[str, Any]:
        began = time.monotonic()
        self.published.pop(model_id).withdraw()
        return {"seconds": time.monotonic() - began}

    def receive(
        self,
        url: str,
        transports: list[str],
        model_id: str,
        *,
        kill: int = 0,
        kill_at: float = 0.0,
        profile: bool = False,
        use: str = "",
        relay: bool = False,
    ) -> dict[str, Any]:
        """Fill the model from peers; on the way, once ``kill_at`` of the bytes are verified, kill process ``kill``.

        A ``relay`` publishes what it received at once, so that others can take it from here.
        """
        settings = Settings.from_env({}, url=url, transports=tuple(transports))
        seen: dict[str, float] = {}

        def progress(phase: str, done: int, total: int, unit: str) -> None:
            if phase == "transfer" and unit == "bytes" and done:
                seen.setdefault("first", time.monotonic())
                if kill and "killed" not in seen and done >= kill_at * total:
                    os.kill(kill, signal.SIGKILL)
                    seen["killed"], seen["done"] = time.monotonic(), done / total

        found: dict[str, Any] = {"seen": seen}
        who = identity(model_id, self.size)
        watched = gpu_profile.watched() if profile else contextlib.nullcontext({})
        with self._memory() as used, watched as found["profile"]:
            began = time.monotonic()
            try:
                asked = {"settings": settings, **self._together(f"receive/{model_id}/{use}")}
                report = weightwire.receive(self.model, who, progress=progress, **asked)
                found["report"] = report.to_json()
            except WeightwireError as error:
                found["raised"] = f"{type(error).__name__}: {error}"
            ended = time.monotonic()
        if relay and "report" in found:
            published = weightwire.publish(self.model, who, received=report, settings=settings)
            self.published[model_id] = published
            found |= {"serves": time.monotonic(), "process": published._member.incarnation[:8]}  # noqa: SLF001
        return found | {"began": began, "ended": ended, "memory": used, "contexts": self._contexts()}

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

    # ---- small models of the native runtime

    def families(self, folder: str) -> dict[str, Any]:
        """Their names; each process writes the same checkpoints."""
        import gpu_families

        for case in gpu_families.CASES:
            gpu_families.written(Path(folder), case)
        return {"cases": list(gpu_families.CASES)}

    def family_serve(self, folder: str, case: str, stage: str, url: str, transports: list[str]) -> dict[str, Any]:
        import gpu_families

        settings = Settings.from_env({}, url=url, transports=tuple(transports))
        where = Path(folder, case.replace(" ", "-"))
        self.published["family"], found = gpu_families.serve(where, case, Stage(stage), self.device, settings)
        return found

    def family_take(self, folder: str, case: str, stage: str, url: str, transports: list[str]) -> dict[str, Any]:
        import gpu_families

        settings = Settings.from_env({}, url=url, transports=tuple(transports))
        where = Path(folder, case.replace(" ", "-") + "-bare")
        return gpu_families.take(where, case, Stage(stage), self.device, settings)

    # ---- what the same bytes cost without us

    def share(self) -> dict[str, Any]:
        return {"handles": gpu_bare.shared(list(self.model.parameters()))}

    def copy_shared(self, handles: list[list[Any]], at: float = 0.0) -> dict[str, Any]:
        return gpu_bare.copy_shared(list(self.model.parameters()), handles, at, COPIES)

    def bare_source(self) -> dict[str, Any]:
        kept, found = gpu_bare.served(catalogue(self.model).memory)
        self.kept.append(kept)
        return found

    def bare_read(self, endpoint: str, sizes_mib: list[int], at: float = 0.0) -> dict[str, Any]:
        """One bare NIXL READ of everything; then our connection by size of one read. No digest in either."""
        memory = catalogue(self.model).memory
        found: dict[str, Any] = {"nbytes": memory.span.nbytes}
        with contextlib.ExitStack() as until:
            found |= gpu_bare.one_read(memory, bytes.fromhex(endpoint), until, at)
        if sizes_mib:
            found["ours_gbps"] = gpu_bare.our_reads(memory, bytes.fromhex(endpoint), sizes_mib)
        return found

    def peer_copy(self, source: str, sizes_mib: list[int]) -> dict[str, Any]:
        return gpu_bare.peer_copy(source, self.device, sizes_mib)

    def device_copy(self, mib: int) -> dict[str, Any]:
        return gpu_bare.device_copy(self.device, mib)

    def host_copy(self, mib: int) -> dict[str, Any]:
        return gpu_bare.host_copy(self.device, mib)

    # ---- digests and registration

    def digests(self, host_mib: int) -> dict[str, Any]:
        return gpu_digest.digests(self.model, self.device, host_mib)

    def registration(self, tensors: int, mib: float) -> dict[str, Any]:
        return gpu_bare.registration(self.device, tensors, mib)

    # ---- inside

    @property
    def _cuda(self) -> bool:
        return self.device.startswith("cuda")

    def _settle(self) -> None:
        gpu_bare.settle((self.device,))

    def _contexts(self) -> list[int]:
        """Devices on which this process has a context (half a GB each): its own, and no other."""
        has_context = getattr(torch._C, "_cuda_hasPrimaryContext", None)  # noqa: SLF001  (asking makes none)
        count = torch.cuda.device_count() if self._cuda and has_context else 0
        return [index for index in range(count) if has_context(index)]

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


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed belongs to the log
    worker = Worker(sys.argv[1])
    if "BENCH_NO_GC" in os.environ:  # to see what collections cost a load
        gc.disable()
    if worker.device.startswith("cuda"):
        torch.cuda.set_device(worker.device)  # and no context on any other device, as an engine's rank has it
        torch.zeros(1, device=worker.device)
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
