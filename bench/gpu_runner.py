"""What every step of ``bench/gpu.py`` stands on: its processes, its bound, and where its figures go."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gpu_process import Clock, Failed, Lost, Process, answers, environment, said

SHORTEST_S = 5.0
"""No step begins with less than that left."""

SERVER_S = 60.0

Step = tuple[str, float, Callable[[], None]]


class Runner:
    """Runs steps one after the other; each has processes of its own, and notes what it finds in ``self.step``."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.devices: list[str] = options.devices
        self.here, self.there = self.devices[0], self.devices[-1]
        self.cuda = self.there.startswith("cuda")
        self.out = Path(os.environ.get("OUT") or tempfile.mkdtemp(prefix="gpu-bench-"))
        self.log = self.out / "gpu.log"
        self.found: dict[str, Any] = {"devices": self.devices, "steps": {}}
        self.clock = Clock(options.seconds)
        self.environment = environment(options.set)
        self.processes: list[Process] = []
        self.url = ""

    def steps(self) -> list[Step]:
        """Each with its name, its bound in seconds, and what it does."""
        raise NotImplementedError

    def run(self) -> None:
        server = self.serve()
        try:
            for name, bound, step in self.steps():
                self.run_step(name, bound, step)
        finally:
            server.kill()
            self.end_processes()
            self.save()

    def serve(self) -> subprocess.Popen[str]:
        """The metadata server of all steps."""
        with self.log.open("a") as log:
            command = [sys.executable, "-m", "weightwire.cli", "serve", "--json"]
            server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=self.environment, text=True)
        assert server.stdout is not None
        if not select.select([server.stdout], [], [], SERVER_S)[0]:
            server.kill()
            raise Lost(f"the metadata server did not start within {SERVER_S:.0f} s")
        self.url = json.loads(server.stdout.readline())["url"]
        return server

    def run_step(self, name: str, bound: float, step: Callable[[], None]) -> None:
        self.step = self.found["steps"].setdefault(name, {})
        if self.clock.end - time.monotonic() < SHORTEST_S:
            self.step["failed"] = "not run: out of time"
            return
        self.clock.begin_step(bound)
        began = time.monotonic()
        try:
            step()
        except Exception as error:  # noqa: BLE001  (a step that fails must not end the others)
            self.step["failed"] = f"{type(error).__name__}: {error}"
        except KeyboardInterrupt:
            self.step["failed"] = "broken off from outside"
            raise
        self.end_processes()
        self.step["wall_s"] = round(time.monotonic() - began, 1)
        self.save()
        print(f"# {name}: {self.step['wall_s']} s {self.step.get('failed', '')}", flush=True)

    # ---- inside

    def start(self, *devices: str) -> list[Process]:
        started = [Process(device, self.environment, self.log, self.clock) for device in devices]
        self.processes += started
        for process in started:
            process.order("settle")
        answers(started)
        return started

    def built(self, shape: str, sources: Sequence[str], targets: Sequence[str], *, same: bool = False) -> list[Process]:
        """Sources with random weights (each with others, unless ``same``), then targets that have yet to get some."""
        started = self.start(*sources, *targets)
        seeds = [1 if same else at + 1 for at in range(len(sources))] + [None] * len(targets)
        found = self.gather(started, "build", shape=shape, each=[{"seed": seed} for seed in seeds])
        self.note("source build", found[0])
        self.note("target build", found[-1])
        return started

    def gather(
        self, processes: Sequence[Process], do: str, each: Sequence[dict[str, Any]] = (), **arguments: Any
    ) -> list[dict[str, Any]]:
        """Ask all of them at once; ``each`` has what differs."""
        for at, process in enumerate(processes):
            process.order(do, **arguments, **(each[at] if each else {}))
        return answers(processes)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What fails inside is noted, and the step goes on; unless a process is lost."""
        try:
            yield
        except (Failed, KeyError) as error:
            self.step[f"{name} FAILED"] = {"failed": f"{type(error).__name__}: {error}"}

    def note(self, name: str, found: dict[str, Any]) -> dict[str, Any]:
        self.step[name] = found
        return found

    def note_ranks(self, name: str, found: list[dict[str, Any]]) -> None:
        """One process's answer under ``name``; those of several under ``name / 0``, ``name / 1`` …"""
        if len(found) == 1:
            self.note(name, found[0])
            return
        self.note(name, {})
        for at, part in enumerate(found):
            self.note(f"{name} / {at}", part)

    def end_processes(self) -> None:
        for process in self.processes:
            process.end()
        self.processes = []

    def save(self) -> None:
        (self.out / "gpu.json").write_text(json.dumps(self.found, indent=1))

    # ---- loads

    def received(self, key: str, target: Process, found: dict[str, Any]) -> None:
        """Note a load, and whether the target now computes what the source does."""
        self.note(key, found)
        tokens = target("tokens")
        found["tokens"] = tokens | {"right": same(tokens, self.expected)}

    def note_group(self, key: str, targets: list[Process], found: list[dict[str, Any]]) -> None:
        """Note loads that ran together, each with its tokens, and the rate of all of them."""
        tokens = self.gather(targets, "tokens")
        for part, said_, expected in zip(found, tokens, self.expected_of, strict=True):
            part["tokens"] = said_ | {"right": same(said_, expected)}
        self.note_ranks(key, found)
        reports = [part["report"] for part in found if "report" in part]
        if len(reports) < len(found):
            return
        seconds = max(part["ended"] for part in found) - min(part["began"] for part in found)
        nbytes, slowest = sum(r["nbytes"] for r in reports), max(r["seconds"]["transfer"] for r in reports)
        self.step[f"{key} in all"] = {
            "nbytes": nbytes,
            "seconds": seconds,
            "gbps": nbytes / seconds / 1e9,
            "transfer_s": slowest,
            "transfer_gbps": nbytes / slowest / 1e9,
        }

    def used_memory(self, key: str) -> None:
        """Of each device by all processes together, contexts included."""
        if self.cuda:
            asked = ("nvidia-smi", "--query-gpu=index,memory.used", "--format=csv,noheader,nounits")
            self.step[key] = {"used_mib": said(*asked).splitlines()}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one[key] == other[key] for key in ("tokens", "logits"))
