"""Starts vLLM processes quickly: a process that has imported vLLM, and forks one replica for each request.

    python vllm_zygote.py serve SOCKET     the process that forks; prints a line when it is ready

Importing vLLM takes ten to twenty seconds, a fork takes none. Nothing but imports happens before it: no engine, no
thread, no plugin. What a request's process does is in ``vllm_child``; it leads a process group of its own.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import socket
import sys
import threading
from types import SimpleNamespace
from typing import Any

from engine_zygote import Zygote

IMPORTS = (
    "torch",
    "vllm",
    "vllm.entrypoints.openai.api_server",
    "vllm.model_executor.model_loader",
    "vllm.model_executor.models.llama",
    "vllm.model_executor.models.qwen3_moe",
    "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors",
    "vllm.v1.attention.backends.cpu_attn",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
)


def fork_workers() -> None:
    """vLLM's own processes are forked too, which is its default on other platforms; on a CPU it wants to spawn them."""
    import multiprocessing

    from vllm.utils import system_utils

    def context(_method: str | None = None) -> Any:
        return multiprocessing.get_context("fork")

    system_utils.multiprocessing = SimpleNamespace(get_context=context)


class TellingZygote(Zygote):
    """Tells who asked for a replica its process id."""

    def _fork(self) -> tuple[str, dict[str, str]] | None:
        replica = super()._fork()
        if replica is None:
            pid, line = next(reversed(self.ranks.items()))
            line.sendall(f"{pid}\n".encode())
        return replica

    def end(self) -> None:
        """Kill what is left, with its workers."""
        for pid in self.ranks:
            os.killpg(pid, signal.SIGKILL)


def serve(path: str) -> None:
    """Fork replicas until standard input ends; in a replica, its whole life."""
    for name in IMPORTS:
        importlib.import_module(name)
    assert threading.active_count() == 1, threading.enumerate()
    gc.collect()
    gc.freeze()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen(64)
        print("ready", flush=True)
        zygote = TellingZygote(listening)
        replica = zygote.run()
        if replica is None:
            zygote.end()
            return
    options, environment = replica
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = [place for place in environment.get("PYTHONPATH", "").split(os.pathsep) if place not in sys.path]
    fork_workers()
    import vllm_child
    import vllm_hosts

    if vllm_hosts.VARIABLE in os.environ:
        vllm_hosts.enter(os.environ[vllm_hosts.VARIABLE])

    vllm_child.main(json.loads(options))


if __name__ == "__main__":
    serve(sys.argv[2])
