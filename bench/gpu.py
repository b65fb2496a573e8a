"""Device memory to device memory on one GPU: verified loads over nixl and tcp, against bare copies in the same run.

    bench/gpu.sh                      everything, some five minutes on an H100
    python bench/gpu.py --device cpu --shapes tiny --steps load kill     the plumbing, anywhere

Source and target are processes of their own (``gpu_worker.py``). A step that fails is reported and does not end the
others. ``$OUT/gpu.json`` and ``gpu.txt`` have all figures, ``gpu.log`` what the processes said; a table comes last.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
STEPS = ("digest", "load", "kill", "registration")
ANSWER_S = 150.0
SIZES_MIB = [8, 32, 128, 256, 1024]


class Lost(Exception):
    """A process gave no answer."""


class Process:
    def __init__(self, device: str, environment: dict[str, str], log: Path) -> None:
        with log.open("a") as file:
            self.child = subprocess.Popen(
                [sys.executable, str(HERE / "gpu_worker.py"), device],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env=environment,
                text=True,
            )
        self.pid = 0

    def order(self, do: str, **arguments: Any) -> None:
        assert self.child.stdin is not None
        self.child.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self.child.stdin.flush()

    def answer(self) -> dict[str, Any]:
        assert self.child.stdout is not None
        if not select.select([self.child.stdout], [], [], ANSWER_S)[0]:
            self.child.kill()
            raise Lost("no answer in time")
        line = self.child.stdout.readline()
        if not line:
            raise Lost(f"ended with {self.child.wait(10)}")
        found: dict[str, Any] = json.loads(line)
        return found

    def __call__(self, do: str, **arguments: Any) -> dict[str, Any]:
        self.order(do, **arguments)
        return self.answer()

    def end(self) -> None:
        self.child.kill()
        self.child.wait(30)


class Bench:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.out = Path(os.environ.get("OUT") or tempfile.mkdtemp(prefix="gpu-bench-"))
        self.log = self.out / "gpu.log"
        self.found: dict[str, Any] = {"steps": {}}
        self.began = time.monotonic()
        self.environment = _environment(options.set)
        self.server = subprocess.Popen(
            [sys.executable, "-m", "weightwire.cli", "serve", "--json"],
            stdout=subprocess.PIPE,
            stderr=self.log.open("a"),
            env=self.environment,
            text=True,
        )
        assert self.server.stdout is not None
        self.url = json.loads(self.server.stdout.readline())["url"]

    # ---- steps

    def run(self) -> None:
        steps = [("machine", self.machine)]
        if "digest" in self.options.steps:
            steps.append(("digest", self.digest))
        if "load" in self.options.steps:
            steps += [(f"load {shape}", lambda shape=shape: self.load(shape)) for shape in self.options.shapes]
        if "kill" in self.options.steps:
            steps.append(("kill", self.kill))
        if "registration" in self.options.steps:
            steps.append(("registration", self.registration))
        for name, step in steps:
            self.step = self.found["steps"].setdefault(name, {})
            began = time.monotonic()
            if began - self.began > self.options.seconds:
                self.step["failed"] = "not run: out of time"
                continue
            self.processes: list[Process] = []
            try:
                step()
            except (Lost, OSError, KeyError) as error:
                self.step["failed"] = f"{type(error).__name__}: {error}"
            for process in self.processes:
                process.end()
            self.step["wall_s"] = round(time.monotonic() - began, 1)
            self.save()
            print(f"# {name}: {self.step['wall_s']} s", flush=True)
        self.server.kill()

    def machine(self) -> None:
        asked = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        try:
            self.step["gpu"] = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
        except FileNotFoundError:
            self.step["gpu"] = "none"
        self.step |= {"cores": os.cpu_count(), "set": self.options.set}

    def digest(self) -> None:
        for shape in self.options.shapes:
            (one,) = self.start(1)
            self.note(f"{shape} build", one("build", shape=shape, seed=1))
            if shape == self.options.shapes[0] and self.options.device != "cpu":
                self.note("copy", one("device_copy", mib=4096))
                self.note("host copy", one("host_copy", mib=1024))
            self.note(shape, one("digests", host_mib=1024))
            one.end()

    def load(self, shape: str) -> None:
        source, target = self.start(2)
        source.order("build", shape=shape, seed=1)
        target.order("build", shape=shape, seed=None)
        self.note("source build", source.answer())
        self.note("target build", target.answer())
        self.expected = self.note("source tokens", source("tokens"))
        if self.options.device != "cpu":
            handles = source("share")
            self.note("ipc copy", target("copy_shared", handles=handles["handles"]))
        self.transfer("nixl", source, target, ["nixl"], times=3)  # fresh (with a profile), warm, warm with a profile
        if self.step["nixl publish"].get("report"):
            self.note("bare source", source("bare_source"))
            if "endpoint" in self.step["bare source"]:
                endpoint = self.step["bare source"].pop("endpoint")
                self.note("bare read", target("bare_read", endpoint=endpoint, sizes_mib=SIZES_MIB))
        self.transfer("tcp", source, target, ["tcp"], times=1)
        self.transfer("both", source, target, ["nixl", "tcp"], times=1)

    def transfer(self, name: str, source: Process, target: Process, transports: list[str], times: int) -> None:
        """Publish, receive ``times`` times into poisoned memory, compare tokens, withdraw."""
        model_id = f"bench/{name}"
        self.note(f"{name} publish", source("publish", url=self.url, transports=transports, model_id=model_id))
        for time_ in range(times):
            target("poison")
            key = name if times == 1 else f"{name} {time_ + 1}"
            asked = {"url": self.url, "transports": transports, "model_id": model_id}
            self.note(key, target("receive", **asked, profile=times > 1 and time_ != 1))
            found = target("tokens")
            self.step[key]["tokens"] = found | {"right": self.right(found)}
        self.note(f"{name} withdraw", source("withdraw", model_id=model_id))

    def kill(self) -> None:
        """Copy-on-transform, and sources that are killed: one of two, the only one over tcp, the only one over nixl."""
        shape = self.options.kill_shape
        one, two, three, target = everybody = self.start(4)
        for process in everybody:
            process.order("build", shape=shape, seed=None if process is target else 1)
        for process in everybody:
            process.answer()
        self.expected = self.note("source tokens", one("tokens"))
        self.transformed(three, target)
        for process in (one, two):
            process("publish", url=self.url, transports=["tcp"], model_id="bench/kill")
        asked: dict[str, Any] = {"url": self.url, "transports": ["tcp"], "model_id": "bench/kill", "kill_at": 0.3}
        for name, victim in (("tcp, one of two killed", one), ("tcp, the only one killed", two)):
            target("poison")
            self.note(name, target("receive", **asked, kill=victim.pid))
            self.after(name, target)
        three("publish", url=self.url, transports=["nixl"], model_id="bench/kill nixl")
        target("poison")
        asked |= {"transports": ["nixl"], "model_id": "bench/kill nixl", "kill_at": 0.0}
        self.note("nixl, the only one killed", target("receive", **asked, kill=three.pid))
        self.after("nixl, the only one killed", target)

    def transformed(self, source: Process, target: Process) -> None:
        asked: dict[str, Any] = {"url": self.url, "transports": ["nixl", "tcp"], "model_id": "bench/transform"}
        self.note("transform publish", source("publish", **asked))
        self.note("transform", source("transform", model_id="bench/transform", every=2))
        target("poison")
        self.note("transform receive", target("receive", **asked))
        found = target("tokens")
        self.step["transform receive"]["tokens"] = found | {"right": self.right(found)}
        self.step["transform"]["source_changed"] = not self.right(source("tokens"))
        source("withdraw", model_id="bench/transform")

    def after(self, name: str, target: Process) -> None:
        """What a load that lost its source leaves: right tokens, or an error and no claim."""
        found = self.step[name]
        if "report" in found:
            found["tokens_right"] = self.right(target("tokens"))
        elif "killed" in found["seen"]:
            found["seconds_after_kill"] = found["ended"] - found["seen"]["killed"]

    def registration(self) -> None:
        (one,) = self.start(1)
        for tensors, mib in ((1, 10.5), (300, 10.5), (5000, 2.0), (5000, 10.5)):
            self.note(f"{tensors} of {mib} MiB", one("registration", tensors=tensors, mib=mib))

    # ---- inside

    def start(self, count: int) -> list[Process]:
        started = [Process(self.options.device, self.environment, self.log) for _ in range(count)]
        self.processes += started
        for process in started:
            process.pid = process.answer()["pid"]
        return started

    def note(self, name: str, found: dict[str, Any]) -> dict[str, Any]:
        self.step[name] = found
        return found

    def right(self, found: dict[str, Any]) -> bool:
        return all(found.get(key) == self.expected[key] for key in ("tokens", "logits"))

    def save(self) -> None:
        (self.out / "gpu.json").write_text(json.dumps(self.found, indent=1))


def _environment(pairs: Sequence[str]) -> dict[str, str]:
    cleared = {name: value for name, value in os.environ.items() if not name.startswith("WEIGHTWIRE_")}
    given = dict(pair.split("=", 1) for pair in pairs)
    home = tempfile.mkdtemp(prefix="gpu-bench-state-")
    own = {"XDG_STATE_HOME": home, "NIXL_LOG_LEVEL": "WARN", "PYTHONUNBUFFERED": "1"}
    return cleared | own | given


# ---- what is printed


def details(found: dict[str, Any]) -> list[str]:
    """Everything, a line for each part of a step."""
    rows = []
    for name, step in found["steps"].items():
        for key, part in step.items():
            if isinstance(part, dict):
                rows += [f"{name} | {key}: {line}" for line in _lines(part)]
    return rows


def summary(found: dict[str, Any]) -> list[str]:
    """What counts, as a table."""
    steps = found["steps"]
    rows = [f"machine: {steps['machine'].get('gpu')}, {steps['machine'].get('cores')} cores"]
    rows += [f"{name}: FAILED {step['failed']}" for name, step in steps.items() if "failed" in step]
    for build in (_digest_rows, _load_rows, _kill_rows, _registration_rows):
        try:
            rows += build(steps)
        except KeyError as missing:
            rows.append(f"{build.__name__}: no {missing}")
    return rows


def _digest_rows(steps: dict[str, Any]) -> list[str]:
    step = steps.get("digest", {})
    if "copy" not in step:
        return []
    memory = step["copy"]["memory_gbps"]
    rows = [f"device copy: {memory:.0f} GB/s read and written"]
    for shape in ("8GB", "30GB"):
        if shape in step:
            part, kernel = step[shape], step[shape]["kernel_gbps"]["1024x3"]
            equal = part["equals_host"] and part["equals_twin"] and part["variants_agree"]
            rows.append(
                f"digest {shape}: kernel {kernel:.0f} GB/s = {kernel / memory:.2f} of that; digest_leaves "
                f"{1000 * part['path_s']:.1f} ms (first {1000 * part['path_first_s']:.0f}); equal to the host: {equal}"
            )
    return rows


def _load_rows(steps: dict[str, Any]) -> list[str]:
    rows = []
    for name, step in steps.items():
        if not name.startswith("load "):
            continue
        ipc, bare = step.get("ipc copy", {}).get("gbps", 0.0), step.get("bare read", {})
        if "bare_gbps" in bare:
            ours = max(value for value in bare["ours_gbps"].values() if isinstance(value, float))
            rows.append(
                f"{name}: IPC copy {ipc:.0f}, one bare NIXL READ {bare['bare_gbps']:.0f}, ours {ours:.0f} GB/s"
                f" = {ours / bare['bare_gbps']:.2f} of the READ, {ours / max(ipc, 1):.2f} of the copy"
            )
        rows += [f"{name} {key}: {_load_line(step[key])}" for key in ("nixl 1", "nixl 2", "tcp", "both") if key in step]
    return rows


def _kill_rows(steps: dict[str, Any]) -> list[str]:
    step = steps.get("kill", {})
    rows = [f"{key}: {_load_line(part)}" for key, part in step.items() if isinstance(part, dict) and "killed" in key]
    if "transform" in step:
        part, right = step["transform"], step["transform receive"]["tokens"]["right"]
        rows.append(
            f"copy-on-transform: {part['changed_bytes'] >> 20} MiB changed, {part['held_bytes'] >> 20} held, "
            f"{part['allocated_bytes'] >> 20} allocated; raw bytes received: {right}; source differs: "
            f"{part['source_changed']}"
        )
    return rows


def _registration_rows(steps: dict[str, Any]) -> list[str]:
    return [
        f"registration of {key} in {part['allocations']} allocations: {part['find_allocations_s']:.4f} s to find them, "
        f"{part['register_s']:.4f} s; tensor by tensor {part['per_tensor_s']:.4f} s"
        for key, part in steps.get("registration", {}).items()
        if isinstance(part, dict) and "register_s" in part
    ]


def _lines(part: dict[str, Any]) -> list[str]:
    if "failed" in part or "error" in part:
        return [f"FAILED {part.get('failed') or part.get('error')}"]
    if "seen" in part:
        profile = [f"{label} {_rounded(row)}" for label, row in part["profile"].items()]
        seconds = _rounded(part.get("report", {}).get("seconds", {}))
        return [f"{_load_line(part)} {seconds} {part.get('report', {}).get('warnings', '')}", *profile]
    if "report" in part:
        seconds = {name: round(value, 3) for name, value in part["report"]["seconds"].items()}
        served = part["report"]["transports"], part["report"]["unavailable"]
        profile = [f"{label} {_rounded(row)}" for label, row in part["profile"].items()]
        return [f"{part['ended'] - part['began']:.3f} s {seconds}, {served}, {_rounded(part['memory'])}", *profile]
    return [json.dumps(_rounded({name: value for name, value in part.items() if name != "handles"}))]


def _load_line(part: dict[str, Any]) -> str:
    if "report" not in part and "raised" not in part:
        return f"FAILED {part.get('failed')}"
    began, seen, total = part["began"], part["seen"], part["ended"] - part["began"]
    if "raised" in part:
        return f"{part['raised']} ({1000 * part.get('seconds_after_kill', -1):.0f} ms after the kill)"
    report = part["report"]
    seconds = report["seconds"]
    said = [
        f"{total:.3f} s, first bytes verified at {seen.get('first', began) - began:.3f}",
        f"transfer {seconds['transfer']:.3f} s = {report['gigabytes_per_second']:.1f} GB/s",
        f"verify {1000 * seconds['verify']:.0f} ms = {100 * seconds['verify'] / total:.1f} %",
        "+".join(report["paths"]),
    ]
    if "tokens" in part:
        said.append(f"tokens {part['tokens']['right']} at {part['tokens']['at'] - began:.3f}")
    if "tokens_right" in part:
        said.append(f"tokens {part['tokens_right']}, {report['retries']} retries")
    if part.get("memory"):
        said.append(f"memory {part['memory']['torch_peak_mib']:.0f} + {part['memory']['device_mib']:.0f} MiB")
    return ", ".join(said)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--shapes", nargs="+", default=["8GB", "30GB"])
    parser.add_argument("--kill-shape", default="3GB")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--seconds", type=float, default=360.0, help="no step begins later")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="environment of the processes")
    bench = Bench(parser.parse_args())
    bench.run()
    (bench.out / "gpu.txt").write_text("\n".join(details(bench.found)) + "\n")
    print("\n".join(summary(bench.found)))
    print(f"# {time.monotonic() - bench.began:.0f} s in all; {bench.out}/gpu.json")


if __name__ == "__main__":
    main()
